"""Supervised fine-tuning on conversations (report section 5.1), of the model that init.from names.

    python -m deepseek_jax.train --config sft --workdir tuned --config.init.from=run \
        --config.data.sources="(('chats.jsonl', 1.0),)" --config.train.steps=200

Rows of chats.jsonl: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny")
    config.model = None  # that of init.from
    config.data.packing = "whole"  # keeps each answer with its question
    config.data.mask_documents = True  # conversations that share a sequence do not see each other
    config.data.fim_rate = 0.0
    config.data.split_punctuation_rate = 0.0
    config.train.steps = 200
    config.train.batch_size = 16
    config.train.sequence_length = 256
    config.train.eval_every = 50
    config.train.checkpoint_every = 50
    config.train.mtp_weights = ((0.0, 0.1),)  # as at the end of pre-training
    # From 5e-6 to 1e-6 by a cosine; a small model needs more: --config.optimizer.learning_rate=1e-4.
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup = 0.03
    config.optimizer.constant_until = 0.03
    config.optimizer.cosine_until = 1.0
    config.optimizer.tail_from = 1.0
    config.optimizer.cosine_to = 0.2
    config.optimizer.tail_to = 0.2
    config.optimizer.weight_decay = 0.0
    config.balance.bias_speed = 0.0  # chats are a skewed sample: biases that follow them would change the routing
    config.balance.sequence_loss_weight = 0.0
    return config
