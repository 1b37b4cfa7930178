"""DeepSeekMoE (report section 2.1.2): many small routed experts, a shared one that every token visits.

    h = shared(u) + sum over chosen experts of gate_i * FFN_i(u)

No token is ever dropped. Choices are sorted by expert into rows, every expert's rows are multiplied by its weights in
one `grouped_matmul`, and the results are gathered back. Gathers go both ways: the gradient of a permutation is the
inverse permutation, not a scatter.
"""

import functools
import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deepseek_jax import fp8
from deepseek_jax.config import MeshConfig, ModelConfig
from deepseek_jax.model import router as routing
from deepseek_jax.model.layers import FFN, matmul, saved, swiglu, transpose, weight, wide
from deepseek_jax.parallel.dispatch import PLAIN, Wire, to_experts
from deepseek_jax.parallel.mesh import constrain, data_shards, size_here
from kernels_pallas import api


class Plan(NamedTuple):
    """Where each choice goes. R rows hold the N*K choices sorted by expert; groups start at multiples of `align`."""

    choice_R: jax.Array  # int32: the choice n * K + k in this row; N * K where the row is empty
    row_NK: jax.Array  # int32: the row of each choice
    sizes_E: jax.Array  # int32: rows of each expert, empty ones included: multiples of `align`


