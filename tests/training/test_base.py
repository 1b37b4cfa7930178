"""Runs that train adapters: the base is read, not changed, and told from others; readers get a merged model."""

import dataclasses
import functools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.adapters import restore_weights
from deepseek_jax.checkpoint.manager import Checkpoints, restore_items
from deepseek_jax.config import Config, ConfigError, DataConfig, FP8Config, LoraConfig, MeshConfig, OptimizerConfig
from deepseek_jax.interop import load_hf
from deepseek_jax.interop.convert import to_hf
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.posttraining.loop import reinforce
from deepseek_jax.training.base import load_base
from deepseek_jax.training.evaluate import evaluate_workdir
from deepseek_jax.training.loop import check_start, train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import init_state
from deepseek_jax.workdir import load, load_run
from tests import runs
from tests.model import naive
from tests.posttraining import policies

LORA = LoraConfig(rank=2, alpha=8.0)
SMALL = dict(num_layers=1, num_dense_layers=0, mtp_depth=0)
STEPS = dict(steps=4, batch_size=4, accumulation_steps=1, sequence_length=24, checkpoint_every=2, eval_every=4,
             sample_tokens=0, ema_decay=0.5)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The config of adapters for a run with random weights, trained on questions."""
    folder = tmp_path_factory.mktemp("lora")
    made = policies.start_run(folder / "base", policies.config_of(SMALL, **STEPS))
    runs.write_questions(folder / "questions.jsonl")
    data = DataConfig(sources=((str(folder / "questions.jsonl"), 1.0),), fim_rate=0.0, validation_fraction=0.2)
    return dataclasses.replace(made, lora=LORA, data=data, optimizer=OptimizerConfig(learning_rate=0.05, warmup=0.0))


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert train(start, str(workdir)).finished
    return workdir


def test_adapters_are_all_that_a_run_trains_and_saves(start, whole):
    saved = restore_items(whole, ("params", "opt_state", "ema"))[0]
    for tree in (saved["params"], saved["ema"], saved["opt_state"]["1"]["mu"], saved["opt_state"]["1"]["nu"]):
        names = {key.key for keys, _ in jax.tree_util.tree_leaves_with_path(tree) for key in keys[-1:]}
        assert names == {"a", "b"} and jax.tree.structure(tree) == jax.tree.structure(saved["params"])
    moved = jax.tree_util.tree_map_with_path(lambda keys, x: bool(x.any()), saved["params"])
    assert all(jax.tree.leaves(moved))  # B was 0
    assert [row["step"] for row in read_metrics(whole) if "loss" in row] == [1, 2, 3, 4]


def test_the_bytes_of_what_is_trained_are_those_of_two_thin_matrices_a_weight():
    cfg, r = naive.tiny(), 5
    state = jax.eval_shape(functools.partial(init_state, Config(model=cfg, lora=LoraConfig(rank=r))))
    D, H, Q, C = cfg.d_model, cfg.num_heads, cfg.q_rank, cfg.kv_rank
    A, X, V = cfg.nope_head_dim + cfg.rope_head_dim, cfg.nope_head_dim + cfg.v_head_dim, cfg.v_head_dim
    attention = (D + Q) + (Q + H * A) + (D + C + cfg.rope_head_dim) + (C + H * X) + (H * V + D)
    ffn = lambda width: 3 * (D + width)
    sparse = attention + cfg.num_experts * ffn(cfg.expert_ffn_dim) + ffn(cfg.num_shared_experts * cfg.expert_ffn_dim)
    count = r * (attention + ffn(cfg.dense_ffn_dim) + 2 * sparse + sparse)  # dense layer, two MoE layers, MTP module

    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.ndim)
    assert size(state.params) == 4 * count
    assert size(state.opt_state) == 2 * 4 * count  # two moments


def test_the_base_is_kept_as_the_model_computes_with_it(start):
    narrow = dataclasses.replace(start, model=dataclasses.replace(start.model, dtype="bfloat16"))
    frozen, base = load_base(narrow, Runner(narrow))
    saved = restore_items(start.init.from_)[0]["params"]

    kinds = jax.tree_util.tree_map_with_path(lambda keys, x: (keys[-1].key, x.dtype), frozen["params"])
    wide = {name for name, dtype in jax.tree.leaves(kinds, is_leaf=lambda x: isinstance(x, tuple))
            if dtype == jnp.float32}
    assert wide == {"scale", "weight"}  # norms and routers
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), frozen["params"], saved)
    assert (base.step, base.scale) == (1, 4.0)


def test_a_run_that_was_stopped_continues_to_the_bit(start, whole, tmp_path, monkeypatch):
    def stops(self, *arguments):
        saves(self, *arguments)
        self.wait()
        raise KeyboardInterrupt

    saves = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", stops)
        train(start, str(tmp_path / "run"))
    assert runs.checkpoints(tmp_path / "run") == [2]
    assert train(start, str(tmp_path / "run")).finished
    runs.assert_same_run(tmp_path / "run", whole)


def test_readers_find_the_merged_model(start, whole, tmp_path):
    loaded = load(str(whole))
    before = restore_items(start.init.from_)[0]["params"]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), loaded.variables["params"], before)
    assert moved["layers"]["ffn"]["shared"]["down"] and moved["layers"]["attention"]["o"]
    assert not (moved["head"] or moved["embedding"] or moved["layers"]["ffn"]["router"]["weight"])

    scored = evaluate_workdir(str(whole))
    trained = [row["eval_loss"] for row in read_metrics(whole) if "eval_loss" in row]
    assert scored["loss"] == pytest.approx(trained[-1], abs=1e-6)
    ema, last = load_run(str(whole), ema=True), load_run(str(whole))
    assert not np.array_equal(ema.variables["params"]["layers"]["attention"]["o"],
                              last.variables["params"]["layers"]["attention"]["o"])

    with pytest.raises(ConfigError, match="holds adapters, which no published checkpoint has; add --merge"):
        to_hf(str(whole), str(tmp_path / "hf"))
    with pytest.raises(ConfigError, match="holds all weights of its model; leave out --merge"):
        to_hf(str(start.init.from_), str(tmp_path / "hf"), merge=True)
    to_hf(str(whole), str(tmp_path / "hf"), merge=True)
    _, exported = load_hf(str(tmp_path / "hf"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), exported["params"],
                 loaded.variables["params"])


def test_a_run_of_adapters_is_a_start_like_any_other(start, whole):
    tuned = dataclasses.replace(start, init=dataclasses.replace(start.init, from_=str(whole)))
    frozen, _ = load_base(tuned, Runner(tuned))
    jax.tree.map(np.testing.assert_array_equal, frozen["params"], restore_weights(whole)[0]["params"])


@pytest.fixture
def away(start, tmp_path):
    """The base's folder, whose checkpoints are moved away during a test."""
    base = pathlib.Path(start.init.from_)
    shutil.move(base / "checkpoints", tmp_path / "away")
    yield base
    shutil.rmtree(base / "checkpoints", ignore_errors=True)
    shutil.move(tmp_path / "away", base / "checkpoints")


