"""Multi-token prediction: the inputs of a depth, the tokens that it sees, and the parameters that it trains."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.model import DeepSeekV3
from deepseek_jax.model.mtp import MTPModule, ahead
from tests.model import naive
from tests.precision import float64

DEPTH, T = 2, 7
DEEP = naive.tiny(dtype="float64", mtp_depth=DEPTH, num_layers=2)


class Nothing(nn.Module):
    """Replaces the transformer block: returns its input."""

    def __call__(self, x_BTD, bias_E, context):
        return x_BTD, {}


def test_a_depth_projects_the_normed_embedding_and_the_normed_hidden_state_in_this_order():
    cfg = naive.tiny()
    hidden, embedding = np.random.default_rng(0).standard_normal((2, 2, 3, cfg.d_model)).astype(np.float32)
    module = MTPModule(cfg, Nothing)
    variables = naive.fill(jax.eval_shape(module.init, jax.random.key(0), hidden, embedding, None, None))

    found, _ = module.apply(variables, hidden, embedding, None, None)

    p, D = variables["params"], cfg.d_model
    halves = naive.norm(embedding, p["embedding_norm"]), naive.norm(hidden, p["hidden_norm"])
    expected = naive.norm(halves[0] @ p["projection"][:D] + halves[1] @ p["projection"][D:], p["norm"])
    swapped = naive.norm(halves[1] @ p["projection"][:D] + halves[0] @ p["projection"][D:], p["norm"])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - swapped).max() > 0.1


def test_ahead_looks_k_tokens_ahead():
    assert np.array_equal(ahead(np.array([[5, 6, 7, 8]]), 1)[:, :3], [[6, 7, 8]])
    assert np.array_equal(ahead(np.array([[5, 6, 7, 8]]), 3)[:, :1], [[8]])


@pytest.fixture(scope="module")
def dependence():
    """[depth + 1, T, T]: how much the logits at i change with token j; entry 0 is the main model."""
    tokens = np.random.default_rng(1).integers(0, 64, (1, T)).repeat(T + 1, axis=0).astype(np.int32)
    tokens[np.arange(T), np.arange(T)] = (tokens[T] + 1) % 64  # row j differs from the last one in token j
    with float64():
        output = naive.forward(DEEP)(naive.variables_of(DEEP), tokens)
        logits = np.stack([output.logits_BTW, *output.mtp_logits])
    return np.abs(logits[:, :T] - logits[:, T:]).max(-1).swapaxes(1, 2)


@pytest.mark.parametrize("depth", range(DEPTH + 1))
def test_depth_k_sees_the_tokens_up_to_k_ahead_and_none_beyond(dependence, depth):
    seen = np.arange(T)[None] <= np.arange(T)[:, None] + depth
    real = T - depth  # the last positions saw tokens from the start of the row: the loss masks them

    found = dependence[depth][:real]

    assert (found[seen[:real]] > 1e-6).all()
    assert (found[~seen[:real]] < 1e-12).all()


def test_the_next_depth_gets_the_normed_state_of_the_one_before():
    tokens = np.arange(T * (T + 1), dtype=np.int32).reshape(T + 1, T)
    with float64():
        variables = naive.variables_of(DEEP)
        # Read before the weights change in place: jax may share NumPy's memory, and computes asynchronously.
        before = np.asarray(naive.forward(DEEP)(variables, tokens).mtp_logits[1])

        variables["params"]["mtp_1"]["norm"]["scale"][0] += 1

        after = np.asarray(naive.forward(DEEP)(variables, tokens).mtp_logits[1])
        assert np.abs(after - before).max() > 1e-3


@pytest.fixture(scope="module")
def gradients():
    """Gradients of the MTP logits at position 0 by every parameter: it has seen token 0, and token 1 as the next one.
    """
    cfg = naive.tiny(mtp_depth=1, num_layers=1)
    variables = naive.variables_of(cfg)
    tokens = np.array([[7, 9, 2, 3]], np.int32)

    def total(params):
        return (DeepSeekV3(cfg).apply({**variables, "params": params}, tokens).mtp_logits[0][:, 0] ** 2).mean()

    return jax.jit(jax.grad(total), compiler_options=naive.QUICKLY)(variables["params"])


def test_the_hidden_state_goes_in_after_the_final_norm(gradients):
    assert np.abs(gradients["norm"]["scale"]).max() > 1e-4


def test_embedding_and_head_are_shared_and_learn_from_mtp(gradients):
    learned = np.abs(gradients["embedding"]).max(1) > 1e-4

    assert np.flatnonzero(learned).tolist() == [7, 9]  # 7 through the main model, 9 only as the next token
    assert np.abs(gradients["head"]).max() > 1e-4
    assert not {"embedding", "head"} & gradients["mtp_1"].keys()


def test_everything_of_mtp_bears_its_name():
    variables = naive.variables_of(naive.tiny(mtp_depth=2))

    assert {"mtp_1", "mtp_2"} == {name for name in variables["params"] if "mtp" in name}
    assert {name: bias.shape for name, bias in variables["router"].items()} == {"bias": (2, 8), "mtp_bias": (2, 8)}
    assert jnp.shape(variables["params"]["mtp_1"]["projection"]) == (64, 32)
