"""Serving on one device: bytes against the engine's arrays and hand calculations, bounds against counts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.config import model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.scale import memory, serve
from deepseek_jax.scale.costs import latent_core_products
from deepseek_jax.scale.decoding import Serving, decode
from deepseek_jax.scale.hardware import HARDWARE, hardware
from deepseek_jax.scale.serve import Asked
from deepseek_jax.serving import latent_cache
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.weights import prepare

LITE, A100 = model_config("v2_lite_16b"), hardware("a100")


def shapes(c):
    return jax.eval_shape(lambda: DeepSeekV3(c).init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32)))


def size(tree):
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


# Cache.


def test_a_token_of_v3_takes_70272_bytes_of_cache():
    """61 layers of 512 latents and 64 rotary values in bfloat16; in FP8 656 bytes a layer."""
    v3 = model_config("v3_671b")
    assert memory.cache_per_token(v3, "bfloat16") == 61 * 576 * 2 == 70_272
    assert memory.cache_per_token(v3, "fp8") == 61 * 656
    assert memory.cache_per_token(model_config("tiny"), "float32") == 4 * (64 + 16) * 4


@pytest.mark.parametrize("name", ["tiny", "v2_lite_16b", "v3_671b", "v3_2_671b"])
@pytest.mark.parametrize("kind", ["bfloat16", "float32", "fp8"])
@pytest.mark.parametrize("modules", [0, 1])
def test_the_cache_is_counted_as_the_server_stores_it(name, kind, modules):
    c = model_config(name)
    assert memory.cache_per_token(c, kind, modules) == latent_cache.bytes_per_token(c, kind, modules)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8"])
def test_what_an_engine_allocates_is_what_is_planned(kind):
    c = model_config("tiny", num_layers=2)
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes(c))
    engine = Engine(c, variables, EngineConfig(max_sequences=3, max_length=100, cache=kind))

    found = serve.serve(c, A100, Asked(100, cache=kind))

    assert found.user == 4 * serve.PAGE * found.token  # 100 tokens are four pages
    assert size(engine._cache) == 3 * found.user + serve.PAGE * found.token  # and one is the scratch page
    assert size(engine.weights) == found.weights


def test_pages_are_those_of_the_engine():
    assert EngineConfig().page_size == serve.PAGE


# Weights.


@pytest.mark.parametrize("name", ["tiny", "v2_lite_16b", "v3_671b"])
@pytest.mark.parametrize("modules", [0, 1])
def test_weights_are_counted_as_decoding_lays_them_out(name, modules):
    c = model_config(name)
    if modules > c.mtp_depth:
        pytest.skip("no MTP module")
    laid_out = jax.eval_shape(lambda v: prepare(c, v, modules), shapes(c))

    assert sum(memory.served_weights(c, c.dtype, modules).values()) == size(laid_out)


def test_fp8_takes_a_byte_a_number_and_a_scale_a_block_where_released_checkpoints_have_it():
    v3 = model_config("v3_671b")
    found = memory.served_weights(v3, "fp8")

    assert found["experts"] == 58 * 256 * 3 * 7168 * 2048 * (1 + 4 / 128**2)
    assert found["embedding"] == 129280 * 7168 * 2
    assert sum(found.values()) < 0.505 * sum(memory.served_weights(v3, "bfloat16").values())


# Users and bounds.


def test_users_fill_what_weights_and_reserve_leave():
    found = serve.serve(LITE, A100, Asked(4096))
    page = serve.PAGE * found.token
    free = 0.9 * 80e9 - found.weights - page  # one is the scratch page

    assert found.users * found.user <= free < (found.users + 1) * found.user
    assert found.longest * found.token <= free < found.longest * found.token + page


def test_experts_touched_are_those_of_drawn_routings():
    rng, batch = np.random.default_rng(0), 12
    drawn = [len({e for _ in range(batch) for e in rng.permutation(64)[:6]}) for _ in range(2000)]

    assert serve.bound(LITE, A100, batch, Asked()).experts == pytest.approx(np.mean(drawn), rel=0.01)
    assert serve.bound(LITE, A100, 1, Asked()).experts == pytest.approx(6)


def test_one_user_s_bound_is_the_bandwidth_over_what_one_token_reads():
    """Active parameters in bfloat16 without the embedding, routers and norms in float32, and a cache of 4096 tokens."""
    read = 2 * 2_451_435_008 + 2 * (3_407_872 + 126_464) + 4096 * 31_104

    found = serve.bound(LITE, A100, 1, Asked(4096))

    assert found.tokens_a_second == found.by_memory == pytest.approx(2.039e12 / read)
    # Twice the products' parameters; for each layer, token in the cache and head two operations for 512 + 64 + 512
    # numbers.
    assert found.by_flops == pytest.approx(312e12 / (2 * (2_451_435_008 - 126_464) + 2 * 27 * 16 * 1088 * 4096))


def test_sparse_decoding_reads_all_keys_of_the_indexer_and_the_chosen_latents():
    c, context = model_config("v3_2_671b"), 32_768
    assert memory.cache_read(c, "bfloat16", context) == 61 * (2048 * 576 * 2 + context * 128 * 2)
    assert memory.cache_read(c, "fp8", context) == 61 * (2048 * 656 + context * 132)
    assert memory.cache_read(c, "bfloat16", 1024) == 61 * 1024 * (576 + 128) * 2  # all are chosen

    dense, warm = model_config("v3_671b"), dataclasses.replace(c, index_warmup=True)  # a warm-up is served dense
    assert memory.cache_read(dense, "bfloat16", context) == memory.cache_read(warm, "bfloat16", context) == (
        61 * context * 576 * 2)
    scan = 64 * (128 + 1) * context
    assert latent_core_products(c, context) == 128 * (2 * 512 + 64) * 2048 + scan
    assert latent_core_products(warm, context) == latent_core_products(dense, context)


def test_a_decode_step_of_v3_2_overtakes_v3_as_contexts_grow():
    work = lambda name, context: decode(model_config(name), hardware("h800"), Serving(144, 88, context)).work
    assert work("v3_2_671b", 1024) > work("v3_671b", 1024)
    assert work("v3_2_671b", 131_072) < work("v3_671b", 131_072) / 2


def test_more_users_are_more_tokens_and_fewer_for_each():
    one, all_ = serve.serve(LITE, A100, Asked()).bounds

    assert all_.tokens_a_second > one.tokens_a_second > all_.tokens_a_second / all_.batch


@pytest.mark.parametrize(("model", "machine", "words"), [
    ("v2_lite_16b", "rtx4090", ("--fp8", "--hardware l40s", "2 devices")),
    ("v3_671b", "h200", ("--model glm_4_7_flash", "16 devices that share the experts"))])
def test_what_does_not_fit_says_by_how_much_and_what_would(model, machine, words):
    c, hw = model_config(model), hardware(machine)
    found = serve.serve(c, hw, Asked())
    line = serve.instead(c, hw, Asked(), found)

    assert not found.users and not found.bounds and "\n" not in line
    assert line.startswith(f"{(found.user + 32 * found.token - found.room) / 1e9:,.1f} GB too much")
    assert all(word in line for word in words)


def test_a_context_that_is_too_long_says_which_would_fit():
    found = serve.serve(LITE, A100, Asked(2_000_000))
    line = serve.instead(LITE, A100, Asked(2_000_000), found)

    assert f"a context of {found.longest:,} tokens" in line
    assert serve.serve(LITE, A100, Asked(found.longest)).users == 1


def test_every_machine_has_a_place_in_the_plan():
    for hw in HARDWARE.values():
        found = serve.serve(model_config("small"), hw, Asked())
        assert found.users and all(b.tokens_a_second > 0 for b in found.bounds)
    slower = dataclasses.replace(A100, memory_bandwidth=A100.memory_bandwidth / 2)
    half, whole = (serve.bound(LITE, hw, 1, Asked()).by_memory for hw in (slower, A100))
    assert half == pytest.approx(whole / 2)