def plan(chosen_NK, num_experts, align=1, even=False) -> Plan:
    """Sorts choices by expert, tokens in order inside each; pads every expert's group to a multiple of `align` rows.

    `even` gives all experts the same number of rows, the mean load plus `align`, unless one of them needs more.
    """
    N, K = chosen_NK.shape
    room = _up(_up(N * K, num_experts) // num_experts + align - 1, align)
    rows = num_experts * room if even else _up(N * K + num_experts * (align - 1), align)  # enough for any routing
    order = jnp.argsort(chosen_NK.reshape(-1), stable=True).astype(jnp.int32)
    counts_E = routing.count_choices(chosen_NK, num_experts)
    sizes_E = _up(counts_E, align)
    if even:
        sizes_E = jnp.where(counts_E.max() <= room, room, sizes_E)
    start_E, end_E = jnp.cumsum(counts_E) - counts_E, jnp.cumsum(sizes_E)
    row = jnp.arange(rows, dtype=jnp.int32)
    expert_R = jnp.minimum(jnp.searchsorted(end_E, row, side="right"), num_experts - 1).astype(jnp.int32)
    rank_R = row - (end_E - sizes_E)[expert_R]
    filled_R = rank_R < counts_E[expert_R]
    choice_R = jnp.where(filled_R, order[jnp.where(filled_R, start_E[expert_R] + rank_R, 0)], N * K)
    # Position p of the sorted order sits in the row that its expert's padded group start says.
    shift_E = (end_E - sizes_E) - start_E
    place = jnp.argsort(order).astype(jnp.int32)
    row_NK = place.reshape(N, K) + shift_E[chosen_NK].astype(jnp.int32)
    return Plan(choice_R, row_NK, sizes_E.astype(jnp.int32))


def _up(n, multiple):
    """The next multiple."""
    return -(-n // multiple) * multiple


def _rows(x_RD, index_N):
    """x[index], with zeros where the index lies past the end."""
    return x_RD.at[index_N].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_rows(x_ND, plan):
    """Copies each token into the rows of its choices; empty rows are zero. [N, D] -> [R, D]."""
    return _rows(x_ND, plan.choice_R // plan.row_NK.shape[1])


def _to_rows_bwd(plan, dx_RD):
    dtype = wide(dx_RD.dtype)
    # One term a choice instead of a sum over an [N, K, D] array: XLA fuses the gathers.
    dx_ND = sum(dx_RD[row_N].astype(dtype) for row_N in plan.row_NK.T)
    return dx_ND.astype(dx_RD.dtype), None


to_rows.defvjp(lambda x_ND, plan: (to_rows(x_ND, plan), plan), _to_rows_bwd)


@jax.custom_vjp
def combine(y_RD, gates_NK, plan):
    """sum over k of gates[n, k] * y[row of choice k], accumulated in float32. [R, D] -> [N, D]."""
    dtype = wide(y_RD.dtype)
    terms = (gate_N[:, None].astype(dtype) * y_RD[row_N] for gate_N, row_N in zip(gates_NK.T, plan.row_NK.T))
    return sum(terms).astype(y_RD.dtype)


def _combine_bwd(kept, dy_ND):
    y_RD, gates_NK, plan = kept
    dtype = wide(y_RD.dtype)
    gate_R1 = _rows(gates_NK.reshape(-1, 1), plan.choice_R).astype(dtype)
    dy_RD = _rows(dy_ND, plan.choice_R // gates_NK.shape[1]) * gate_R1
    dgates_NK = jnp.stack([(dy_ND.astype(dtype) * y_RD[row_N]).sum(axis=1) for row_N in plan.row_NK.T], axis=1)
    return dy_RD.astype(y_RD.dtype), dgates_NK.astype(gates_NK.dtype), None


combine.defvjp(lambda y_RD, gates_NK, plan: (combine(y_RD, gates_NK, plan), (y_RD, gates_NK, plan)), _combine_bwd)


def row_alignment(implementation, rows, num_experts):
    """Rows that an expert's group must be a multiple of: up to half of the mean load, so that 1.5 of it is room."""
    if implementation != "cpu":
        return 1
    half = max(rows // num_experts // 2, 1)
    return max(1 << (half.bit_length() - 1), 8)


def _reference(x_RD, w_EDF, sizes_E, align):
    """Every row by every expert, all but its own masked away. The oracle: E times the work."""
    row_R1 = jnp.arange(x_RD.shape[0])[:, None]
    end_1E = jnp.cumsum(sizes_E)[None]
    mine_RE = (row_R1 < end_1E) & (row_R1 >= end_1E - sizes_E[None])
    y_ERF = jnp.einsum("RD,EDF->ERF", x_RD, w_EDF.astype(x_RD.dtype), preferred_element_type=wide(x_RD.dtype))
    return jnp.einsum("ERF,RE->RF", y_ERF, mine_RE.astype(y_ERF.dtype)).astype(x_RD.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _ragged(x_RD, w_EDF, sizes_E, align):
    return lax.ragged_dot(x_RD, w_EDF.astype(x_RD.dtype), sizes_E,
                          preferred_element_type=wide(x_RD.dtype)).astype(x_RD.dtype)


def _ragged_bwd(align, kept, dy_RF):
    x_RD, w_EDF, sizes_E = kept
    w_EFD = jnp.swapaxes(w_EDF, 1, 2).astype(dy_RF.dtype)
    dx_RD = lax.ragged_dot(dy_RF, w_EFD, sizes_E, preferred_element_type=wide(dy_RF.dtype))
    over_rows = lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0],
                                              rhs_group_dimensions=[])
    dw_EDF = lax.ragged_dot_general(x_RD, dy_RF, sizes_E, over_rows, preferred_element_type=wide(dy_RF.dtype))
    return dx_RD.astype(x_RD.dtype), dw_EDF.astype(w_EDF.dtype), None


_ragged.defvjp(lambda x_RD, w_EDF, sizes_E, align: (_ragged(x_RD, w_EDF, sizes_E, align), (x_RD, w_EDF, sizes_E)),
               _ragged_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batched(x_RD, w_EDF, sizes_E, align):
    """A batched product over experts where all have the same number of rows, otherwise over equal tiles of rows.

    XLA:CPU has no fast ragged product. Tiles are exact and indifferent to skew, each with a copy of its expert's
    weights; the first form needs no copy, and nearly balanced loads are what training has.
    """
    def product(x_TMD, w_TDF, expert_T):
        return matmul(x_TMD, w_TDF).reshape(x_RD.shape[0], -1)

    return _by_expert_or_tile(product, sizes_E, align, (x_RD,), w_EDF.astype(x_RD.dtype))


def _batched_fwd(x_RD, w_EDF, sizes_E, align):
    return _batched(x_RD, w_EDF, sizes_E, align), (x_RD, w_EDF, sizes_E)


def _batched_bwd(align, kept, dy_RF):
    x_RD, w_EDF, sizes_E = kept

    def product(x_TMD, dy_TMF, w_TFD, expert_T):
        dw_TDF = matmul(transpose(x_TMD), dy_TMF, wide(x_RD.dtype))
        if expert_T is not None:
            dw_TDF = jax.ops.segment_sum(dw_TDF, expert_T, w_EDF.shape[0], indices_are_sorted=True)
        return matmul(dy_TMF, w_TFD, x_RD.dtype).reshape(x_RD.shape), dw_TDF

    dx_RD, dw_EDF = _by_expert_or_tile(product, sizes_E, align, (x_RD, dy_RF), transpose(w_EDF.astype(dy_RF.dtype)))
    return dx_RD, dw_EDF.astype(w_EDF.dtype), None


_batched.defvjp(_batched_fwd, _batched_bwd)


def _by_expert_or_tile(product, sizes_E, align, rows, w_EXY):
    """product(*rows [T, M, ...], weights [T, ...], expert_T): T experts if their groups are equal, else T tiles."""
    E, R = len(sizes_E), rows[0].shape[0]

    def cut(count):
        return [a.reshape(count, -1, a.shape[1]) for a in rows]

    def by_tile():
        expert_T = _expert_of_tile(sizes_E, align, R // align)
        return product(*cut(R // align), jnp.asarray(w_EXY)[expert_T], expert_T)

    if R % E:
        return by_tile()
    return lax.cond(jnp.all(sizes_E == R // E), lambda: product(*cut(E), w_EXY, None), by_tile)


def _expert_of_tile(sizes_E, align, tiles):
    """Tiles past the last group go to the last expert: their rows are zero, and so are their products."""
    end_E = jnp.cumsum(sizes_E) // align
    return jnp.minimum(jnp.searchsorted(end_E, jnp.arange(tiles), side="right"), sizes_E.shape[0] - 1)


IMPLEMENTATIONS = {"reference": _reference, "cpu": _batched, "ragged": _ragged}


def implementation_here() -> str:
    """What `auto` means on the devices a program is made for: tiles on a CPU, XLA's ragged product elsewhere."""
    return "cpu" if api.device_here().platform == "cpu" else "ragged"


def grouped_matmul(x_RD, w_EDF, sizes_E, align, implementation="auto"):
    """Multiplies each expert's rows by its weights: y[r] = x[r] @ w[expert of r].

    Args:
      x_RD: rows sorted by expert, empty rows zero, as `to_rows` lays them out.
      w_EDF: the experts' weights, float32 masters: the product runs in x's dtype, their gradient stays float32.
      sizes_E: int32, rows of each expert, multiples of `align`; rows past their sum give zero.
      align: what the plan's groups are aligned to. "cpu" makes tiles of that many rows.
      implementation: "reference", "cpu", "ragged" or "auto".
    Returns:
      [R, F] in the dtype of x, accumulated in float32.
    """
    name = implementation_here() if implementation == "auto" else implementation
    return IMPLEMENTATIONS[name](x_RD, w_EDF, sizes_E, align)


def routed_experts(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD, implementation="auto", recipe=None):
    """sum over k of gates[n, k] * FFN of chosen[n, k], [N, D]: exact for every routing, however skewed.

    `recipe`, where it is enabled: the products run in FP8 (and `implementation` is the recipe's).
    """
    name, align = _how(implementation, recipe, chosen_NK.size, gate_EDF.shape[0])
    p = plan(chosen_NK, gate_EDF.shape[0], align, even=align > 1 and name == "cpu")
    return _ffn(x_ND, gates_NK, p, gate_EDF, up_EDF, down_EFD, align, name, recipe)


def _how(implementation, recipe, rows, num_experts):
    """The implementation of the products, and what groups of rows are aligned to."""
    name = implementation_here() if implementation == "auto" else implementation
    if recipe is not None and recipe.enabled:
        return name, fp8.GROUP_ALIGNMENT
    return name, row_alignment(name, rows, num_experts)


def _ffn(x_ND, gates_NK, p: Plan, gate_EDF, up_EDF, down_EFD, align, name, recipe):
    if recipe is not None and recipe.enabled:
        weights = (jnp.swapaxes(w, 1, 2) for w in (gate_EDF, up_EDF, down_EFD))
        return combine(fp8.swiglu_ffn(to_rows(x_ND, p), *weights, recipe, p.sizes_E), gates_NK, p)
    product = functools.partial(grouped_matmul, sizes_E=p.sizes_E, align=align, implementation=name)
    x_RD = to_rows(x_ND, p)
    gate_RF, up_RF = saved(product(x_RD, gate_EDF)), saved(product(x_RD, up_EDF))
    y_RD = product(swiglu(gate_RF, up_RF), down_EFD)
    return combine(y_RD, gates_NK, p)


def resident_experts(x_ND, id_NK, gates_NK, weights, even, capacity=None, implementation="auto", recipe=None):
    """The gated sum over those of a row's experts that live here, and how many choices that was.

    Args:
      x_ND: rows that were sent here, whatever number of them came.
      id_NK: int32, counted from 1 among the experts here; 0: none.
      weights: (gate_EDF, up_EDF, down_EFD) of the experts here.
      even: choices that come if all loads are even: tiles are made for it.
      capacity: of `even`, what there is room for; later choices are dropped. None: for all that could come.
    """
    E = weights[0].shape[0]
    name, align = _how(implementation, recipe, even, E)
    # A row has at most as many choices here as experts live here: those first, the rest cut off.
    K = min(id_NK.shape[1], E)
    order_NK = jnp.argsort(id_NK == 0, axis=1, stable=True)[:, :K]
    id_NK, gates_NK = (jnp.take_along_axis(x, order_NK, axis=1) for x in (id_NK, gates_NK))
    room = id_NK.size if capacity is None else min(id_NK.size, math.ceil(capacity * even))
    p, computed = _without_strangers(plan(jnp.where(id_NK > 0, id_NK - 1, E), E + 1, align), id_NK, align,
                                     room + E * (align - 1))
    return _ffn(x_ND, gates_NK, p, *weights, align, name, recipe), computed


def _without_strangers(p: Plan, id_NK, align, room):
    """Cuts a plan, whose last group holds what has no expert here, down to `room` rows.

    What is cut off points at the last row, which stays empty: zero goes in and zero comes out.
    """
    rows = (-(-room // align) + 1) * align
    end_E = jnp.minimum(jnp.cumsum(p.sizes_E[:-1]), rows - align)
    choice_R = jnp.pad(p.choice_R, (0, max(0, rows - p.choice_R.size)), constant_values=id_NK.size)[:rows]
    choice_R = jnp.where(jnp.arange(rows) < end_E[-1], choice_R, id_NK.size)
    kept_NK = (id_NK > 0) & (p.row_NK < end_E[-1])
    sizes_E = jnp.diff(end_E, prepend=0).astype(jnp.int32)
    return Plan(choice_R, jnp.where(kept_NK, p.row_NK, rows - 1), sizes_E), kept_NK.sum()


# Values in E4M3, a token's 128 channels sharing a power of two (report section 3.3.3): dispatched tokens going forward,
# gradients of the experts' outputs going back. Doing it again at the next hop changes nothing.
FP8_WIRE = Wire(lambda x_RD: tuple(fp8.quantize_tiles(x_RD, scale="power_of_two")),
                lambda parts, dtype: fp8.dequantize(fp8.Quantized(*parts), dtype))


class MoE(nn.Module):
    """The feed-forward network of a MoE layer. Returns its output and what routing did (see `transformer.Stats`)."""

    cfg: ModelConfig
    mesh: MeshConfig = MeshConfig()
    capture: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, x_BTD, bias_E):
        cfg = self.cfg
        B, T, D = x_BTD.shape
        E, F = cfg.num_experts, cfg.expert_ffn_dim
        x_ND = x_BTD.reshape(B * T, D)
        scores_NE, chosen_NK = routing.Router(cfg, name="router")(x_ND, bias_E)
        gates_NK = routing.gates(cfg, scores_NE, chosen_NK)
        here = size_here("experts", E)
        weights = tuple(weight(self, name, (here, *shape)) for name, shape in
                        (("gate", (D, F)), ("up", (D, F)), ("down", (F, D))))
        if self.mesh.devices == 1:
            y_ND, traffic = routed_experts(x_ND, chosen_NK, gates_NK, *weights, recipe=cfg.fp8), {}
        else:
            y_ND, traffic = self._dispatched(x_ND, chosen_NK, gates_NK, weights)
        y_BTD = constrain(y_ND.reshape(B, T, D), ("batch", None, None))
        if cfg.num_shared_experts:
            y_BTD = y_BTD + FFN(cfg, cfg.num_shared_experts * F, name="shared")(x_BTD)
        counts_E = routing.count_choices(chosen_NK, E)
        seen = {"scores": scores_NE.reshape(B, T, E), "chosen": chosen_NK.reshape(B, T, -1)}
        stats = {"counts": counts_E,
                 "sequence_loss": routing.sequence_loss(cfg, scores_NE.reshape(B, T, E)),
                 "auxiliary_loss": routing.auxiliary_loss(cfg, scores_NE, counts_E),
                 "traffic": traffic,
                 "captured": {name: seen[name] for name in self.capture}}
        return y_BTD, stats

    def _dispatched(self, x_ND, chosen_NK, gates_NK, weights):
        """The same sum, by experts on other devices."""
        cfg, mesh = self.cfg, self.mesh

        even = chosen_NK.size // (data_shards() * mesh.tensor)  # of one device: `here` runs inside a shard_map

        def here(x_RD, id_RK, gates_RK, weights):
            return resident_experts(x_RD, id_RK, gates_RK, weights, even, mesh.capacity, recipe=cfg.fp8)

        # A group of experts lives on one node.
        most_nodes = min(mesh.node, cfg.groups_kept) if cfg.num_groups > 1 else mesh.node
        wire = FP8_WIRE if mesh.dispatch_fp8 else PLAIN
        return to_experts(mesh, cfg.num_experts, most_nodes, here, x_ND, chosen_NK, gates_NK, weights, wire)
