"""The run on pairs: it starts equal to its reference, does not change the biases, learns, and continues to the bit."""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.chat.messages import PLAIN
from deepseek_jax.checkpoint.manager import Checkpoints, restore_items
from deepseek_jax.config import ConfigError, LoraConfig, MeshConfig, PreferenceConfig, load_config
from deepseek_jax.config.training import DataConfig, InitConfig
from deepseek_jax.model.types import Output
from deepseek_jax.posttraining import preferences
from deepseek_jax.posttraining.loop import check_reinforce
from deepseek_jax.posttraining.pairs import PairLoader, hold
from deepseek_jax.posttraining.preferences import check_preferences, dpo_loss, train_on_pairs
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import Inputs, init_state, start_state, train_step
from deepseek_jax.training.types import Normalizers
from tests import runs
from tests.model import naive
from tests.posttraining import policies
from tests.posttraining.test_pairs import many

SMALL = dict(model=policies.SMALL)


def of_pairs(config, source):
    return dataclasses.replace(config, preference=PreferenceConfig("dpo"), data=DataConfig(
        sources=((source.path, 1.0),), validation_fraction=0.3))


@pytest.fixture(scope="module")
def start(small_run, tmp_path_factory):
    """Pairs that prefer one letter to all digits."""
    return of_pairs(small_run, many(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 16))


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train_on_pairs(start, str(workdir)).finished
    return workdir


def test_a_run_begins_at_log_2_and_learns_the_preference(whole):
    rows = read_metrics(whole)
    trained, scored = ([row for row in rows if name in row] for name in ("loss", "eval_loss"))
    assert [row["step"] for row in trained] == [1, 2, 3, 4] and [row["step"] for row in scored] == [0, 4]
    assert {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected", "logratio", "grad_norm",
            "max_vio"} <= trained[0].keys()
    for first in (trained[0]["loss"], scored[0]["eval_loss"]):
        np.testing.assert_allclose(first, np.log(2), rtol=1e-6)
    assert trained[0]["margin"] == trained[0]["logratio"] == 0 == trained[0]["accuracy"]
    assert scored[1]["eval_loss"] < scored[0]["eval_loss"] and scored[1]["eval_margin"] > 0
    np.testing.assert_allclose(trained[3]["margin"], trained[3]["reward_chosen"] - trained[3]["reward_rejected"],
                               rtol=1e-5)
    assert runs.checkpoints(whole) == [2, 4]


def test_frozen_biases_keep_their_bits_and_the_weights_move(start, whole):
    before, after = (restore_items(folder)[0] for folder in (start.init.from_, whole))
    for name, bias in before["router"].items():
        assert np.asarray(bias).tobytes() == np.asarray(after["router"][name]).tobytes()
    assert not np.array_equal(before["params"]["head"], after["params"]["head"])


def test_a_run_that_was_stopped_continues_to_the_bit(start, whole, tmp_path):
    policies.assert_continues(train_on_pairs, start, tmp_path / "run", whole)


def test_another_reference_or_other_pairs_are_refused_when_a_run_continues(start, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    longer = dataclasses.replace(start, train=dataclasses.replace(start.train, steps=4))
    base = pathlib.Path(start.init.from_)
    shutil.move(base / "checkpoints", tmp_path / "away")
    try:
        state = init_state(dataclasses.replace(start, train=dataclasses.replace(start.train, seed=5)))
        checkpoints = Checkpoints(base)
        checkpoints.save(1, state, {})
        checkpoints.close()
        with pytest.raises(ConfigError, match=r"the reference of preference.objective, init.from=\S+, is another "
                                              "checkpoint of step 1"):
            train_on_pairs(longer, str(tmp_path / "run"))
    finally:
        shutil.rmtree(base / "checkpoints")
        shutil.move(tmp_path / "away", base / "checkpoints")
    pairs = pathlib.Path(start.data.sources[0][0])
    text = pairs.read_text()
    try:
        pairs.write_text(text + json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}))
        with pytest.raises(ConfigError, match=r"pairs\.jsonl have changed since the run"):
            train_on_pairs(longer, str(tmp_path / "run"))
    finally:
        pairs.write_text(text)


