"""Parameters and FLOPs, counted from the config alone (no jax).

Products only: a product of an [M, K] by a [K, N] matrix is 2 M K N operations; norms, softmax and rotations are left
out, as the field does. Backward is twice forward.
"""

from deepseek_jax.config import ModelConfig


def attention_parameters(c: ModelConfig) -> int:
    """MLA of one layer, its two latent norms included."""
    H, qk = c.num_heads, c.qk_head_dim
    query = c.d_model * H * qk if c.q_rank is None else c.q_rank * (c.d_model + 1 + H * qk)
    kv = c.d_model * (c.kv_rank + c.rope_head_dim) + c.kv_rank + c.kv_rank * H * (c.nope_head_dim + c.v_head_dim)
    return query + kv + H * c.v_head_dim * c.d_model


def ffn_parameters(c: ModelConfig, ffn_dim: int) -> int:
    return 3 * c.d_model * ffn_dim


def active_product_parameters(c: ModelConfig) -> dict[str, int]:
    """Weights that one token is multiplied by, by group. `mtp` is the modules' own plus the head again."""
    expert = ffn_parameters(c, c.expert_ffn_dim)
    router = c.d_model * c.num_experts
    moe = (c.experts_per_token + c.num_shared_experts) * expert + router
    norms = c.kv_rank + (c.q_rank or 0)
    attention = attention_parameters(c) - norms
    head = c.d_model * c.vocab_size
    return {"attention": c.num_layers * attention,
            "dense_ffn": c.num_dense_layers * ffn_parameters(c, c.dense_ffn_dim),
            "moe": c.num_moe_layers * moe,
            "head": head,
            "mtp": c.mtp_depth * (2 * c.d_model * c.d_model + attention + moe + head)}


def training_flops_per_token(c: ModelConfig, sequence_length: int, causal: bool = True) -> int:
    """Forward and backward products of one token, MTP modules included.

    Attention scores and values count half of the sequence when `causal`, all of it otherwise.
    """
    seen = sequence_length / 2 if causal else sequence_length
    scores = c.num_heads * (c.qk_head_dim + c.v_head_dim) * seen * (c.num_layers + c.mtp_depth)
    return int(6 * (sum(active_product_parameters(c).values()) + scores))
