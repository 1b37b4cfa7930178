"""Hopper's attention kernels in the GPU interpreter, race detector on, against their twins in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import api
from kernels_pallas.hopper import mla_attention as attention
from kernels_pallas.hopper import mla_decode as decode
from tests.kernels.interpreter import INTERPRET

# bfloat16 rounds by up to 2^-8, once in the probabilities (or ds) and once in the output; relative to the largest
# number
TOLERANCE = 2.0**-7


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def close(ours, theirs):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)


def both(T, segments, A=128, V=64):
    """(output, dq, dk, dv) of the kernel and of the twin."""
    q, k, v, do = (normal((1, T, 2, width), seed) for seed, width in enumerate((A, A, V, V)))
    ids = None if segments is None else jnp.asarray(segments, jnp.int32)[None]
    kernel = lambda *x: attention.mla_attention(*x, ids, scale=0.1, interpret=INTERPRET)
    twin = lambda *x: api.mla_attention(*x, ids, scale=0.1)
    results = []
    for function, operands, cotangent in ((kernel, (q, k, v), do), (twin, wide((q, k, v)), wide(do))):
        o, pull_back = jax.vjp(function, *operands)
        results.append((o, *pull_back(cotangent)))
    return results


@pytest.mark.parametrize("T", [128, 196])
def test_attention_and_its_gradients_are_the_twins(T):
    for ours, theirs in zip(*both(T, None), strict=True):
        close(ours, theirs)


def test_attention_and_its_gradients_stay_in_their_segments():
    # The third segment repeats an id: ids are compared, not ordered. One boundary is inside a block of keys.
    for ours, theirs in zip(*both(200, np.repeat([0, 1, 0], [70, 66, 64])), strict=True):
        close(ours, theirs)


def paged(lengths, page, pages, X):
    """(cache, table): shuffled pages, NaN where nothing was written, invalid entries in the table after the end."""
    rng = np.random.default_rng(3)
    cache = rng.standard_normal((len(lengths) * pages, page, X)).astype(np.float32)
    table = rng.permutation(len(cache)).reshape(len(lengths), pages)
    for b, length in enumerate(lengths):
        for p in range(pages):
            cache[table[b, p], max(0, length - p * page):] = np.nan
    needed = np.arange(pages)[None] * page < np.asarray(lengths)[:, None]
    return jnp.asarray(cache, jnp.bfloat16), jnp.asarray(np.where(needed, table, 10**6), jnp.int32)


@pytest.mark.parametrize(("page", "splits"), [(32, 1), (64, 2), (128, 3)])
def test_decoding_is_its_twin_over_any_pages_and_shares(page, splits):
    lengths = np.array([150, 5], np.int32)
    cache, table = paged(lengths, page, -(-192 // page), 192)
    q = normal((2, 20, 192), 0)
    ours = decode.mla_decode(q, cache, table, jnp.asarray(lengths), scale=0.1,
                             config=decode.TuningConfig(splits=splits), interpret=INTERPRET)
    inside = jnp.minimum(table, len(cache) - 1)
    close(ours, api.mla_decode(*wide((q, cache)), inside, lengths, scale=0.1))


def test_a_query_that_is_nan_has_an_answer_that_is_nan():
    """It does not become zero, which would look like a valid result."""
    cache, table = paged([150], 64, 3, 192)
    q = normal((1, 8, 192), 0).at[0, 3].set(jnp.nan)
    found = decode.mla_decode(q, cache, jnp.minimum(table, len(cache) - 1), jnp.asarray([150], jnp.int32), scale=0.1,
                              config=decode.TuningConfig(splits=3), interpret=INTERPRET)
    np.testing.assert_array_equal(np.isnan(np.asarray(found, np.float32)).all(axis=-1), np.arange(8)[None] == 3)


@pytest.mark.parametrize(("page", "splits"), [(32, 1), (64, 2)])
def test_decoding_tokens_of_656_bytes_is_its_twin(page, splits):
    lengths = np.array([150, 5], np.int32)
    cache, table = paged(lengths, page, -(-192 // page), 576)
    cache = api.pack_fp8(cache * jnp.exp2(jnp.arange(576) // 128 - 1.0).astype(jnp.bfloat16)[None, None], 64)
    assert cache.shape[-1] == 656
    q = normal((2, 20, 576), 0)
    ours = decode.mla_decode(q, cache, table, jnp.asarray(lengths), scale=0.02,
                             config=decode.TuningConfig(splits=splits), interpret=INTERPRET)
    inside = jnp.minimum(table, len(cache) - 1)
    close(ours, api.mla_decode(wide(q), cache, inside, lengths, scale=0.02))


Q, CACHE = jnp.ones((1, 2, 192), jnp.bfloat16), jnp.ones((2, 64, 192), jnp.bfloat16)
TABLE, LENGTHS = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
HEADS = jnp.ones((1, 8, 2, 64), jnp.bfloat16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention.mla_attention(wide(HEADS), HEADS, HEADS, scale=1.0), "takes bfloat16 of 4 axes"),
        (lambda: attention.mla_attention(HEADS, HEADS[:, :4], HEADS, scale=1.0), "do not fit each other"),
        (lambda: attention.mla_attention(HEADS, HEADS, HEADS, jnp.ones((2, 8)), scale=1.0), "do not fit each other"),
        (lambda: attention.mla_attention(*(HEADS[..., :24],) * 3, scale=1.0), "heads of whole 64 numbers up to 256"),
        (lambda: decode.mla_decode(wide(Q), CACHE, TABLE, LENGTHS, scale=1.0), "takes bfloat16 queries and a cache of"),
        (lambda: decode.mla_decode(Q, CACHE.astype(jnp.uint8), TABLE, LENGTHS, scale=1.0), "reference takes others"),
        (lambda: decode.mla_decode(Q, api.pack_fp8(CACHE, 64), TABLE, LENGTHS, scale=1.0), "takes tokens of 656 bytes"),
        (lambda: decode.mla_decode(Q, CACHE[:, :24], TABLE, LENGTHS, scale=1.0), "pages of 8, 16, 32 or a multiple"),
        (lambda: decode.mla_decode(Q, CACHE, TABLE, LENGTHS, scale=1.0, rank=64), "a multiple of 128 up to 512"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1
