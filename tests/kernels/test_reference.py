"""The twins against float64, and the single API to all kernels."""

import importlib
import inspect
import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import api
from kernels_pallas.reference import mla_decode as decode


def normal(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def f64(q):
    return np.asarray(api.dequantize(q), np.float64)


def close(x, expected, tolerance):
    assert np.abs(np.asarray(x, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("form", ["blocks", "tiles"])
@pytest.mark.parametrize("shape", [(70, 130, 300), (1, 1, 128)])
def test_a_matmul_is_the_product_of_what_is_dequantized(form, shape):
    M, N, K = shape
    a = api.quantize(normal((M, K)))
    b = (api.quantize_blocks if form == "blocks" else api.quantize)(normal((N, K), 1))
    close(jax.jit(lambda a, b: api.fp8_matmul(a, b, out_dtype=jnp.float32))(a, b), f64(a) @ f64(b).T, 1e-6)


@pytest.mark.parametrize(("group", "worst"), [(32, 0.0032), (4, 0.022)])
def test_without_promotion_14_bits_lose_2_percent_if_they_are_cut_after_every_4_products(group, worst):
    a, b = (api.quantize(np.random.default_rng(seed).random((32, 4096), np.float32)) for seed in range(2))
    model = api.Accumulator(bits=14, promote_every=0, group=group)
    y = jax.jit(lambda a, b: api.fp8_matmul(a, b, out_dtype=jnp.float32, accumulator=model))(a, b)
    assert np.abs(np.asarray(y, np.float64) / (f64(a) @ f64(b).T) - 1).max() == pytest.approx(worst, rel=0.1)


SIZES = np.array([128, 0, 256, 128], np.int32)


def test_grouped_products_are_those_of_each_group():
    rows, w = api.quantize(normal((640, 200))), api.quantize_blocks(normal((4, 70, 200), 1))
    y = jax.jit(lambda a, b: api.fp8_grouped_matmul(a, b, jnp.asarray(SIZES), out_dtype=jnp.float32))(rows, w)
    ends = np.cumsum(SIZES)
    expected = np.concatenate([f64(rows)[end - size:end] @ f64(w)[e].T
                               for e, (end, size) in enumerate(zip(ends, SIZES))] + [np.zeros((128, 70))])
    close(y, expected, 1e-6)


def test_k_grouped_products_sum_over_each_group():
    a, b = api.quantize(normal((60, 640))), api.quantize(normal((70, 640), 1))
    y = jax.jit(lambda a, b: api.fp8_grouped_matmul(a, b, jnp.asarray(SIZES), out_dtype=jnp.float32))(a, b)
    for e, (end, size) in enumerate(zip(np.cumsum(SIZES), SIZES)):
        rows = slice(end - size, end)
        close(y[e], f64(a)[:, rows] @ f64(b)[:, rows].T, 1e-6)


def attention64(q, k, v, segments, scale):
    B, T, H, _ = q.shape
    out = np.zeros((B, T, H, v.shape[-1]))
    for b, t, h in np.ndindex(B, T, H):
        seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
        s = q[b, t, h].astype(np.float64) @ k[b, seen, h].T.astype(np.float64) * scale
        p = np.exp(s - s.max())
        out[b, t, h] = p / p.sum() @ v[b, seen, h]
    return out


@pytest.mark.parametrize("segments", [None, np.array([[0, 0, 1, 1, 1, 2, 2]])])
def test_attention_is_causal_and_stays_in_its_segment(segments):
    q, k, v = normal((1, 7, 2, 24)), normal((1, 7, 2, 24), 1), normal((1, 7, 2, 16), 2)
    ours = jax.jit(lambda *x: api.mla_attention(*x, scale=0.2))(q, k, v, segments)
    close(ours, attention64(q, k, v, segments, 0.2), 1e-6)


def paged(tokens, page, seed=3):
    """[B, S, X] in shuffled pages, unwritten positions NaN: (cache, page table)."""
    B, S, X = tokens.shape
    per = -(-S // page)
    table = np.random.default_rng(seed).permutation(B * per).reshape(B, per).astype(np.int32)
    cache = np.full((B * per, page, X), np.nan, tokens.dtype)
    for b, p in np.ndindex(B, per):
        part = tokens[b, p * page:(p + 1) * page]
        cache[table[b, p], :len(part)] = part
    return cache, table


def decode64(q, tokens, lengths, scale, rank):
    out = np.zeros((*q.shape[:2], rank))
    for b, h in np.ndindex(*q.shape[:2]):
        x = tokens[b, :lengths[b]].astype(np.float64)
        s = x @ q[b, h].astype(np.float64) * scale
        p = np.exp(s - s.max())
        out[b, h] = p / p.sum() @ x[:, :rank]
    return out


def test_decoding_reads_the_pages_of_its_sequence_up_to_its_length():
    q, tokens, lengths = normal((2, 3, 192)), normal((2, 19, 192), 1), np.array([19, 5], np.int32)
    cache, table = paged(tokens, 8)
    ours = jax.jit(lambda *x: api.mla_decode(*x, scale=0.1))(q, cache, table, lengths)
    close(ours, decode64(q, tokens, lengths, 0.1, 128), 1e-6)


def test_the_fp8_cache_takes_656_bytes_a_token_and_decodes_what_it_holds():
    tokens, lengths = normal((1, 10, 576), 1), np.array([10], np.int32)
    packed = np.asarray(jax.jit(lambda x: decode.pack_fp8(x, 64))(tokens))
    held = np.asarray(jax.jit(lambda x: decode.unpack_fp8(x, 512))(packed), np.float32)
    q = normal((1, 2, 576))

    assert packed.shape == (1, 10, 656) and packed.dtype == np.uint8
    np.testing.assert_allclose(held[..., :512], tokens[..., :512], rtol=0.07, atol=0.01)
    np.testing.assert_array_equal(held[..., 512:], np.asarray(jnp.asarray(tokens[..., 512:], jnp.bfloat16), np.float32))
    cache, table = packed.reshape(2, 5, 656), np.array([[0, 1]], np.int32)
    ours = jax.jit(lambda *x: api.mla_decode(*x, scale=0.1))(q, cache, table, lengths)
    close(ours, decode64(q, held, lengths, 0.1, 512), 1e-6)


@pytest.mark.parametrize("operation", api.OPERATIONS)
def test_kernels_have_the_name_and_arguments_of_their_twin(operation):
    module, folders = api.OPERATIONS[operation]
    found = {folder: inspect.signature(getattr(importlib.import_module(f"kernels_pallas.{folder}.{module}"), operation))
             for folder in folders}
    shared = set(inspect.signature(getattr(api, operation)).parameters) - {"implementation", "accumulator", "share"}
    for folder, signature in found.items():
        assert shared <= set(signature.parameters), (folder, shared - set(signature.parameters))


@pytest.mark.parametrize("operation", api.OPERATIONS)
def test_a_kernel_that_cannot_run_here_says_what_it_needs_in_one_line(operation, monkeypatch):
    monkeypatch.setattr(api, "NEEDS_JAX", (0,))  # independent of the installed packages
    for folder in api.OPERATIONS[operation][1]:
        if folder != "reference":
            with pytest.raises(ValueError, match="'cpu'; implementation='reference' computes the same") as error:
                api._find(operation, folder)
            assert f"needs {api.NEEDS[folder]}" in str(error.value) and len(str(error.value).splitlines()) == 1
    with pytest.raises(ValueError, match="no implementation 'cuda'; take one of 'auto', 'reference'"):
        api._find(operation, "cuda")


def test_a_kernel_that_keeps_its_residuals_to_itself_has_no_halves(monkeypatch):
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="tpu", device_kind="TPU v5p"))
    q = jnp.ones((1, 128, 1, 192))
    with pytest.raises(ValueError, match="'tpu' has no forward of its own; it is differentiable as a whole"):
        api.mla_attention_forward(q, q, q[..., :128], scale=1.0)


def test_an_older_jax_has_the_twins_and_names_what_a_kernel_needs(monkeypatch):
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100"))
    monkeypatch.setattr(api.jax, "__version_info__", api.NEEDS_JAX)
    assert api.runs_here() == "hopper"
    monkeypatch.setattr(api.jax, "__version_info__", (0, 7, 2))
    monkeypatch.setattr(api.jax, "__version__", "0.7.2")
    assert api.runs_here() == "reference"
    assert api._find("fp8_matmul", "auto").__module__ == "kernels_pallas.reference.fp8_matmul"
    with pytest.raises(ValueError, match=r"^fp8_matmul: implementation='hopper' needs jax 0.11.2 or newer, and this is "
                                         r"0.7.2; implementation='reference' computes the same in plain jnp\.$"):
        api._find("fp8_matmul", "hopper")


def test_hopper_multiplies_experts_in_bfloat16_and_leaves_other_dtypes_to_the_twin(monkeypatch):
    monkeypatch.setattr(api, "device_here", lambda: types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100"))
    x, w, sizes = jnp.ones((8, 4)), jnp.ones((1, 4, 4)), jnp.full(1, 8, jnp.int32)
    assert (api.grouped_matmul(x, w, sizes) == 4).all() and (api.grouped_matmul_weights(x, x, sizes) == 8).all()
    assert api._that_takes(x.astype(jnp.bfloat16), "auto") == "auto" and api._that_takes(x, "hopper") == "hopper"


def test_auto_says_once_what_it_took(caplog):
    api._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="kernels_pallas.api"):
        for _ in range(2):
            api.quantize(jnp.ones((1, 128)))
    assert [r.getMessage() for r in caplog.records] == ["quantize: implementation reference"]


A, B = api.quantize(jnp.ones((128, 256))), api.quantize_blocks(jnp.ones((130, 256)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.fp8_matmul((jnp.ones((2, 2)), jnp.ones((2, 1))), B), "a must be FP8 values of 2 axes"),
        (lambda: api.fp8_matmul(A, api.quantize_blocks(jnp.ones((4, 128)))), "a has K=256 and b has K=128"),
        (lambda: api.fp8_matmul((A.values, A.scales[:1]), B), "a needs 1 x 128 tiles"),
        (lambda: api.fp8_matmul(A, (B.values, B.scales[:1])), "blocks of 128 x 128 [2, 2]"),
        (lambda: api.fp8_grouped_matmul(A, B, jnp.ones(1, jnp.int32)), "b needs 1 x 128 tiles"),
        (lambda: api.fp8_grouped_matmul(api.quantize(jnp.ones((100, 256))), api.quantize_blocks(jnp.ones((2, 4, 256))),
                                        jnp.ones(2, jnp.int32)), "a has 100 grouped rows; pad them"),
        (lambda: api.fp8_grouped_matmul(A, api.quantize_blocks(jnp.ones((2, 4, 256))), jnp.ones(3, jnp.int32)),
         "b holds 2 matrices"),
        (lambda: api.mla_decode(jnp.ones((1, 1, 576)), jnp.ones((1, 8, 575), jnp.bfloat16), jnp.ones((1, 1), jnp.int32),
                                jnp.ones(1, jnp.int32), scale=1.0), "queries of 576 with rank 512 need 576"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