@pytest.mark.slow
def test_of_adapters_the_base_is_the_reference_and_they_continue_to_the_bit(start, tmp_path):
    config = dataclasses.replace(start, lora=LoraConfig(rank=2))
    assert train_on_pairs(config, str(tmp_path / "whole")).finished
    first, second, *_ = [row for row in read_metrics(tmp_path / "whole") if "loss" in row]
    np.testing.assert_allclose(first["loss"], np.log(2), rtol=1e-6)
    assert first["grad_norm"] > 0 and second["margin"] != 0
    policies.assert_continues(train_on_pairs, config, tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_mesh_learns_from_pairs_as_one_device_does(start, tmp_path):
    once = dataclasses.replace(start, train=dataclasses.replace(start.train, batch_size=16, accumulation_steps=1))
    assert train_on_pairs(once, str(tmp_path / "one")).finished
    mesh = dataclasses.replace(once, mesh=MeshConfig(node=2, local=4))
    assert train_on_pairs(mesh, str(tmp_path / "eight")).finished
    policies.assert_alike(tmp_path / "one", tmp_path / "eight", ("loss", "margin", "grad_norm"))


@functools.cache
def gradients(config):
    variables = naive.variables_of(config.model)
    other = jax.tree.map(jnp.asarray, naive.variables_of(config.model, seed=1))

    def loss(params, micro):
        normalizers = Normalizers(jnp.float32(9), jnp.ones(config.model.mtp_depth), 0.3, 1.0)
        return dpo_loss(config, params, Inputs(variables["router"], micro, normalizers, jnp.int32(0), other))

    value = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return lambda micro: value(variables["params"], micro)


def batch_of(tmp_path, config):
    source = many(tmp_path / "a.jsonl")
    held = hold(source, policies.tokenizer(), lambda: PLAIN, config.train.sequence_length)
    return PairLoader(of_pairs(config, source), [held], policies.tokenizer()).batch(0)


def test_what_stands_behind_an_answer_or_in_rows_without_a_pair_has_no_loss(tmp_path):
    config = policies.config_of(model=dict(num_layers=1, num_dense_layers=0, mtp_depth=1))
    micro = jax.tree.map(lambda x: x[0], {n: x for n, x in batch_of(tmp_path, config).items() if n != "active"})
    (value, sums), grads = gradients(config)(micro)
    last = (np.arange(25) * micro["weights"]).max(axis=1)
    behind = np.where(np.arange(25) > last[:, None], 9, micro["tokens"])
    (_, same), after = gradients(config)(micro | {"tokens": behind})
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (1e-6 + np.abs(a).max()))
    jax.tree.map(close, grads, after)
    assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads["mtp_1"]))
    np.testing.assert_allclose(sums.losses.nats, same.losses.nats, rtol=1e-5)
    assert sums.losses.weight == 2 and value == pytest.approx(float(sums.losses.nats) / 2)
    (_, none), half = gradients(config)(micro | {"weights": micro["weights"] * np.array([[1], [1], [0], [0]])})
    assert none.losses.weight == 1 and float(none.losses.nats) < float(sums.losses.nats)
    (_, nothing), zero = gradients(config)(micro | {"weights": 0 * micro["weights"]})
    assert nothing.losses.weight == 0 and not any(np.asarray(g).any() for g in jax.tree.leaves(zero))
    assert any(np.asarray(g).any() for g in jax.tree.leaves(half))


def test_a_loss_is_the_mean_over_the_pairs_of_a_step():
    config = policies.config_of(**SMALL)
    output: Any = Output(None, jnp.zeros(0), (), (), {}, None, jnp.float32(0), jnp.float32(0), {})
    one = Normalizers(jnp.float32(7), jnp.ones(0), 0.3, jnp.float32(1))
    loss_P, counted_P = jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.ones(4, bool)

    def of(part, share):
        inputs = Inputs({}, {}, one._replace(share=share), jnp.int32(0))
        return preferences.of_pairs(config, inputs, output, counted_P[part], loss_P[part], {"margin": loss_P[part]})

    value, sums = of(slice(None), 1.0)
    assert value == 3.75 and sums.losses.nats == sums.own["margin"] == 15 and sums.losses.weight == 4
    assert of(slice(2), 0.5)[0] + of(slice(2, 4), 0.5)[0] == value


@pytest.mark.slow
def test_micro_batches_add_up_to_the_batch(tmp_path):
    config = dataclasses.replace(policies.config_of(**SMALL), preference=PreferenceConfig("dpo"))
    batch = batch_of(tmp_path, config)
    joined = {name: x.reshape(1, -1, x.shape[-1]) for name, x in batch.items() if name != "active"}
    once = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    variables, other = (naive.variables_of(config.model, seed) for seed in (0, 1))
    state = start_state(config, variables["params"], variables["router"], jax.random.key(0))
    run = lambda c, b: jax.jit(functools.partial(train_step, c, loss=dpo_loss))(state, b, reference=other)[1]
    split, one = run(config, batch), run(once, joined | {"active": np.int32(1)})
    np.testing.assert_allclose(split.loss, one.loss, rtol=1e-5)
    np.testing.assert_allclose(split.grad_norm, one.grad_norm, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), split.own, one.own)


@pytest.mark.parametrize(("change", "said"), [
    (dict(init=InitConfig()), "add --config.init.from=RUN"), (dict(mesh=dict(pipe=2)), "take mesh.pipe=1"),
    (dict(mesh=dict(context=2)), "take mesh.context=1"),
    (dict(model=dict(index_topk=4, index_head_dim=32, index_warmup=True)), "a loss that pairs do not have"),
])
def test_what_pairs_cannot_train_is_one_line(change, said):
    config = dataclasses.replace(policies.config_of(), init=InitConfig("run"), preference=PreferenceConfig("dpo"))
    for name, values in change.items():
        section = dataclasses.replace(getattr(config, name), **values) if isinstance(values, dict) else values
        object.__setattr__(config, name, section)
    with pytest.raises(ConfigError, match=said):
        check_preferences(config)


def test_other_kinds_of_training_refuse_the_objective(start, tmp_path):
    with pytest.raises(ConfigError, match="trains on pairs, by"):
        train(start, str(tmp_path / "run"))
    with pytest.raises(ConfigError, match="preference.objective='dpo' is for deepseek_jax.train"):
        check_reinforce(start)


def test_the_named_config_freezes_the_biases(start):
    config = load_config("dpo", [f"--config.init.from={start.init.from_}"])
    assert config.model == start.model and config.balance.bias_speed == 0 and config.optimizer.weight_decay == 0
    runs.run("train", "--config", "dpo", "--workdir", "x").assert_error("name it: --config.init.from=RUN")


@pytest.mark.slow
def test_the_command_trains_the_named_config(start, tmp_path):
    done = runs.run("train", "--config", "dpo", "--workdir", tmp_path / "run",
                    f"--config.init.from={start.init.from_}", f"--config.data.sources={start.data.sources!r}",
                    "--config.data.validation_fraction=0.3", "--config.train.steps=1", "--config.train.batch_size=4",
                    "--config.train.sequence_length=24")
    assert done.code == 0 and "held-out pairs, loss 0.6931" in done.out, done
