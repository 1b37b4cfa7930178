"""The latent cache: bytes per token, the parts that are stored exactly, and that only page numbers decide what is read.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import ConfigError, model_config
from deepseek_jax.serving import latent_cache
from tests.model import naive

WIDE = naive.tiny(kv_rank=512, rope_head_dim=64)


def latents(scale=1.0):
    rng = np.random.default_rng(0)
    c, k_pe = (rng.standard_normal((2, 3, width)).astype(np.float32) for width in (512, 64))
    return scale * c, k_pe


@pytest.mark.parametrize(("kind", "expected"), [("bfloat16", 70_272), ("float32", 140_544), ("fp8", 61 * 656)])
def test_a_token_of_the_large_model_costs_what_is_published(kind, expected):
    assert latent_cache.bytes_per_token(model_config("v3_671b"), kind) == expected


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "fp8"])
def test_the_arrays_have_that_many_bytes(kind):
    pages = latent_cache.make(WIDE, kind, pages=3, page_size=8, mtp=1)
    assert sum(p.nbytes for p in pages) == 3 * 8 * latent_cache.bytes_per_token(WIDE, kind, mtp=1)


def test_float32_rows_come_back_as_they_were():
    c, k_pe = latents()
    back = latent_cache.unpack(WIDE, "float32", latent_cache.pack("float32", jnp.asarray(c), jnp.asarray(k_pe)))
    np.testing.assert_array_equal(back, np.concatenate([c, k_pe], -1))


def test_fp8_rows_are_values_then_scales_then_rotary_numbers_in_bfloat16():
    c, k_pe = latents(scale=30.0)
    rows = np.asarray(latent_cache.pack("fp8", jnp.asarray(c), jnp.asarray(k_pe)))

    assert rows.shape == (2, 3, 656) and rows.dtype == np.uint8
    tiles = c.reshape(2, 3, 4, 128)
    scales = rows[..., 512:528].copy().view(np.float32)
    np.testing.assert_allclose(scales, np.abs(tiles).max(-1) / 448, rtol=1e-6)
    np.testing.assert_array_equal(rows[..., 528:].copy().view(jnp.bfloat16), k_pe.astype(jnp.bfloat16))
    back = np.asarray(latent_cache.unpack(WIDE, "fp8", jnp.asarray(rows)))
    error = np.abs(back[..., :512].reshape(tiles.shape) - tiles)
    assert (error <= np.maximum(np.abs(tiles) / 16, scales[..., None] / 512) + 1e-6).all()  # 3 bits of mantissa
    np.testing.assert_array_equal(back[..., 512:], k_pe.astype(jnp.bfloat16).astype(np.float32))


def test_a_ragged_last_tile_has_a_scale_of_its_own():
    cfg = naive.tiny(kv_rank=130)
    c = np.concatenate([np.full((1, 1, 128), 1000.0), np.full((1, 1, 2), 0.01)], -1).astype(np.float32)
    packed = latent_cache.pack("fp8", jnp.asarray(c), jnp.zeros((1, 1, cfg.rope_head_dim)))
    back = latent_cache.unpack(cfg, "fp8", packed)
    np.testing.assert_allclose(back[..., :130], c, rtol=0.07)


def test_a_row_lies_where_its_table_says_and_what_is_not_valid_on_page_0():
    pages = jnp.zeros((5, 2, 1))
    table_BP = jnp.array([[3, 1], [2, 4]])
    position_BT, valid_BT = jnp.array([[1, 2], [0, 3]]), jnp.array([[True, True], [True, False]])
    page_BT, offset_BT = latent_cache.page_and_offset(table_BP, position_BT, valid_BT, 2)

    pages = latent_cache.write(pages, jnp.array([[[10.0], [11.0]], [[20.0], [99.0]]]), page_BT, offset_BT)

    read = latent_cache.read(pages, table_BP)[..., 0]
    assert read.tolist() == [[0, 10, 11, 0], [20, 0, 0, 0]]
    assert 99.0 in np.asarray(pages[0])


def test_an_unknown_format_is_an_error():
    with pytest.raises(ConfigError, match="take one of float64, float32"):
        latent_cache.row_shape(WIDE, "int8")


@pytest.mark.parametrize("kind", ["float32", "fp8"])
def test_a_cache_that_the_machine_cannot_hold_says_how_large_it_is(kind):
    latent_cache.check_room(naive.tiny(), kind, 1000)
    with pytest.raises(ConfigError, match=r"1,000,000,000,000 tokens takes [\d,]+ GB, and there are"):
        latent_cache.check_room(naive.tiny(), kind, 10**12)


def test_where_the_system_does_not_say_its_memory_any_cache_may_be_tried(monkeypatch):
    """Windows has no os.sysconf."""
    monkeypatch.delattr(latent_cache.os, "sysconf")
    latent_cache.check_room(naive.tiny(), "float32", 10**12)
