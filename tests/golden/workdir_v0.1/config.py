"""Started as `python -m deepseek_jax.train --config config.py --workdir run` from the folder of this file."""

from deepseek_jax.config import default_config


def get_config():
    config = default_config("tiny")
    config.model.update(dict(
        vocab_size=264, d_model=8, num_layers=2, num_heads=2, q_rank=4, kv_rank=4, nope_head_dim=4, rope_head_dim=4,
        v_head_dim=4, dense_ffn_dim=8, expert_ffn_dim=4, num_experts=4, experts_per_token=2, num_groups=2,
        groups_kept=1, dtype="float32", attention_block=16))
    config.data.sources = (("corpus", 1.0),)
    config.data.validation_fraction = 0.3
    config.train.update(dict(steps=4, batch_size=4, micro_batches=2, sequence_length=16, eval_every=2, eval_batches=1,
                             checkpoint_every=2, loss_chunk=32, sample_tokens=0))
    config.optimizer.update(dict(learning_rate=1e-2, warmup=0.1, moment_dtype="bfloat16"))
    return config
