"""Ring attention equals attention over complete sequences, however they are split, with equal work for every device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import MeshConfig
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.ring_attention import hop_pairs, ring_attention
from deepseek_jax.model.rope import rope_table
from deepseek_jax.parallel.context import blocks_of, in_parts
from tests.model import naive
from tests.parallel.meshes import mesh_of
from tests.precision import float64

B, HEADS, RANK, ROPE, NOPE, VALUE = 2, 2, 5, 2, 4, 3
CFG = naive.tiny(num_heads=HEADS, kv_rank=RANK, rope_head_dim=ROPE, nope_head_dim=NOPE, v_head_dim=VALUE,
                 attention_block=4, dtype="float64")


def up(latent_BTX, w_CHX):
    kv_BTHX = jnp.einsum("BTC,CHX->BTHX", latent_BTX[..., :RANK], w_CHX)
    k_pe_BTHR = jnp.broadcast_to(latent_BTX[:, :, None, RANK:], (*kv_BTHX.shape[:3], ROPE))
    return jnp.concatenate([kv_BTHX[..., :NOPE], k_pe_BTHR], axis=-1), kv_BTHX[..., NOPE:]


def arrays(T, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape)) for shape in (
        (B, T, HEADS, NOPE + ROPE), (B, T, RANK + ROPE), (RANK, HEADS, NOPE + VALUE))]


def order(parts, T):
    """Positions of a sequence, part after part."""
    blocks = np.arange(T).reshape(2 * parts, -1)
    return np.concatenate([blocks[list(blocks_of(part, parts))].ravel() for part in range(parts)])


def cut(x_BT, parts):
    """[B, T, ...] -> [parts * B, T / parts, ...], with the rows of each device."""
    x_BT = x_BT[:, order(parts, x_BT.shape[1])]
    return jnp.moveaxis(x_BT.reshape(B, parts, -1, *x_BT.shape[2:]), 1, 0).reshape(parts * B, -1, *x_BT.shape[2:])


def joined(x_Bt, parts):
    x_PBt = x_Bt.reshape(parts, B, *x_Bt.shape[1:])
    x_BT = jnp.moveaxis(x_PBt, 0, 1).reshape(B, -1, *x_Bt.shape[2:])
    return x_BT[:, np.argsort(order(parts, x_BT.shape[1]))]


def in_a_ring(q, latent, w, ids, parts):
    q, latent, ids = jax.tree.map(lambda x: cut(x, parts), (q, latent, ids))
    return joined(ring_attention(CFG, up, q, latent, w, ids), parts)


def plain(q, latent, w, ids):
    k, v = up(latent, w)
    s = jnp.einsum("BTHA,BSHA->BHTS", q, k) * CFG.qk_head_dim**-0.5
    seen = np.tril(np.ones((q.shape[1],) * 2, bool))[None]
    if ids is not None:
        seen = seen & (ids[:, :, None] == ids[:, None])
    return jnp.einsum("BHTS,BSHV->BTHV", jax.nn.softmax(jnp.where(seen[:, None], s, -jnp.inf)), v)


@pytest.mark.parametrize(("mesh", "T", "segmented"), [
    (dict(context=2), 24, False), (dict(context=3), 18, True), (dict(context=4), 32, True),
    (dict(context=2, context_node=2), 32, True)], ids=["two", "three", "four", "four over two axes"])
def test_parts_in_a_ring_attend_as_the_complete_sequence_does(mesh, T, segmented):
    mesh = MeshConfig(**mesh)
    parts = mesh.parts
    with float64():
        ids = jnp.asarray(np.sort(np.random.default_rng(2).integers(0, 5, (B, T)))) if segmented else None
        do = jnp.asarray(np.random.default_rng(1).standard_normal((B, T, HEADS, VALUE)))
        run = lambda f: jax.jit(lambda *a: (lambda o, pull: (o, *pull(do)))(*jax.vjp(f, *a)))(*arrays(T))
        expected = run(lambda *a: plain(*a, ids))
        with jax.set_mesh(mesh_of(mesh)):
            found = run(lambda *a: in_a_ring(*a, ids, parts))

    for name, a, b in zip(("o", "dq", "dlatent", "dw"), found, expected):
        np.testing.assert_allclose(a, b, atol=1e-13, err_msg=name)


@pytest.mark.parametrize(("parts", "rows", "block"), [(2, 8, 2), (4, 12, 2), (8, 16, 1), (4, 20, 3)])
def test_every_pair_of_blocks_that_attends_is_on_one_device_and_all_have_the_same_work(parts, rows, block):
    size, (own, before, after) = hop_pairs(rows, block)
    half = rows // 2 // size
    found, work = [], []
    for me in range(parts):
        met = [(me, own)] + [(source, before if source < me else after) for source in range(parts) if source != me]
        work += [sum(len(pairs) for _, pairs in met)]
        place = lambda part, n: blocks_of(part, parts)[n // half] * half + n % half
        found += [(place(me, i), place(source, j)) for source, pairs in met for i, j in pairs]

    assert size == {(20, 3): 2}.get((rows, block), block)
    assert sorted(found) == [(i, j) for i in range(2 * half * parts) for j in range(i + 1)]
    assert max(work) == min(work)
    assert len(set(map(len, (before, after)))) == 1


# On devices.

PARTS, LONG = 4, 64
MESH = MeshConfig(context=PARTS)


@functools.cache
def compiled(differentiated, segmented=True, **model):
    """Compiles one layer of attention for four devices -> (config, program)."""
    cfg = naive.tiny(**({"dtype": "float32", "attention_block": 8} | model))
    x_BTD, ids = jnp.zeros((B, LONG, cfg.d_model)), jnp.zeros((B, LONG), jnp.int32) if segmented else None
    rope = rope_table(cfg, jnp.broadcast_to(jnp.arange(LONG), (B, LONG)), jnp.float32)
    params = jax.eval_shape(MLA(cfg).init, jax.random.key(0), x_BTD, rope, ids)

    def layer(params, x_BTD, rope, ids):
        x_BTD, rope, ids = jax.tree.map(in_parts, (x_BTD, rope, ids))
        return MLA(cfg).apply(params, x_BTD, rope, ids).sum()

    with jax.set_mesh(mesh_of(MESH)):
        f = jax.grad(layer) if differentiated else layer
        return cfg, jax.jit(f, compiler_options=naive.QUICKLY).lower(params, x_BTD, rope, ids).compile().as_text()


def permuted(program):
    """Bytes of each collective-permute of a program, by dtype, in order of size."""
    sizes = {"f32": 4, "s32": 4}
    found = re.findall(r"= (f32|s32)\[([\d,]+)\]\S* collective-permute\(", program)
    return sorted(sizes[dtype] * int(np.prod([int(n) for n in shape.split(",")])) for dtype, shape in found)


@pytest.mark.parametrize("segmented", [False, True])
def test_a_hop_carries_the_latents_of_its_tokens_and_nothing_else(segmented):
    cfg, program = compiled(False, segmented)
    tokens = B * LONG // PARTS
    latents = 4 * tokens * (cfg.kv_rank + cfg.rope_head_dim)

    # One to the neighbour, and one in the loop that passes the others on.
    assert permuted(program) == sorted([latents] * 2 + [4 * tokens] * 2 * segmented)
    _, program = compiled(True, segmented)
    # First the forward pass's; then again in the loop; and gradients: in the loop, at its end, and back to the owner.
    assert permuted(program) == sorted([latents] * (2 + 1 + 3) + [4 * tokens] * (2 + 1) * segmented)


def test_no_device_has_the_keys_of_all_tokens():
    """Nor their latents: arrays of floats have only the device's own tokens."""
    cfg, program = compiled(True)
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", program)}
    wide = {shape for shape in shapes if np.prod(shape) >= B * LONG * (cfg.kv_rank + cfg.rope_head_dim)}

    assert any(LONG // PARTS in shape for shape in shapes)
    assert not any(LONG in shape for shape in wide - {(B, LONG, cfg.d_model)}), wide
