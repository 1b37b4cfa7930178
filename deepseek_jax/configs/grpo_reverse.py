"""Reinforcement learning on a task that a rule checks, reversing letters. Starts from a run of config `problems`.

    python -m deepseek_jax.posttraining reverse --examples 20000 > problems.jsonl
    python -m deepseek_jax.train --config problems --workdir run_reverse
    python -m deepseek_jax.reinforce --config grpo_reverse --workdir rl --config.init.from=run_reverse
"""

from ml_collections import ConfigDict

from deepseek_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config("tiny")
    config.model = None  # that of init.from
    config.rollout.task = "reverse"
    config.rollout.max_new_tokens = 12
    config.train.steps = 50
    config.train.batch_size = 128  # answers: 16 prompts
    config.train.sequence_length = 32
    config.train.eval_every = 10
    config.train.eval_batches = 1
    config.train.checkpoint_every = 10
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup = 0.0
    config.optimizer.constant_until = config.optimizer.cosine_until = config.optimizer.tail_from = 1.0
    config.optimizer.weight_decay = 0.0  # decay would shrink the MTP module, which has no gradient here
    config.balance.bias_speed = 0.0  # a small, skewed batch must not change the routing
    config.balance.sequence_loss_weight = 0.0
    return config
