"""Parameters and FLOPs, counted from the config alone (no jax).

Products only: a product of an [M, K] by a [K, N] matrix is 2 M K N operations; norms, softmax and rotations do not
count, as usual. Backward is twice forward: once for the input's gradient, once for the weight's.
"""

from deepseek_jax.config import ModelConfig


def norm_parameters(c: ModelConfig) -> int:
    """Scales (and a bias) of the norms inside attention: of both latents, and of the indexer's keys."""
    return c.kv_rank + (c.q_rank or 0) + (0 if c.index_topk is None else 2 * c.index_head_dim)


def indexer_products(c: ModelConfig) -> int:
    """Weights of the indexer of one layer, without its norm; 0 for a dense model."""
    if c.index_topk is None or c.q_rank is None:
        return 0
    return c.index_heads * (c.q_rank * c.index_head_dim + c.d_model) + c.d_model * c.index_head_dim


def attention_parameters(c: ModelConfig) -> int:
    """MLA of one layer, with its norms and its indexer."""
    H, qk = c.num_heads, c.qk_head_dim
    query = c.d_model * H * qk if c.q_rank is None else c.q_rank * (c.d_model + 1 + H * qk)
    kv = c.d_model * (c.kv_rank + c.rope_head_dim) + c.kv_rank + c.kv_rank * H * (c.nope_head_dim + c.v_head_dim)
    indexer = indexer_products(c) + norm_parameters(c) - c.kv_rank - (c.q_rank or 0)
    return query + kv + H * c.v_head_dim * c.d_model + indexer


def ffn_parameters(c: ModelConfig, ffn_dim: int) -> int:
    """Parameters of gate, up and down [d_model, ffn_dim] of one feed-forward network."""
    return 3 * c.d_model * ffn_dim


def parameters(c: ModelConfig) -> dict[str, int]:
    """Trained parameters by group; the groups are those of `parallel.capacity`.

    The routing biases are data, not parameters; `conventions` counts them where the published figures do.
    """
    latents = norm_parameters(c)
    attention = attention_parameters(c) - latents
    expert = ffn_parameters(c, c.expert_ffn_dim)
    router, moe = c.d_model * c.num_experts, (c.num_experts + c.num_shared_experts) * expert
    block_norms = 2 * c.d_model + latents
    mtp = 2 * c.d_model * c.d_model + attention + router + moe + block_norms + 3 * c.d_model
    return {"mtp": c.mtp_depth * mtp,
            "experts": c.num_moe_layers * c.num_experts * expert,
            "shared experts": c.num_moe_layers * c.num_shared_experts * expert,
            "router": c.num_moe_layers * router,
            "norms": c.num_layers * block_norms + c.d_model,
            "attention": c.num_layers * attention,
            "dense ffn": c.num_dense_layers * ffn_parameters(c, c.dense_ffn_dim),
            "embedding and head": 2 * c.vocab_size * c.d_model}


def conventions(c: ModelConfig) -> dict[str, int]:
    """The number of parameters by each counting convention in use, including routing biases.

    A token uses only one row of the embedding, so some do not count the table as active; it is multiplied by the
    complete head. DeepSeek-V3's "671B total, 37B activated" are the first row and, rounded, any of the three active
    ones.
    """
    group = parameters(c)
    bias, table = c.num_experts * c.has_router_bias, c.vocab_size * c.d_model
    main = sum(group.values()) - group["mtp"] + c.num_moe_layers * bias
    mtp = group["mtp"] + c.mtp_depth * bias
    idle = c.num_moe_layers * (c.num_experts - c.experts_per_token) * ffn_parameters(c, c.expert_ffn_dim)
    return {"main model": main,
            "main model and MTP": main + mtp,
            "checkpoint, MTP with copies of embedding and head": main + mtp + c.mtp_depth * 2 * table,
            "active per token": main - idle,
            "active, without the input embedding": main - idle - table,
            "active, without embedding and head": main - idle - 2 * table}


def active_product_parameters(c: ModelConfig) -> dict[str, int]:
    """Weights that one token is multiplied by, by group. `mtp`: the modules' weights plus the head again."""
    expert = ffn_parameters(c, c.expert_ffn_dim)
    router = c.d_model * c.num_experts
    moe = (c.experts_per_token + c.num_shared_experts) * expert + router
    norms = norm_parameters(c)
    attention = attention_parameters(c) - norms
    head = c.d_model * c.vocab_size
    return {"attention": c.num_layers * attention,
            "dense_ffn": c.num_dense_layers * ffn_parameters(c, c.dense_ffn_dim),
            "moe": c.num_moe_layers * moe,
            "head": head,
            "mtp": c.mtp_depth * (2 * c.d_model * c.d_model + attention + moe + head)}


