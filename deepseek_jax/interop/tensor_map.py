"""The table of all tensors of a Hugging Face checkpoint and their places in our parameters, used in both directions.

A row is (their name, our path, transform, in FP8). Names are those of `DeepseekV3ForCausalLM`, `DeepseekV2ForCausalLM`
and `DeepseekV32ForCausalLM`; MTP module k is stored as layer num_layers + k - 1, with its own copies of embedding and
head. A row whose path a model does not have (no query rank, no indexer, no shared expert, softmax without bias) is
skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.checkpoint.arrays import transposed
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model import DeepSeekV3
from kernels_pallas.constants import BLOCK

NAMED = 4  # how many names an error lists
SCALE = "_scale_inv"  # suffix of the names of block scales
PIECE = 16 * 2**20  # bytes of a matrix that are converted at once


class Transform(NamedTuple):
    """Between their matrix [out, in] and ours [in axes..., out axes...].

    inputs: how many axes of ours their `in` became; None: stored the same way.
    rope: the rows that RoPE rotates: the last R of each "head", or of the "matrix". A checkpoint with `rope_interleave:
      false` has the first members of all pairs there, then the second ones; ours alternate.
    """

    inputs: int | None = None
    rope: str | None = None

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor, given ours."""
        if self.inputs is None:
            return tuple(shape)
        return math.prod(shape[self.inputs:]), math.prod(shape[:self.inputs])

    def unit(self, shape: tuple[int, ...]) -> int:
        """The number of their rows that belong together: a piece of complete units is a piece of ours along `axis`."""
        return 1 if self.inputs is None else math.prod(shape[self.inputs + 1:])

    @property
    def axis(self) -> int:
        """The axis of ours that corresponds to pieces of their rows."""
        return self.inputs or 0

    def piece_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a piece of ours, for `reshape`: of any length along `axis`."""
        return *shape[:self.axis], -1, *shape[self.axis + 1:]

    def to_ours(self, theirs: np.ndarray, shape: tuple[int, ...], halves: int = 0) -> np.ndarray:
        """A piece of their rows as a piece of ours. `halves`: rotary dimension of a half-split checkpoint, else 0."""
        if self.inputs is None:
            return theirs
        if halves and self.rope:
            theirs = self._rotary(theirs, shape, np.arange(halves).reshape(2, -1).T.reshape(-1))
        return transposed(theirs).reshape(self.piece_shape(shape))

    def to_theirs(self, ours: np.ndarray, shape: tuple[int, ...], halves: int = 0) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.inputs is None:
            return ours
        theirs = transposed(ours.reshape(math.prod(shape[:self.inputs]), -1))
        if halves and self.rope:
            theirs = self._rotary(theirs, shape, np.arange(halves).reshape(-1, 2).T.reshape(-1))
        return theirs

    def _rotary(self, theirs, shape, order):
        """Reorders the rows that RoPE rotates. A piece of a "matrix" must hold its last rows."""
        rows = self.unit(shape) if self.rope == "head" else len(theirs)
        row = np.arange(rows)
        row[rows - len(order):] = rows - len(order) + order
        return theirs.reshape(-1, rows, theirs.shape[1])[:, row].reshape(theirs.shape)


SAME, LINEAR, HEADS_IN = Transform(), Transform(1), Transform(2)
QUERY, KEY = Transform(1, "head"), Transform(1, "matrix")

# {block}: any layer. {moe}: a MoE layer. {dense}: a dense one. {mtp}: an MTP module. {bias}: the router's collection.
LAYER = "model.layers.{layer}."
TABLE = (
    # their name, our path, transform, kept in FP8 by the released checkpoints
    ("model.embed_tokens.weight", "params/embedding", SAME, False),
    ("model.norm.weight", "params/norm/scale", SAME, False),
    ("lm_head.weight", "params/head", LINEAR, False),
    (LAYER + "input_layernorm.weight", "{block}/attention_norm/scale", SAME, False),
    (LAYER + "post_attention_layernorm.weight", "{block}/ffn_norm/scale", SAME, False),
    (LAYER + "self_attn.q_proj.weight", "{block}/attention/q", QUERY, True),
    (LAYER + "self_attn.q_a_proj.weight", "{block}/attention/q_a", LINEAR, True),
    (LAYER + "self_attn.q_a_layernorm.weight", "{block}/attention/q_norm/scale", SAME, False),
    (LAYER + "self_attn.q_b_proj.weight", "{block}/attention/q_b", QUERY, True),
    (LAYER + "self_attn.kv_a_proj_with_mqa.weight", "{block}/attention/kv_a", KEY, True),
    (LAYER + "self_attn.kv_a_layernorm.weight", "{block}/attention/kv_norm/scale", SAME, False),
    (LAYER + "self_attn.kv_b_proj.weight", "{block}/attention/kv_b", LINEAR, True),
    (LAYER + "self_attn.o_proj.weight", "{block}/attention/o", HEADS_IN, True),
    (LAYER + "self_attn.indexer.wq_b.weight", "{block}/attention/indexer/wq_b", LINEAR, True),
    (LAYER + "self_attn.indexer.wk.weight", "{block}/attention/indexer/wk", LINEAR, True),
    (LAYER + "self_attn.indexer.k_norm.weight", "{block}/attention/indexer/k_norm/scale", SAME, False),
    (LAYER + "self_attn.indexer.k_norm.bias", "{block}/attention/indexer/k_norm/bias", SAME, False),
    (LAYER + "self_attn.indexer.weights_proj.weight", "{block}/attention/indexer/weights_proj", LINEAR, False),
    (LAYER + "mlp.gate_proj.weight", "{dense}/ffn/gate", LINEAR, True),
    (LAYER + "mlp.up_proj.weight", "{dense}/ffn/up", LINEAR, True),
    (LAYER + "mlp.down_proj.weight", "{dense}/ffn/down", LINEAR, True),
    (LAYER + "mlp.gate.weight", "{moe}/ffn/router/weight", LINEAR, False),
    (LAYER + "mlp.gate.e_score_correction_bias", "{bias}", SAME, False),
    (LAYER + "mlp.experts.{expert}.gate_proj.weight", "{moe}/ffn/gate", LINEAR, True),
    (LAYER + "mlp.experts.{expert}.up_proj.weight", "{moe}/ffn/up", LINEAR, True),
    (LAYER + "mlp.experts.{expert}.down_proj.weight", "{moe}/ffn/down", LINEAR, True),
    (LAYER + "mlp.shared_experts.gate_proj.weight", "{moe}/ffn/shared/gate", LINEAR, True),
    (LAYER + "mlp.shared_experts.up_proj.weight", "{moe}/ffn/shared/up", LINEAR, True),
    (LAYER + "mlp.shared_experts.down_proj.weight", "{moe}/ffn/shared/down", LINEAR, True),
    # Embedding half first, there as here: eh_proj(concat[enorm(embedding), hnorm(hidden)]).
    (LAYER + "eh_proj.weight", "{mtp}/projection", LINEAR, False),
    (LAYER + "enorm.weight", "{mtp}/embedding_norm/scale", SAME, False),
    (LAYER + "hnorm.weight", "{mtp}/hidden_norm/scale", SAME, False),
    (LAYER + "shared_head.norm.weight", "{mtp}/norm/scale", SAME, False),
)
# An MTP module's copies of the weights that it shares with the main model. Optional; checked to be equal.
COPIES = (
    (LAYER + "embed_tokens.weight", "model.embed_tokens.weight"),
    (LAYER + "shared_head.head.weight", "lm_head.weight"),
)


class Entry(NamedTuple):
    """One tensor of theirs and the slice of our leaf that it corresponds to."""

    name: str
    path: str  # of our leaf, such as "params/layers/ffn/gate"
    index: tuple[int, ...]  # (layer, expert), (layer,), ...: the slice
    slice_shape: tuple[int, ...]
    transform: Transform
    fp8: bool
    copy_of: str | None = None  # their name for the original

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of their tensor."""
        return self.transform.their_shape(self.slice_shape)

    def steps(self, itemsize: int) -> int:
        """Length along our `transform.axis` of a piece of about PIECE bytes: complete blocks of FP8 scales."""
        rows, unit = self.shape[0], self.transform.unit(self.slice_shape)
        least = math.lcm(unit, BLOCK)
        step = max(PIECE // max(math.prod(self.shape[1:]) * itemsize * least, 1), 1) * least
        whole = step >= rows or self.transform.rope == "matrix"
        return self.slice_shape[self.transform.axis] if whole else step // unit


def leaves(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of every variable, "params/..." and "router/...", as the model itself declares them."""
    return _leaves(_plain(cfg))


def _plain(cfg):
    """The config without settings that change no name and no shape."""
    return dataclasses.replace(cfg, dtype="float32", remat="none", attention_block=8, index_warmup=False,
                               implementation="auto")


@functools.lru_cache(maxsize=8)
def _leaves(cfg):
    model = DeepSeekV3(cfg)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    tree = jax.eval_shape(lambda key, tokens: model.init(key, tokens, logits=False), jax.random.key(0), tokens)
    named = jax.tree_util.tree_flatten_with_path(dict(tree))[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in named}


def entries(cfg: ModelConfig) -> dict[str, Entry]:
    """{their name: Entry}, in the order of the layers. Raises ConfigError if the table leaves a parameter out."""
    return _entries(_plain(cfg))


@functools.lru_cache(maxsize=8)
def _entries(cfg):
    shapes = leaves(cfg)
    found = {}
    for layer in (None, *range(cfg.num_layers + cfg.mtp_depth)):
        roots = _roots(cfg, layer)
        for name, path, transform, fp8 in TABLE:
            kind = path.split("/")[0].strip("{}")
            path, stack = _place(path, roots.get(kind))
            if kind in roots and path in shapes:
                found |= _tensors(name, layer, path, stack, shapes[path], transform, fp8)
        if layer is not None and layer >= cfg.num_layers:
            for name, original in COPIES:
                name = name.format(layer=layer)
                found[name] = found[original]._replace(name=name, copy_of=original)
    filled = {entry.path for entry in found.values()}
    if filled != shapes.keys():
        raise ConfigError(f"this model has parameters that the published format has no name for: "
                          f"{listed(shapes.keys() - filled)}.")
    return found


def _roots(cfg, layer):
    """Values of the table's placeholders at `layer`: {kind: (path, index of the stack)}."""
    if layer is None:
        return {"params": ("params", ())}
    if layer < cfg.num_dense_layers:
        here = ("params/dense_layers", (layer,))
        return {"block": here, "dense": here}
    if layer < cfg.num_layers:
        index = (layer - cfg.num_dense_layers,)
        here = ("params/layers", index)
        return {"block": here, "moe": here, "bias": ("router/bias", index)}
    module = f"params/mtp_{layer - cfg.num_layers + 1}"
    here = (f"{module}/block", ())
    return {"block": here, "moe": here, "mtp": (module, ()), "bias": ("router/mtp_bias", (layer - cfg.num_layers,))}


def _place(path, root):
    """Our path with its placeholder filled in, and the index of the stack."""
    if root is None:
        return path, ()
    return "/".join([root[0], *path.split("/")[1:]]), root[1]


def _tensors(name, layer, path, stack, shape, transform, fp8):
    """The entries of one row at one layer: one, or one per expert."""
    if "{expert}" not in name:
        name = name.format(layer=layer)
        return {name: Entry(name, path, stack, shape[len(stack):], transform, fp8)}
    named = {e: name.format(layer=layer, expert=e) for e in range(shape[len(stack)])}
    return {n: Entry(n, path, (*stack, e), shape[len(stack) + 1:], transform, fp8) for e, n in named.items()}


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
