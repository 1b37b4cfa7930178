"""Bytes on one device by group, for this program as laid out by XLA, from the config alone (no jax).

    state       masters, moments, averages: sharded over all devices that would otherwise have copies (ZeRO-1)
    working     weights that a step computes with: float32 copies of masters that are sharded further than their
                products; of a pipeline's stages, weights cast once a step to the type of their products
    gradients   of one micro-batch, and their sum
    kept        residuals of the backward pass, by the remat policy: per token, and per row that arrives at the experts
    passing     temporaries: the larger of one layer's products or of the logits, and the sums of attention's loops; in
                a pipeline the backward pass of one micro-batch's layer and the forward pass of another's
"""

import dataclasses
import math

from deepseek_jax.config import ModelConfig
from deepseek_jax.config.model import KERNEL_HEADS, UNROLLED_LAYERS
from deepseek_jax.scale.costs import (
    attended,
    attention_parameters,
    decodes_sparsely,
    indexer_products,
    norm_parameters,
    parameters,
)
from deepseek_jax.scale.hardware import Kernels
from deepseek_jax.scale.layout import Layout
from deepseek_jax.scale.traffic import rooms
from kernels_pallas.constants import BLOCK

FLOAT32 = 4
KINDS = {"bfloat16": 2, "float32": 4, "float64": 8}  # bytes per number
GROUPS = ("masters", "moments", "averages", "working", "gradients", "kept", "buffers", "experts' products", "passing")
# Display names of the groups.
LABELS = {"masters": "master weights, float32", "moments": "Adam's moments", "averages": "moving average of weights",
          "working": "weights gathered or cast for products", "gradients": "gradients, float32",
          "kept": "activations saved for the backward pass", "buffers": "buffers of the pipeline, pending gradients",
          "experts' products": "copies of rows for the experts' products", "passing": "temporaries of layers at "
          "work, or of logits"}


