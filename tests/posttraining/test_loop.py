"""The run: it learns, does not change the biases, and continues to the bit wherever it was stopped."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from deepseek_jax import reinforce as command
from deepseek_jax import stop
from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.config import ConfigError, load_config
from deepseek_jax.config.training import InitConfig
from deepseek_jax.posttraining.loop import check_reinforce, reinforce
from deepseek_jax.training.metrics import read_metrics
from tests import runs
from tests.posttraining import policies

SMALL = dict(model=policies.SMALL,
             rollout=dict(task="tests.posttraining.policies:EVEN"), grpo=dict(updates=2, kl_weight=0.1))


@pytest.fixture(scope="module")
def start(small_run):
    """A run whose answers are sometimes rewarded."""
    return dataclasses.replace(policies.config_of(**SMALL), init=small_run.init)


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    assert reinforce(start, str(workdir))
    return workdir


def test_a_run_leaves_rewards_ratios_and_routes_of_every_step(start, whole):
    rows = read_metrics(whole)
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 4]
    assert ["reward" in row for row in trained] == [True, False, True, False]  # of two updates
    assert {"reward", "mixed_groups", "answer_tokens", "finished", "entropy", "accepted", "reward_faults",
            "ratio_least", "ratio_mean", "ratio_largest", "tokens_rerouted", "routers_rerouted", "clipped",
            "ratio_error", "kl", "grad_norm", "max_vio"} <= trained[0].keys()
    assert all(row["ratio_error"] < 1e-5 and row["tokens_rerouted"] == 0 for row in trained[::2])
    assert trained[1]["ratio_error"] > 1e-5 and trained[0]["kl"] < 1e-9 < trained[2]["kl"]
    assert any(row["mixed_groups"] > 0 for row in trained[::2])
    assert runs.checkpoints(whole) == [2, 4] and (whole / "tokenizer.json").exists()


def test_frozen_biases_keep_their_bits_and_the_weights_move(start, whole):
    before, after = (restore_items(folder)[0] for folder in (start.init.from_, whole))
    for name, bias in before["router"].items():
        assert np.asarray(bias).tobytes() == np.asarray(after["router"][name]).tobytes()
    assert not np.array_equal(before["params"]["head"], after["params"]["head"])


def test_a_run_that_was_stopped_continues_to_the_bit(start, whole, tmp_path, monkeypatch):
    from deepseek_jax.posttraining.loop import ReinforceRun

    rollout_of = ReinforceRun._rollout

    def stops_at_2(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return rollout_of(self, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ReinforceRun, "_rollout", stops_at_2)
        reinforce(start, str(tmp_path / "run"))
    assert runs.checkpoints(tmp_path / "run") == [2]
    assert reinforce(start, str(tmp_path / "run"))
    runs.assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(("change", "said"), [
    (dict(init=InitConfig()), "add --config.init.from=RUN"),
    (dict(rollout=dict(group_size=3)), r"take one of \[2, 4, 8\]"),
    (dict(rollout=dict(group_size=1)), "must be at least 2"),
    (dict(grpo=dict(updates=3)), "must be a multiple of grpo.updates=3"),
    (dict(train=dict(ramp_from=4)), "ramp_from is for pre-training"),
    (dict(mesh=dict(pipe=2)), "take mesh.pipe=1"),
    (dict(mesh=dict(context=2)), "take mesh.context=1"),
    (dict(model=dict(index_topk=4, index_head_dim=32, index_warmup=True)), "a loss that rewards do not have"),
    (dict(optimizer=dict(qk_clip=100.0)), "rewards measure no logits; take --config.optimizer.qk_clip=None"),
    (dict(model=dict(router="a.b:c")), "rollout.replay_routes=False"),
])
def test_what_cannot_be_reinforced_is_one_line(change, said):
    config = dataclasses.replace(policies.config_of(), init=InitConfig("run"))
    for name, values in change.items():
        section = dataclasses.replace(getattr(config, name), **values) if isinstance(values, dict) else values
        object.__setattr__(config, name, section)
    with pytest.raises(ConfigError, match=said):
        check_reinforce(config)


def test_the_named_config_freezes_the_biases_and_fits_its_batch(start):
    config = load_config("grpo_reverse", [f"--config.init.from={start.init.from_}"])
    assert config.model == start.model
    check_reinforce(config)
    assert config.balance.bias_speed == 0 and config.optimizer.weight_decay == 0


def test_the_command_says_in_one_line_what_is_missing(monkeypatch):
    monkeypatch.setitem(runs.COMMANDS, "reinforce", command)
    runs.run("reinforce", "--config", "grpo_reverse", "--workdir", "x").assert_error("name it: --config.init.from=RUN")


CONFIG_FILE = """
from tests.posttraining import policies, test_loop
from deepseek_jax.config import as_dict

def get_config():
    import ml_collections
    config = policies.config_of(**test_loop.SMALL, steps=12)
    return ml_collections.ConfigDict(as_dict(config), type_safe=False)
"""


def run_command(folder, workdir, start):
    (folder / "config.py").write_text(CONFIG_FILE)
    return subprocess.Popen([sys.executable, "-m", "deepseek_jax.reinforce", "--config", str(folder / "config.py"),
                             "--workdir", str(workdir), f"--config.init.from={start.init.from_}"], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"})


@pytest.mark.slow
def test_killed_or_asked_to_stop_in_the_middle_a_run_ends_bit_identical(start, tmp_path):
    uninterrupted = run_command(tmp_path, tmp_path / "whole", start)
    out, _ = uninterrupted.communicate(timeout=900)
    assert uninterrupted.returncode == 0, out
    for which, rows, expected in ((signal.SIGKILL, 4, -signal.SIGKILL), (signal.SIGTERM, 7, stop.STOPPED)):
        process = run_command(tmp_path, tmp_path / "run", start)
        while process.poll() is None and len(read_metrics(tmp_path / "run")) < rows:
            time.sleep(0.01)
        process.send_signal(which)
        out, _ = process.communicate(timeout=900)
        assert process.returncode == expected, out
    assert "Stopped by SIGTERM after step" in out and runs.checkpoints(tmp_path / "run")[-1] % 2 == 0
    process = run_command(tmp_path, tmp_path / "run", start)
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")
