"""The network as decoding sees it: absorbed attention over the latent cache, experts for few tokens (section 2.1).

Absorbed MLA never forms keys and values. Both up-projections move to the query's side, and all heads share the cached
latent, so that a token of context costs kv_rank + rope_head_dim numbers to read:

    q~ = q_nope W_UK    score = q~ c + q_pe k_pe    o = (softmax(score) c) W_UV

Everything else is the model's own: these are functions of arrays, over weights that `prepare` lays out once.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from deepseek_jax import fp8
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.model import experts, mtp
from deepseek_jax.model import router as routing
from deepseek_jax.model.attention import project
from deepseek_jax.model.layers import ffn, linear, matmul, rms_norm, swiglu, wide
from deepseek_jax.model.rope import rope_table, softmax_scale
from deepseek_jax.parallel.mesh import AXES, spec
from deepseek_jax.serving import latent_cache as latents
from kernels_pallas import api


class Rows(NamedTuple):
    """Where the T tokens of each of B sequences stand."""

    position_BT: jax.Array  # int32
    valid_BT: jax.Array  # bool; what is not valid leaves no trace in the cache
    table_BP: jax.Array  # int32, each sequence's pages in order


class Reach(NamedTuple):
    """Static: how the cache is kept, and how many pages attention may look at. The smallest sufficient one runs."""

    kind: str
    page_size: int
    widths: tuple[int, ...]  # ascending; the last is the whole table


@functools.partial(jax.jit, static_argnums=(0, 2))
def prepare(cfg: ModelConfig, variables, modules: int = 0):
    """The variables laid out for decoding: a tree per layer, W_UK and W_UV apart, products in cfg.dtype.

    Args:
      variables: also with weights kept in FP8, {"values", "scales"}, as `load_hf(keep_fp8=True)` leaves them.
      modules: MTP modules to take along.
    """
    params, router = _dequantized(cfg, variables["params"]), variables.get("router", {})
    layers = []
    for name, count in (("dense_layers", cfg.num_dense_layers), ("layers", cfg.num_moe_layers)):
        for i in range(count):
            bias_E = router["bias"][i] if name == "layers" and cfg.has_router_bias else None
            layers.append(_layer(cfg, jax.tree.map(lambda x, i=i: x[i], params[name]), bias_E))
    depths = []
    for k in range(modules):
        module = params[f"mtp_{k + 1}"]
        bias_E = router["mtp_bias"][k] if cfg.has_router_bias else None
        depths.append({"block": _layer(cfg, module["block"], bias_E), "norm": module["norm"]["scale"],
                       "embedding_norm": module["embedding_norm"]["scale"],
                       "hidden_norm": module["hidden_norm"]["scale"],
                       "projection": module["projection"].astype(cfg.dtype)})
    return {"embedding": params["embedding"].astype(cfg.dtype), "head": params["head"].astype(cfg.dtype),
            "norm": params["norm"]["scale"], "layers": tuple(layers), "mtp": tuple(depths)}


def _dequantized(cfg, tree, name=""):
    """A checkpoint's FP8 weights [..., out, in] in the model's layout."""
    if not isinstance(tree, dict):
        return tree
    if "values" not in tree:
        return {key: _dequantized(cfg, part, key) for key, part in tree.items()}
    w = jnp.swapaxes(fp8.dequantize((tree["values"], tree["scales"]), cfg.dtype), -1, -2)
    heads = (cfg.num_heads, -1)
    split = {"q": (w.shape[-2], *heads), "q_b": (w.shape[-2], *heads), "kv_b": (w.shape[-2], *heads),
             "o": (*heads, w.shape[-1])}
    return w.reshape(w.shape[:-2] + split.get(name, w.shape[-2:]))


def _layer(cfg, p, bias_E):
    narrow = functools.partial(jax.tree.map, lambda x: x.astype(cfg.dtype))
    attention = dict(p["attention"])
    kv_b = attention.pop("kv_b").astype(cfg.dtype)
    norms = {name: attention.pop(name)["scale"] for name in ("q_norm", "kv_norm") if name in attention}
    attention = narrow(attention) | norms | {
        "k_up_HNC": kv_b[..., :cfg.nope_head_dim].transpose(1, 2, 0), "v_up_HCV": kv_b[..., cfg.nope_head_dim:]
        .transpose(1, 0, 2), "o": attention["o"].astype(cfg.dtype).reshape(-1, cfg.d_model)}
    out = {"attention": attention, "attention_norm": p["attention_norm"]["scale"], "ffn_norm": p["ffn_norm"]["scale"],
           "ffn": narrow({name: w for name, w in p["ffn"].items() if name != "router"})}
    if "router" in p["ffn"]:
        out |= {"router": p["ffn"]["router"]["weight"], "bias": bias_E}
    return out


def split(tree):
    """PartitionSpecs of weights or a cache on a mesh: experts are split, in order; all else is everywhere."""
    def of(path, x):
        routed = len(path) > 1 and path[-2] == jax.tree_util.DictKey("ffn") and x.ndim == 3
        return spec("experts", None, None) if routed else spec()

    return jax.tree_util.tree_map_with_path(of, tree)


def share_out(tree, mesh):
    """Lays `split` out on a mesh (None: leaves all where it is).

    Raises ConfigError where devices would get unequal numbers of experts.
    """
    if mesh is None:
        return tree
    try:
        return jax.tree.map(lambda x, where: jax.device_put(x, NamedSharding(mesh, where)), tree, split(tree))
    except ValueError as error:
        devices = math.prod(mesh.shape[axis] for axis in AXES["experts"])
        raise ConfigError(f"the experts, replicas included, cannot be shared out evenly over {devices} devices "
                          "(mesh.node * mesh.local); take a number of places that they divide.") from error


def on_mesh(program, weights, *arrays):
    """program(weights, *arrays); on a mesh all devices run it on the same tokens, each with its own experts."""
    if jax.sharding.get_abstract_mesh().empty:
        return program(weights, *arrays)
    everywhere = (spec(),) * len(arrays)
    return jax.shard_map(program, in_specs=(split(weights), *everywhere), out_specs=spec(), check_vma=False)(
        weights, *arrays)


def per_head(x_BTHI, w_HIO):
    """Each head by its own matrix, [B, T, H, O] in the dtype of x."""
    B, T, H, I = x_BTHI.shape
    y_HMO = matmul(x_BTHI.reshape(B * T, H, I).swapaxes(0, 1), w_HIO)
    return y_HMO.swapaxes(0, 1).reshape(B, T, H, -1)


def _has_kernel(cfg, reach, T):
    """Whether the device's own kernel does this attention: one query a sequence, rows of the published models, pages
    that it can copy."""
    rows = (cfg.kv_rank, cfg.rope_head_dim) == (512, 64) and reach.kind in ("bfloat16", "fp8")
    pages = reach.page_size in (8, 16, 32) or reach.page_size % 64 == 0
    return T == 1 and rows and pages and cfg.dtype == "bfloat16" and api.chosen_here("mla_decode") == "hopper"


def attention(cfg: ModelConfig, reach: Reach, w, x_BTD, rope, pages_PSX, rows: Rows):
    """Absorbed MLA. Returns its output [B, T, D] and the layer's pages, with the latents of these tokens in them."""
    norm = lambda name: lambda x: rms_norm(x, w[name], cfg.norm_eps)
    q_BTHA, c_BTC, k_pe_BTR = project(cfg, x_BTD, rope, w, norm("q_norm"), norm("kv_norm"))
    page_BT, offset_BT = latents.places(rows.table_BP, rows.position_BT, rows.valid_BT, reach.page_size)
    pages_PSX = latents.write(pages_PSX, latents.pack(reach.kind, c_BTC, k_pe_BTR), page_BT, offset_BT)
    N, C, f32 = cfg.nope_head_dim, cfg.kv_rank, wide(cfg.dtype)
    q_BTHX = jnp.concatenate([per_head(q_BTHA[..., :N], w["k_up_HNC"]), q_BTHA[..., N:]], axis=-1)

    def attend(width, q_BTHX, pages_PSX, rows):
        B, T, H, X = q_BTHX.shape
        rows_BSX = latents.unpack(cfg, reach.kind, latents.read(pages_PSX, rows.table_BP[:, :width]))
        if B > 1 and api.device_here().platform == "cpu":  # which would widen them twice, once for each product
            rows_BSX = rows_BSX.astype(f32)
        # Rows times queries: the one order for which XLA:CPU neither widens nor turns the rows of a sequence.
        q_BXY = jnp.swapaxes(q_BTHX.astype(rows_BSX.dtype).reshape(B, T * H, X), 1, 2)
        s_BTHS = jnp.swapaxes(matmul(rows_BSX, q_BXY, f32), 1, 2).reshape(B, T, H, -1) * softmax_scale(cfg)
        seen_BT1S = jnp.arange(rows_BSX.shape[1])[None, None, None] <= rows.position_BT[:, :, None, None]
        p_BTHS = jax.nn.softmax(jnp.where(seen_BT1S, s_BTHS, -jnp.inf), axis=-1)
        # Of whole rows, the rotated key's columns too: cutting the latents out first would copy them.
        o_BYX = matmul(p_BTHS.astype(rows_BSX.dtype).reshape(B, T * H, -1), rows_BSX, f32)
        return o_BYX[..., :C].reshape(B, T, H, C).astype(cfg.dtype)

    if _has_kernel(cfg, reach, q_BTHX.shape[1]):
        lengths_B = jnp.where(rows.valid_BT, rows.position_BT, 0)[:, 0] + 1
        o_BHC = api.mla_decode(q_BTHX[:, 0], pages_PSX, rows.table_BP, lengths_B, scale=softmax_scale(cfg))
        o_BTHC = o_BHC[:, None]
    else:
        needed = jnp.where(rows.valid_BT, rows.position_BT, 0).max() // reach.page_size
        branch = jnp.searchsorted(jnp.array(reach.widths), needed, side="right")
        branches = [functools.partial(attend, width) for width in reach.widths]
        o_BTHC = lax.switch(branch, branches, q_BTHX, pages_PSX, rows)
    o_BTHV = per_head(o_BTHC, w["v_up_HCV"])
    return linear(o_BTHV.reshape(*o_BTHV.shape[:2], -1), w["o"]), pages_PSX