def rows_of_experts(c: ModelConfig, layout: Layout) -> tuple[int, int]:
    """(rows received by a device for one layer and micro-batch, rows of its experts' products).

    Without a capacity there is room for all tokens of all senders, so nothing is ever dropped. FP8's products require
    every expert's rows to begin at a multiple of the block size.
    """
    mesh, N, K = layout.mesh, layout.tokens // layout.mesh.tensor, c.experts_per_token
    align = BLOCK if c.fp8.enabled else 1
    E = c.num_experts // (mesh.nodes * mesh.local)
    even, arriving = N * K, [N, *rooms(c, layout).values()][-1]
    if mesh.devices == 1:
        return 0, -(-(N * K + E * (align - 1)) // align) * align
    choices = arriving * min(K, E)
    room = choices if mesh.capacity is None else min(choices, math.ceil(mesh.capacity * even))
    return arriving, (-(-(room + E * (align - 1)) // align) + 1) * align


def _width(c: ModelConfig) -> int:
    return KINDS[c.dtype]


def residuals_of_layer(c: ModelConfig, layout: Layout, moe: bool = True) -> float:
    """Bytes of the residuals of one layer and micro-batch."""
    N, width, D, H = layout.tokens, _width(c), c.d_model, c.num_heads / layout.mesh.tensor
    if c.remat == "full":
        return N * D * width
    small = 1 + 4 / BLOCK if c.fp8.enabled else width  # an FP8 value and its part of a scale
    output = 1.5 + 4 / BLOCK if c.fp8.enabled else width
    shared = c.num_shared_experts * c.expert_ffn_dim if moe else c.dense_ffn_dim
    latents = (c.q_rank or 0) + c.kv_rank + c.rope_head_dim
    arriving, rows = rows_of_experts(c, layout) if moe else (0, 0)
    travelled = D + math.ceil(D / BLOCK) if layout.mesh.dispatch_fp8 else D * width  # values, and exponents of scales
    kept = {"output": D * width, "latents": latents * width, "attention": H * (c.v_head_dim * output + 4),
            "swiglu_inputs": 2 * shared / layout.mesh.tensor * small, "router": c.num_experts * FLOAT32 * moe}
    kept_row = {"swiglu_inputs": rows * 2 * c.expert_ffn_dim * small, "dispatch": arriving * (
        travelled + 2 * FLOAT32 * c.experts_per_token)}  # ids and gates are sent too
    token = D * width + sum(size for name, size in kept.items() if name not in c.recomputed)
    of_rows = sum(size for name, size in kept_row.items() if name not in c.recomputed)
    if c.remat == "none":
        token += (2 * D + latents + H * (2 * c.qk_head_dim + c.v_head_dim) + shared / layout.mesh.tensor) * width
        of_rows += rows * (c.expert_ffn_dim + 2 * D) * width
        if c.index_topk is not None:  # queries and keys of the indexer, and the weights of its heads
            token += (c.index_heads + 1) * c.index_head_dim * width + c.index_heads * FLOAT32
    return N * token + of_rows


def parameters_per_device(c: ModelConfig, layout: Layout) -> dict[str, float]:
    """Parameters that a device of one pipeline rank computes with: {"experts", "others"}; all ranks share the two
    ends."""
    mesh, group = layout.mesh, parameters(c)
    owners = mesh.nodes * mesh.local
    routed = 3 * c.d_model * c.expert_ffn_dim * c.num_experts
    mtp_experts = c.mtp_depth * routed
    split = _split_by_tensor(c)
    others = sum(group.values()) - group["experts"] - mtp_experts - split + split / mesh.tensor
    pipeline = layout.pipeline
    if pipeline is None:
        return {"experts": (group["experts"] + mtp_experts) / owners, "others": others}
    layers = -(-c.num_moe_layers // pipeline.stages) * (2 if layout.schedule == "dualpipev" else 1)
    layer = attention_parameters(c) + 3 * c.d_model * c.expert_ffn_dim * c.num_shared_experts
    layer += c.d_model * (c.num_experts + 2)
    ends = group["embedding and head"] + group["dense ffn"] + c.num_dense_layers * attention_parameters(c)
    ends += group["mtp"] - mtp_experts
    return {"experts": layers * routed / owners, "others": layers * layer,
            "ends": ends / mesh.pipe + mtp_experts / owners, "routers": layers * c.d_model * c.num_experts}


def _split_by_tensor(c: ModelConfig) -> int:
    """Parameters that `tensor` splits: by heads, feed-forward width or vocabulary; not the projections to latents."""
    latents = (c.q_rank or 0) + c.kv_rank
    heads = attention_parameters(c) - norm_parameters(c) - indexer_products(c) - c.d_model * (latents + c.rope_head_dim)
    shared = 3 * c.d_model * c.num_shared_experts * c.expert_ffn_dim
    group = parameters(c)
    return ((c.num_layers + c.mtp_depth) * heads + (c.num_moe_layers + c.mtp_depth) * shared + group["dense ffn"]
            + group["embedding and head"])


def _masters(c: ModelConfig, layout: Layout) -> float:
    """Parameters whose masters a device has: sharded over pipe and all data axes, and over `tensor` where it splits."""
    mesh, split = layout.mesh, _split_by_tensor(c)
    return (sum(parameters(c).values()) - split + split / mesh.tensor) / (mesh.pipe * mesh.token_shards)


def state(c: ModelConfig, layout: Layout) -> dict[str, float]:
    """The training state, which is always in memory, and which a checkpoint copies."""
    mine = _masters(c, layout)
    moment = KINDS[layout.moment_dtype]
    return {"masters": FLOAT32 * mine, "moments": 2 * moment * mine, "averages": FLOAT32 * mine * layout.ema}


def bytes_per_device(c: ModelConfig, layout: Layout, kernels: Kernels, loss_chunk: int = 1024) -> dict[str, float]:
    """{group: bytes}, with the groups of GROUPS; their sum is the memory of a step. kernels: those of the machine."""
    mesh, held = layout.mesh, parameters_per_device(c, layout)
    group = state(c, layout)
    pipeline = layout.pipeline
    if pipeline is None:
        gathered = held["others"] * (mesh.token_shards > 1) + held["experts"] * (mesh.replica * mesh.context > 1)
        group["working"] = FLOAT32 * gathered
        # A layer's gradients are summed over devices as soon as they are computed.
        group["gradients"] = FLOAT32 * _masters(c, layout) * (1 + (layout.microbatches > 1))
        group["kept"] = (c.num_moe_layers + c.mtp_depth) * residuals_of_layer(c, layout)
        group["kept"] += c.num_dense_layers * residuals_of_layer(c, layout, moe=False)
        # After exchanges, XLA delays the kernels of weight gradients to the end of all layers that it compiles
        # together. If rows are kept anyway this takes as much as one layer: fitted to compiled programs.
        put_off = c.num_moe_layers - 1 if c.num_moe_layers <= UNROLLED_LAYERS else 0
        put_off = put_off if "dispatch" in c.recomputed else min(1, put_off)
        group["buffers"] = put_off * (kernels == "hopper" and mesh.devices > 1) * deferred_of_layer(c, layout)
    else:
        copies, stage, ends = layout.copies, held["experts"] + held["others"], held["ends"]
        layers, slots = -(-c.num_moe_layers // pipeline.stages), pipeline.slots
        prepared = FLOAT32 * held["routers"] + (1 if c.fp8.enabled else _width(c)) * (stage - held["routers"])
        group["working"] = copies * prepared + FLOAT32 * ends
        # A layer's gradients are added to their sums at once; XLA:TPU keeps the old sums in addition to the new ones.
        group["gradients"] = FLOAT32 * (copies * stage * (2 if kernels == "tpu" else 1) + ends)
        group["kept"] = slots.activations * layers * residuals_of_layer(c, layout)
        group["buffers"] = (slots.messages + 1) * layout.tokens * c.d_model * _width(c)
        if slots.deferred:
            group["buffers"] += (slots.deferred + 2) * layers * deferred_of_layer(c, layout)
    by_xla = kernels is None or (kernels == "hopper" and c.implementation == "xla" and not c.fp8.enabled)
    products = group["experts' products"] = product_copies(c, layout) if by_xla else 0.0
    if pipeline is None:
        # Exchanges have separate send and receive buffers.
        travelling = 2 * rows_of_experts(c, layout)[0] * c.d_model * _width(c)
        group["passing"] = max(0.0, passing(c, layout, loss_chunk) - products) + travelling
        group["passing"] += attention_sums(c, layout, kernels)
    else:
        again = residuals_of_layer(dataclasses.replace(c, remat="report"), layout) - residuals_of_layer(c, layout)
        # The layer whose backward pass is running has recomputed the arrays that were not kept.
        group["passing"] = overlapped(c, layout) + around(c, layout) + max(0.0, again)
    return group


def overlapped(c: ModelConfig, layout: Layout) -> float:
    """Bytes of an F&B cell that exist at once: of a MoE layer's forward pass and of another one's backward pass."""
    arriving, rows = rows_of_experts(c, layout)
    D, F, width = c.d_model, c.expert_ffn_dim, _width(c)
    if c.fp8.enabled:
        # Rows, quantized rows, results; gate, up, and quantized copies of these and of their product.
        forward = rows * ((2 * width + 1) * D + (2 * width + 3) * F)
    else:
        forward = rows * (2 * width * D + 3 * width * F)
    # Tokens from and to other devices: both passes send and receive, one exchange each at a time.
    travelling = 4 * arriving * D * width
    return forward + going_back(c, rows) + travelling + 2 * attention_at_work(c, layout)


def around(c: ModelConfig, layout: Layout) -> float:
    """Bytes of an F&B cell for attention around a ring, which has no kernel: keys and values of one part in either
    pass; in float32 the output's sums, and those of the gradients of queries, keys and values; received and sent
    latents, and their gradients."""
    if layout.mesh.parts == 1:
        return 0.0
    width, qk, v = _width(c), c.qk_head_dim, c.v_head_dim
    heads = c.num_heads / layout.mesh.tensor * (2 * (qk + v) * width + (v + qk + qk + v) * FLOAT32)
    return layout.tokens * (heads + (c.kv_rank + c.rope_head_dim) * (4 * width + 2 * FLOAT32))


def going_back(c: ModelConfig, rows: float) -> float:
    """Bytes of a MoE layer's rows in its backward pass."""
    D, F, width = c.d_model, c.expert_ffn_dim, _width(c)
    if c.fp8.enabled:
        # Rows and gradients in bfloat16, each quantized along both axes; in float32 the dequantized rows and the sum of
        # products; inside, value and gradient of gate, up and product in float32, and quantized.
        return rows * ((3 * width + 3 + 2 * FLOAT32) * D + (4 * FLOAT32 + 5) * F)
    return rows * ((3 * width + FLOAT32) * D + (6 * width + FLOAT32) * F)


def deferred_of_layer(c: ModelConfig, layout: Layout) -> float:
    """Bytes of a pending weight gradient: inputs and output gradients of the layer's products, in FP8 if those are;
    the router's in float32."""
    from_experts = rows_of_experts(c, layout)[1] * (2 * c.d_model + 3 * c.expert_ffn_dim)
    inputs = 2 * c.d_model + (2 * (c.q_rank or 0)) + 2 * c.kv_rank + c.num_heads * (
        c.qk_head_dim + c.nope_head_dim + 2 * c.v_head_dim)
    shared = 2 * c.d_model + 3 * c.num_shared_experts * c.expert_ffn_dim
    width = 1 + 4 / BLOCK if c.fp8.enabled else _width(c)
    router = FLOAT32 * layout.tokens * (c.d_model + c.num_experts)
    return (from_experts + layout.tokens * (inputs + shared)) * width + router


def product_copies(c: ModelConfig, layout: Layout) -> float:
    """Without kernels XLA:GPU computes experts as one masked product, with a copy of the rows for each expert.

    Three such copies of rows with the model's width exist at once, and five of rows with an expert's width: fitted to
    bfloat16 programs that were compiled before the kernel existed.
    """
    experts = c.num_experts // (layout.mesh.nodes * layout.mesh.local)
    return experts * rows_of_experts(c, layout)[1] * (3 * c.d_model + 5 * c.expert_ffn_dim) * _width(c)


def attention_sums(c: ModelConfig, layout: Layout, kernels: Kernels) -> float:
    """The float32 accumulators of attention's loops, forward and backward.

    XLA:GPU allocates those of all layers that it compiles together; layers of a loop share theirs. A kernel, for the
    heads of the published models, needs none; sparse attention and parts of sequences have none.
    """
    causal_squares = c.index_topk is None and layout.mesh.parts == 1
    heads = c.qk_head_dim, c.v_head_dim
    by_kernel = kernels and c.implementation == "auto" and c.dtype == "bfloat16" and heads == KERNEL_HEADS
    if by_kernel and causal_squares:
        return 0.0
    layers = sum(n if n <= UNROLLED_LAYERS else 1 for n in (c.num_dense_layers, c.num_moe_layers)) + c.mtp_depth
    heads = c.num_heads / layout.mesh.tensor
    return layers * layout.tokens * heads * 2 * (c.qk_head_dim + c.v_head_dim) * FLOAT32


def sparse_scores(c: ModelConfig, layout: Layout) -> float:
    """Bytes of the scores of one block of queries with all keys, in the backward pass of sparse attention; 0 if dense.

    The training form masks. Each head has scores, probabilities and the gradients of both in float32, and probabilities
    in the type of the products; each head of the indexer its scores and two gradients, and scores in that type.
    """
    if c.index_topk is None:
        return 0.0
    T, width = layout.sequence_length, _width(c)
    a_pair = c.num_heads / layout.mesh.tensor * (4 * FLOAT32 + width) + c.index_heads * (3 * FLOAT32 + width)
    return layout.tokens * min(c.attention_block, T) * a_pair


def passing(c: ModelConfig, layout: Layout, loss_chunk: int) -> float:
    """The largest temporaries: of the backward pass of one layer, or the logits of one chunk."""
    N, width = layout.tokens, _width(c)
    attention = attention_at_work(c, layout)
    rows = going_back(c, rows_of_experts(c, layout)[1])
    tensor = layout.mesh.tensor * layout.mesh.pipe
    logits = min(loss_chunk, N) * c.vocab_size / tensor * (2 * FLOAT32 + width)
    return max(attention + sparse_scores(c, layout), rows, logits)


def attention_at_work(c: ModelConfig, layout: Layout) -> float:
    """Bytes of one layer's queries, keys and values and the arrays derived from them, in one pass."""
    heads = layout.tokens * c.num_heads / layout.mesh.tensor
    return heads * (4 * c.qk_head_dim + 3 * c.v_head_dim) * _width(c)


def cache_row(c: ModelConfig, kind: str) -> int:
    """Bytes of one token's latent and rotated key in one layer of the cache.

    Args:
      kind: a type of numbers, or "fp8": FP8 latents with float32 scales, and bfloat16 keys.
    """
    if kind == "fp8":
        return c.kv_rank + FLOAT32 * -(-c.kv_rank // BLOCK) + 2 * c.rope_head_dim
    return (c.kv_rank + c.rope_head_dim) * KINDS[kind]


def index_row(c: ModelConfig, kind: str) -> int:
    """Bytes of one token's key of the indexer in one layer of the cache; 0 for a dense model."""
    if c.index_topk is None:
        return 0
    if kind == "fp8":
        return c.index_head_dim + FLOAT32 * -(-c.index_head_dim // BLOCK)
    return c.index_head_dim * KINDS[kind]


def cache_per_token(c: ModelConfig, kind: str, modules: int = 0) -> int:
    """Bytes of one token in the caches of all layers, and of `modules` MTP modules."""
    return (c.num_layers + modules) * (cache_row(c, kind) + index_row(c, kind))


def cache_read(c: ModelConfig, kind: str, context: float) -> float:
    """Bytes of the caches of all layers that decoding one token reads: for sparse attention the keys of the indexer,
    and the latents of the chosen tokens."""
    keys = index_row(c, kind) * context if decodes_sparsely(c) else 0
    return c.num_layers * (cache_row(c, kind) * attended(c, context) + keys)


def served_weights(c: ModelConfig, dtype: str, modules: int = 0) -> dict[str, float]:
    """Bytes of the weights that decoding computes with: {"experts": the routed ones, "embedding", "others"}.

    Norms, routers and routing biases are float32. "fp8": weights that released checkpoints have in FP8 take one byte
    per number, plus four per block of 128 x 128 for the scale (edges not counted); embedding and head stay bfloat16.

    Args:
      modules: MTP modules that draft.
    """
    group = parameters(c)
    wide = KINDS["bfloat16" if dtype == "fp8" else dtype]
    small = 1 + FLOAT32 / BLOCK**2 if dtype == "fp8" else wide
    table = c.vocab_size * c.d_model
    experts = small * group["experts"]
    others = small * (group["attention"] + group["shared experts"] + group["dense ffn"]) + wide * table
    others += FLOAT32 * (group["norms"] + group["router"] + c.num_moe_layers * c.num_experts * c.has_router_bias)
    if modules:
        routed = c.num_experts * 3 * c.d_model * c.expert_ffn_dim
        projection, router = 2 * c.d_model**2, c.d_model * c.num_experts
        norms = 5 * c.d_model + norm_parameters(c)
        products = group["mtp"] // c.mtp_depth - routed - projection - router - norms
        experts += modules * small * routed
        others += modules * (small * products + wide * projection
                             + FLOAT32 * (router + norms + c.num_experts * c.has_router_bias))
    return {"experts": experts, "embedding": wide * table, "others": others}