def score_products(c: ModelConfig, sequence_length: int, causal: bool = True) -> float:
    """Multiplications of one token with keys and values, of one layer: half of the sequence when `causal`.

    For sparse attention: those with the chosen tokens, and those of the indexer with all tokens. This is the useful
    work; the training form, which masks, computes more.
    """
    seen = sequence_length / 2 if causal else sequence_length
    if c.index_topk is None:
        return c.num_heads * (c.qk_head_dim + c.v_head_dim) * seen
    attended = seen if c.index_warmup else min(seen, c.index_topk)
    return (c.num_heads * (c.qk_head_dim + c.v_head_dim) * attended
            + c.index_heads * (c.index_head_dim + 1) * seen)


def training_flops_per_token(c: ModelConfig, sequence_length: int, causal: bool = True, frozen: bool = False) -> int:
    """Forward and backward products of one token, MTP modules included.

    Attention scores and values count half of the sequence when `causal`, all of it otherwise. `frozen` weights, with
    adapters whose own products do not count, have no gradient.
    """
    scores = score_products(c, sequence_length, causal) * (c.num_layers + c.mtp_depth)
    return int((4 if frozen else 6) * sum(active_product_parameters(c).values()) + 6 * scores)


def latent_core_products(c: ModelConfig, context: float) -> float:
    """Multiplications of one token with the `context` latents of a cache, in one layer: absorbed, as in decoding.

    For sparse attention: those with the chosen latents, and those of the indexer with all keys.
    """
    core = c.num_heads * (2 * c.kv_rank + c.rope_head_dim) * attended(c, context)
    return core + (c.index_heads * (c.index_head_dim + 1) * context if decodes_sparsely(c) else 0)


def decodes_sparsely(c: ModelConfig) -> bool:
    """Whether decoding selects tokens: not during the warm-up of the indexer."""
    return c.index_topk is not None and not c.index_warmup


def attended(c: ModelConfig, context: float) -> float:
    """The number of latents, of `context` in the cache, that decoding one token reads in a layer."""
    return min(context, c.index_topk) if c.index_topk is not None and decodes_sparsely(c) else context


def _recomputed(c: ModelConfig, up: float, weights: dict[str, float]) -> dict[str, float]:
    """Multiplications of one token that the backward pass repeats in one layer, by part, for the names in c.remat."""
    of_name = {"mla_up": {"attention": up},
               "latents": {"attention": c.d_model * ((c.q_rank or 0) + c.kv_rank + c.rope_head_dim)},
               "output": {"attention": c.num_heads * c.v_head_dim * c.d_model},
               "attention": {"scores": weights["scores"]}, "router": {"shared": c.d_model * c.num_experts},
               "swiglu_inputs": {"shared": 2 * c.d_model * c.num_shared_experts * c.expert_ffn_dim,
                                 "experts": weights["experts"] * 2 / 3, "dense": weights["dense"] * 2 / 3}}
    again: dict[str, float] = {}
    for name in sorted(c.recomputed & of_name.keys()):
        for part, n in of_name[name].items():
            again[part] = again.get(part, 0) + n
    return again


def layer_flops(c: ModelConfig, sequence_length: int, parts: int = 1) -> dict[str, dict[str, float]]:
    """Operations of one token in one layer, by part and pass; attention is causal.

    Args:
      parts: of a sequence, on as many devices. Each computes the keys and values of all parts, in both passes.

    Returns:
      {"attention", "scores", "shared", "experts", "dense"}: {"forward", "input", "weight", "again"}: for the forward
      pass, for the gradients of inputs and of weights, and for the recomputation in the backward pass under c.remat. A
      MoE layer is the first four, a dense one the first two and the last.
    """
    latents = norm_parameters(c)
    expert = ffn_parameters(c, c.expert_ffn_dim)
    weights = {"attention": attention_parameters(c) - latents, "scores": score_products(c, sequence_length),
               "shared": c.num_shared_experts * expert + c.d_model * c.num_experts,
               "experts": c.experts_per_token * expert, "dense": ffn_parameters(c, c.dense_ffn_dim)}
    up = c.num_heads * (c.qk_head_dim * (c.q_rank or c.d_model) + c.kv_rank * (c.nope_head_dim + c.v_head_dim))
    again = weights if c.remat == "full" else _recomputed(c, up, weights)
    table = {}
    for part, n in weights.items():
        table[part] = {"forward": 2 * n, "input": 2 * n, "weight": 2 * n, "again": 2 * again.get(part, 0)}
    # The core has no weights; its backward pass recomputes the scores, as in every blockwise attention.
    table["scores"] |= {"input": 4 * weights["scores"], "weight": 0,
                        "again": 2 * c.num_heads * c.qk_head_dim * sequence_length / 2 + table["scores"]["again"]}
    if parts > 1:
        keys, once = c.kv_rank * c.num_heads * (c.nope_head_dim + c.v_head_dim), "mla_up" in c.recomputed
        runs = 1 + ("attention" in c.recomputed)
        for what in ("forward", "input", "weight"):
            table["attention"][what] += 2 * (parts - 1) * keys
        table["attention"]["again"] += 2 * (runs * parts - once) * keys
    return table
