"""A small model that answers: it learns problems with answers from nothing, in minutes on a CPU.

    python -m deepseek_jax.posttraining reverse --examples 20000 > problems.jsonl
    python -m deepseek_jax.train --config problems --workdir run_problems

A loss on answers alone; each problem attends to itself alone.
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny")
    config.model.vocab_size = 512  # letters, digits, and the words of the problems
    config.model.d_model = 128
    config.model.num_experts = 16
    config.model.expert_ffn_dim = 64
    config.model.dense_ffn_dim = 352
    config.data.sources = (("problems.jsonl", 1.0),)
    config.data.packing = "whole"
    config.data.mask_documents = True
    config.data.fim_rate = 0.0
    config.data.split_punctuation_rate = 0.0
    config.train.steps = 1000
    config.train.batch_size = 32
    config.train.sequence_length = 64
    config.train.eval_every = 250
    config.train.checkpoint_every = 250
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup = 0.05
    config.optimizer.constant_until = 0.4
    config.balance.bias_speed = 0.005  # 0.001 could move a bias by only 1 in a run of this length
    return config
