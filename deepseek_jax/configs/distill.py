"""`tiny`, trained on the distribution of a teacher as well as on the tokens. The teacher is any run of the same
vocabulary, such as one of config `small`; the student takes its tokenizer.

    python -m deepseek_jax.train --config distill --workdir student --config.distill.from=run
"""

from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny


def get_config() -> ConfigDict:
    config: Any = tiny.get_config()
    config.distill["from"] = ""  # to be named
    return config
