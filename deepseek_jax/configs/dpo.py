"""Direct preference optimization of the model that init.from names, on pairs of answers.

    python -m deepseek_jax.train --config dpo --workdir preferred --config.init.from=tuned \
        --config.data.sources="(('pairs.jsonl', 1.0),)" --config.train.steps=200

Rows of pairs.jsonl: {"prompt": [{"role": "user", "content": "..."}],
"chosen": [{"role": "assistant", "content": "..."}], "rejected": [{"role": "assistant", "content": "..."}]}
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import sft


def get_config() -> ConfigDict:
    config: Any = sft.get_config()
    config.preference.objective = "dpo"
    config.data.packing = "stream"  # a row is one prompt with one answer
    config.data.mask_documents = False
    config.train.batch_size = 32  # 16 pairs
    config.train.mtp_weights = ((0.0, 0.0),)  # MTP modules draft for a policy that changes, and are not trained
    config.optimizer.learning_rate = 5e-7  # of the order of the paper's 1e-6; a small model needs more
    return config
