"""Models by name: those of the reports, open models of the same architecture, and two small ones."""

from __future__ import annotations

from typing import Any

from deepseek_jax.config.model import ModelConfig, Yarn
from deepseek_jax.config.schema import ConfigError, build, did_you_mean

_SMALL = dict(q_rank=96, kv_rank=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32, dense_ffn_dim=704,
              expert_ffn_dim=128, num_experts=32, experts_per_token=4, num_groups=4, groups_kept=2,
              vocab_size=8192, d_model=256, num_heads=4, init_std=0.02, attention_block=128)
_V2 = dict(vocab_size=102400, num_dense_layers=1, score="softmax", router_bias="none", normalize_gates=False,
           num_shared_experts=2, experts_per_token=6, mtp_depth=0,
           yarn=Yarn(mscale=0.707, mscale_all_dim=0.707))
# Open models with the architecture of V3, without groups of experts.
_OPEN = dict(num_dense_layers=1, num_groups=1, groups_kept=1, init_std=0.02)

PRESETS = {
    # Like `small`, but shallow: learns real text in minutes on two CPU cores.
    "tiny": dict(_SMALL, num_layers=4, num_dense_layers=1, remat="none"),
    # The shape for timing this project and its peers.
    "small": dict(_SMALL, num_layers=6, num_dense_layers=1, remat="none", attention_block=256),
    "v2_lite_16b": dict(_V2, d_model=2048, num_layers=27, num_heads=16, q_rank=None, dense_ffn_dim=10944,
                        expert_ffn_dim=1408, num_experts=64, num_groups=1, groups_kept=1, route_scale=1.0),
    "v2_236b": dict(_V2, d_model=5120, num_layers=60, num_heads=128, dense_ffn_dim=12288, expert_ffn_dim=1536,
                    num_experts=160, num_groups=8, groups_kept=3, route_scale=16.0),
    # Like `tiny`, with the sparse attention of V3.2.
    "tiny_dsa": dict(_SMALL, num_layers=4, num_dense_layers=1, remat="none", index_topk=64, index_heads=8,
                     index_head_dim=32),
    "v3_671b": dict(yarn=Yarn()),
    "v3_2_671b": dict(yarn=Yarn(), index_topk=2048),
    "moonlight_16b": dict(_OPEN, vocab_size=163840, d_model=2048, num_layers=27, num_heads=16, q_rank=None,
                          dense_ffn_dim=11264, expert_ffn_dim=1408, num_experts=64, num_shared_experts=2,
                          experts_per_token=6, route_scale=2.446, mtp_depth=0, rope_theta=50000.0, norm_eps=1e-5),
    "kimi_k2_1t": dict(_OPEN, vocab_size=163840, num_heads=64, num_experts=384, route_scale=2.827, mtp_depth=0,
                       rope_theta=50000.0, yarn=Yarn(factor=32.0, beta_fast=1.0)),
    "glm_4_7_flash": dict(_OPEN, vocab_size=154880, d_model=2048, num_layers=47, num_heads=20, q_rank=768,
                          nope_head_dim=192, v_head_dim=256, dense_ffn_dim=10240, expert_ffn_dim=1536, num_experts=64,
                          experts_per_token=4, route_scale=1.8, rope_theta=1e6, norm_eps=1e-5),
    "gigachat3_10b": dict(_OPEN, vocab_size=128256, d_model=1536, num_layers=26, num_heads=32, q_rank=None,
                          v_head_dim=192, dense_ffn_dim=8960, expert_ffn_dim=1280, num_experts=64, experts_per_token=4,
                          route_scale=1.0, rope_theta=100000.0),
}


def model_config(name: str, **overrides: Any) -> ModelConfig:
    """The preset `name` with fields replaced. Raises ConfigError for an unknown name, field or an impossible shape."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model {name!r}; {did_you_mean(name, PRESETS)}")
    return build(ModelConfig, {**PRESETS[name], **overrides}, "model")