def test_a_base_that_is_gone_or_another_by_now_is_refused(start, whole, away):
    with pytest.raises(ConfigError, match=r"the base of the adapters, init.from=\S+base, cannot be read"):
        load_run(str(whole))
    weights = jax.eval_shape(functools.partial(init_state, dataclasses.replace(start, lora=LoraConfig())))
    checkpoints = Checkpoints(away)
    checkpoints.save(1, jax.tree.map(lambda x: jnp.ones(x.shape), {"params": weights.params}), {})
    checkpoints.close()
    for read in (lambda: load_run(str(whole)), lambda: train(start, str(whole))):
        with pytest.raises(ConfigError, match="is another checkpoint of step 1 than the one that"):
            read()


@pytest.mark.parametrize(("change", "said"), [
    (dict(model=dict(fp8=FP8Config(enabled=True))), "take fp8.enabled=False"),
    (dict(mesh=MeshConfig(pipe=2)), "take mesh.pipe=1, or lora.rank=None"),
    (dict(model=dict(attention="a.b:C")), "take lora.targets='experts'")])
def test_what_adapters_cannot_do_is_one_line(change, said):
    model = dataclasses.replace(naive.tiny(num_layers=4), **change.pop("model", {}))
    with pytest.raises(ConfigError, match=said):
        Config(model=model, lora=LORA, **change)


def test_adapters_need_a_run_to_start_from():
    with pytest.raises(ConfigError, match="add --config.init.from=RUN"):
        check_start(Config(model=naive.tiny(), lora=LORA))


@pytest.mark.slow  # compiles the engine, too
def test_reinforcement_learning_trains_adapters_against_their_base(start, tmp_path):
    """Sampler and trainer agree, although one uses merged weights and the other does not."""
    config = policies.config_of(SMALL, dict(task="tests.posttraining.policies:EVEN"), dict(kl_weight=0.1), steps=2)
    config = dataclasses.replace(config, lora=LORA, init=start.init)
    assert reinforce(config, str(tmp_path / "run"))

    trained = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert trained[0]["kl"] < 1e-9 < trained[1]["kl"]
    assert all(row["ratio_error"] < 1e-5 for row in trained)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora"]["rank"] == 2