def choices_in_turn(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD):
    """sum over k of gates[n, k] * FFN of chosen[n, k], [N, D], for so few tokens that hardly two share an expert.

    One choice after the other: nothing is sorted, and of the weights only the chosen experts' are read.
    """
    N, K = chosen_NK.shape
    f32 = wide(x_ND.dtype)

    def choice(i, y_ND):
        n, k = i // K, i % K
        gate, up, down = (lax.dynamic_index_in_dim(w, chosen_NK[n, k], keepdims=False)
                          for w in (gate_EDF, up_EDF, down_EFD))
        y_1D = ffn(lax.dynamic_slice_in_dim(x_ND, n, 1), gate, up, down).astype(f32) * gates_NK[n, k].astype(f32)
        return lax.dynamic_update_slice_in_dim(y_ND, lax.dynamic_slice_in_dim(y_ND, n, 1) + y_1D, n, 0)

    return lax.fori_loop(0, N * K, choice, jnp.zeros(x_ND.shape, f32)).astype(x_ND.dtype)


def tiles_in_turn(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD):
    """The same for more tokens; a choice of E is nobody's, and adds nothing.

    As in training, tokens are sorted by expert into tiles; here a loop takes the tiles that are not empty, one by one,
    through all three products. Few tokens leave most experts out, and only a tile's weights are copied.
    """
    (N, K), E = chosen_NK.shape, gate_EDF.shape[0]
    # Twice the mean load: small batches read each expert once, large ones waste little on the last tile of each.
    height = min(1 << (max(2 * N * K // E, 1).bit_length() - 1), 32)
    p = experts.plan(chosen_NK, E + 1, height)
    x_RD, end_E = experts.to_rows(x_ND, p), jnp.cumsum(p.sizes_E[:E]) // height

    def tile(t, y_RD):
        e = jnp.searchsorted(end_E, t, side="right")
        gate, up, down = (lax.dynamic_index_in_dim(w, e, keepdims=False) for w in (gate_EDF, up_EDF, down_EFD))
        y_MD = ffn(lax.dynamic_slice_in_dim(x_RD, t * height, height), gate, up, down)
        return lax.dynamic_update_slice_in_dim(y_RD, y_MD, t * height, 0)

    return experts.combine(lax.fori_loop(0, end_E[-1], tile, jnp.zeros_like(x_RD)), gates_NK, p)


def all_at_once(x_ND, chosen_NK, gates_NK, gate_EDF, up_EDF, down_EFD):
    """The same by every expert for every token, with gates of zero where it was not chosen; E is nobody's.

    Pays where most experts are needed anyway, and rows cost next to nothing: weights are read where they lie.
    """
    N, (E, D, F) = len(x_ND), gate_EDF.shape
    gate_EN1 = (jax.nn.one_hot(chosen_NK, E, axis=0) * gates_NK[None]).sum(axis=2)[..., None].astype(x_ND.dtype)
    x_END = jnp.broadcast_to(x_ND[None], (E, N, D))
    h_ENF = gate_EN1 * swiglu(matmul(x_END, gate_EDF), matmul(x_END, up_EDF))
    return matmul(jnp.swapaxes(h_ENF, 0, 1).reshape(N, E * F), down_EFD.reshape(E * F, D))


def _devices():
    """How many share the experts."""
    return lax.axis_size(AXES["experts"]) if jax.sharding.get_abstract_mesh().manual_axes else 1


def moe(cfg: ModelConfig, w, x_BTD, valid_BT):
    """Routed and shared experts; also how many valid tokens chose each expert, int32 [E].

    Inside `on_mesh` the routed ones are a device's own part of all.
    """
    x_ND = x_BTD.reshape(-1, cfg.d_model)
    scores_NE, chosen_NK = routing.route(cfg, x_ND, w["router"], w["bias"])
    f, gates_NK = w["ffn"], routing.gates(cfg, scores_NE, chosen_NK)
    place_NK, here, devices = chosen_NK, f["gate"].shape[0], _devices()
    if "places" in w:  # experts with replicas (placement.py): a token's row decides between them
        table_EX, count_E = w["places"]["table_EX"], w["places"]["count_E"]
        place_NK = table_EX[chosen_NK, jnp.arange(chosen_NK.shape[0])[:, None] % count_E[chosen_NK]]
    way = choices_in_turn
    if devices > 1 or 4 * place_NK.size > here:
        # A core multiplies 16 bfloat16 rows at once: fewer cost the same.
        narrow_and_many = x_ND.dtype == jnp.bfloat16 and x_ND.shape[0] <= 32 and place_NK.size >= here * devices
        way = all_at_once if narrow_and_many else tiles_in_turn
        if devices > 1:
            place_NK = place_NK - lax.axis_index(AXES["experts"]) * here
        mine_NK = (place_NK >= 0) & (place_NK < here) & valid_BT.reshape(-1, 1)
        place_NK = jnp.where(mine_NK, place_NK, here)
    y_ND = way(x_ND, place_NK, gates_NK, f["gate"], f["up"], f["down"])
    if devices > 1:  # all of them have the tokens, and each has added what its own experts say to them
        y_ND = lax.psum(y_ND.astype(wide(y_ND.dtype)), AXES["experts"]).astype(y_ND.dtype)
    if cfg.num_shared_experts:
        shared = f["shared"]
        y_ND = y_ND + ffn(x_ND, shared["gate"], shared["up"], shared["down"])
    chosen_NK = jnp.where(valid_BT.reshape(-1, 1), chosen_NK, cfg.num_experts)  # counted as nobody's
    return y_ND.reshape(x_BTD.shape), routing.count_choices(chosen_NK, cfg.num_experts)


def block(cfg: ModelConfig, reach: Reach, w, x_BTD, rope, pages_PSX, rows: Rows):
    """One transformer block; counts are None for a dense one."""
    norm = lambda name: rms_norm(x_BTD, w[name], cfg.norm_eps)
    y_BTD, pages_PSX = attention(cfg, reach, w["attention"], norm("attention_norm"), rope, pages_PSX, rows)
    x_BTD = x_BTD + y_BTD
    if "router" in w:
        y_BTD, counts_E = moe(cfg, w, norm("ffn_norm"), rows.valid_BT)
        return x_BTD + y_BTD, pages_PSX, counts_E
    return x_BTD + ffn(norm("ffn_norm"), *(w["ffn"][name] for name in ("gate", "up", "down"))), pages_PSX, None


def forward(cfg: ModelConfig, reach: Reach, weights, cache, tokens_BT, rows: Rows):
    """The main model on T tokens of each sequence, whose earlier latents are in the cache.

    Returns:
      hidden states [B, T, D] after the final norm, the cache with these tokens in it, counts int32 [MoE layers, E].
    """
    rope = rope_table(cfg, rows.position_BT, wide(cfg.dtype))
    x_BTD = weights["embedding"][tokens_BT]
    pages, counts = list(cache), []
    for i, w in enumerate(weights["layers"]):
        x_BTD, pages[i], counts_E = block(cfg, reach, w, x_BTD, rope, pages[i], rows)
        if counts_E is not None:
            counts.append(counts_E)
    counts_LE = jnp.stack(counts) if counts else jnp.zeros((0, cfg.num_experts), jnp.int32)
    return rms_norm(x_BTD, weights["norm"], cfg.norm_eps), tuple(pages), counts_LE


def predict_ahead(cfg: ModelConfig, reach: Reach, weights, k: int, cache, hidden_BTD, ahead_BT, rows: Rows):
    """MTP module k (from 1): position i takes h_{k-1}[i] and token i + k, and its own latents of earlier positions.

    Returns:
      h_k [B, T, D] after the module's norm, for the shared head; the cache.
    """
    w, layer = weights["mtp"][k - 1], cfg.num_layers + k - 1
    rope = rope_table(cfg, rows.position_BT, wide(cfg.dtype))
    x_BTD = mtp.join(rms_norm(weights["embedding"][ahead_BT], w["embedding_norm"], cfg.norm_eps),
                     rms_norm(hidden_BTD, w["hidden_norm"], cfg.norm_eps), w["projection"], cfg.fp8)
    x_BTD, pages, _ = block(cfg, reach, w["block"], x_BTD, rope, cache[layer], rows)
    return rms_norm(x_BTD, w["norm"], cfg.norm_eps), (*cache[:layer], pages, *cache[layer + 1:])
