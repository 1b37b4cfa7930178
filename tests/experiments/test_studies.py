"""The studies: what their configs say, what is committed of them, and one of them run from end to end."""

import dataclasses
import importlib
import json
import pathlib
import types
from concurrent.futures import Future
from unittest import mock

import jax
import numpy as np
import pytest

from deepseek_jax.config import ConfigError
from experiments.studies.fp8 import study as fp8
from experiments.studies.framework import corpora, results, runner, source
from experiments.studies.framework.study import Claim, Job, Study
from experiments.studies.framework.training import Arm, Probes, Training, thinned
from experiments.studies.load_balance.study import draw
from experiments.studies.long_context import measure as far

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "studies"
STUDIES = {path.parent.name: importlib.import_module(f"experiments.studies.{path.parent.name}.study").STUDY
           for path in sorted(FOLDER.glob("*/run.py"))}
TRAINED = [name for name, study in STUDIES.items() if isinstance(study.measure, Training)]
FINISHED = [name for name in TRAINED if (FOLDER / name / "results.json").exists()]
# The least that trains, in two seeds of two arms.
LEAST = Study(name="least", arms={"bias": {}, "none": {"balance.bias_speed": 0.0}}, quick_arms=("bias", "none"),
              measure=Training(quick={"train.steps": 3, "model.d_model": 16, "train.batch_size": 2,
                                      "train.sequence_length": 32}), draw=draw, quick=True,
              claims=(Claim("Balances.", "max_vio_global", "bias", "none", "lower"),))


def test_every_folder_is_a_study_with_a_command():
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"framework", "__pycache__"}
    assert set(STUDIES) == folders
    for name, study in STUDIES.items():
        assert study.name == name and set(study.quick_arms) <= set(study.arms)


@pytest.mark.parametrize("name", TRAINED)
def test_every_arm_is_a_config_that_could_run(name):
    study = STUDIES[name]
    assert len(study.seeds) >= 3
    for arm in study.arms:
        study.measure.config(study, arm)
    for arm in study.quick_arms:
        assert study.measure.config(study.shortened(), arm, 1).train.steps <= 20


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_its_page(name):
    text = (FOLDER / name / "README.md").read_text()
    assert f"python -m experiments.studies.{name}.run" in text and "report" in text.lower()
    assert (FOLDER / name / "results.json").exists() == ("No full result yet" not in text)


def seeds_of(arm):
    """The seeds of an arm of a results.json."""
    return [int(seed) for seed in next(iter(arm["metrics"].values()))["seeds"]]


@pytest.mark.parametrize("name", FINISHED)
def test_results_are_those_of_the_config_that_is_there(name):
    found, study = json.loads((FOLDER / name / "results.json").read_text()), STUDIES[name]
    assert found["config_hash"] == study.config_hash() and not found["quick"]
    assert tuple(found["seeds"]) == study.seeds
    assert {arm: tuple(seeds_of(one)) for arm, one in found["arms"].items()} == study.selected()
    assert len(found["claims"]) == len(study.claims)
    assert (FOLDER / name / f"{name}.png").exists()


@pytest.mark.parametrize("name", FINISHED)
def test_verdicts_follow_from_the_committed_seeds(name):
    committed, study = json.loads((FOLDER / name / "results.json").read_text()), STUDIES[name]
    runs = [{"arm": arm, "seed": seed, "metrics": {n: m["seeds"][str(seed)] for n, m in found["metrics"].items()}}
            for arm, found in committed["arms"].items() for seed in seeds_of(found)]
    assert results.judged(study, runs) == committed["claims"]


@pytest.mark.parametrize("name", FINISHED)
def test_committed_results_are_what_is_written_of_their_runs(name):
    """Byte for byte, from runs of which each has the mean curves of its arm."""
    text = (FOLDER / name / "results.json").read_text()
    committed, study = json.loads(text), STUDIES[name]
    runs = [{"arm": arm, "seed": seed, "metrics": {n: m["seeds"][str(seed)] for n, m in found["metrics"].items()},
             **{part: found[part] for part in ("curves", "probes", "arrays", "parameters")},
             "corpus": committed["corpus"], "seconds": 1.0, "made": results.provenance()}
            for arm, found in committed["arms"].items() for seed in seeds_of(found)]
    with mock.patch.object(results, "_means", lambda curves: curves[0]):
        again = results.by_arm(study, runs)

    again |= {part: committed[part] for part in (*results.provenance(), "training_seconds_on_one_core")}
    assert runner.as_json(study, again) == text


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "fp8"])
def test_results_name_the_machine_the_versions_and_the_seconds(name):
    found = json.loads((FOLDER / name / "results.json").read_text())
    assert "cores" in found["hardware"] and found["versions"]["jax"] and found["date"]
    assert (found.get("seconds") or found["training_seconds_on_one_core"]) > 0


@pytest.mark.parametrize("name", ["pipeline", "two_hop", "fp8"])
def test_other_studies_keep_the_layout_of_their_results(name):
    text = (FOLDER / name / "results.json").read_text()
    assert runner.as_json(STUDIES[name], json.loads(text)) == text


def test_the_pipeline_study_is_what_its_tables_say(tmp_path):
    study, text = STUDIES["pipeline"], (FOLDER / "pipeline" / "results.json").read_text()
    runs = [{"arm": arm, "seconds": 0.1, "made": results.provenance(), **run} for arm in study.arms
            for run in study.measure.run(Job(study, arm, [0], tmp_path, lambda steps: None))]
    committed = json.loads(text)
    made = {**runner.summarize(study, runs), **{part: committed[part] for part in (*results.provenance(), "seconds")}}
    assert runner.as_json(study, made) == text


def test_the_fp8_study_is_what_its_config_and_its_losses_say():
    committed = json.loads((FOLDER / "fp8" / "results.json").read_text())
    assert committed["config"] == fp8.CONFIG and list(committed["settings"]) == list(fp8.SETTINGS)
    for setting, found in committed["settings"].items():
        curves = {variant: {int(seed): np.array(curve) for seed, curve in mine.items()}
                  for variant, mine in found["losses"].items()}
        assert {len(curve) for mine in curves.values() for curve in mine.values()} == {fp8.SETTINGS[setting][1]}
        for variant, again in fp8.compared(curves).items():
            assert again["stays_below_the_limit"] == found["compared"][variant]["stays_below_the_limit"]
            assert again["largest"] == pytest.approx(found["compared"][variant]["largest"], abs=2e-5)  # 4 digits kept


def test_the_fp8_study_gathers_its_sums_and_its_losses_in_the_order_of_the_committed_results():
    study, committed = STUDIES["fp8"], json.loads((FOLDER / "fp8" / "results.json").read_text())
    losses = lambda setting, variant, seed: committed["settings"][setting]["losses"][variant][str(seed)]
    runs = [{"arm": name, "seed": seed, "seconds": 1.0, "made": results.provenance(),
             **({"error": 0.5} if "group" in arm else {"losses": losses(**arm, seed=seed)})}
            for name, arm in study.arms.items() for seed in study.selected()[name]]
    made = runner.summarize(study, runs)
    order = lambda tree: [(key, order(value)) for key, value in tree.items()] if isinstance(tree, dict) else None
    assert order(made) == order(committed)
    assert [made["settings"][s]["losses"] for s in fp8.SETTINGS] == [committed["settings"][s]["losses"]
                                                                      for s in fp8.SETTINGS]


def test_fp8_is_compared_with_bfloat16_of_the_same_seed_after_warm_up():
    flat = np.full(200, 4.0)
    late, early = flat.copy(), flat.copy()
    late[150:] *= 1.01
    early[:20] *= 1.5  # gone from the mean of 40 steps when warm-up ends

    found = fp8.compared({"bf16": {0: flat, 1: 2 * flat}, "fp8": {0: late, 1: 2 * early}})["fp8"]

    assert found["largest"] == pytest.approx({"0": 0.01, "1": 0.0}) and found["last"]["0"] == pytest.approx(0.01)


def test_the_hash_of_an_arm_follows_its_config_and_not_its_seed():
    other = dataclasses.replace(LEAST, measure=Training(quick={"train.steps": 7}))
    assert other.arm_hash("bias") != LEAST.arm_hash("bias") != LEAST.arm_hash("none")
    assert LEAST.measure.config(LEAST, "bias", 1).train.seed == 1
    seeds = dataclasses.replace(LEAST, quick_seeds=(3, 4, 5))
    assert seeds.arm_hash("bias") == LEAST.arm_hash("bias") and seeds.config_hash() != LEAST.config_hash()


def test_a_claim_about_an_arm_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="'bais', which is no arm; there are bias, none"):
        dataclasses.replace(LEAST, claims=(Claim("Balances.", "loss", "bais", "none", "lower"),))


def test_curves_are_means_of_ten_steps():
    assert thinned(list(range(25))) == [4.5, 14.5, 22.0]


def test_probes_sort_numbers_from_arrays():
    probes = Probes()
    probes.add(5, {"x": 1.0, "loads": [[1]]})
    probes.add(10, {"x": 3.0, "loads": [[2]], "at_the_end": 7.0})
    assert probes.scalars() == {"x": 3.0, "at_the_end": 7.0, "x_gained": 2.0}
    assert probes.curves() == {"step": [5, 10], "x": [1.0, 3.0]} and probes.arrays() == {"loads": [[2]]}


def test_three_kinds_of_text_are_written(tmp_path):
    corpora.kinds(tmp_path)
    sizes = {kind: sum(p.stat().st_size for p in (tmp_path / kind).iterdir()) for kind in ("code", "prose", "tables")}
    assert min(sizes.values()) > 300_000


class Here:
    """A pool of no processes, so that a test sees what runs."""

    def __init__(self, workers, context, start, arguments):
        start(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def submit(self, work, *arguments):
        future = Future()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(work directory, runs) of LEAST."""
    workdir = tmp_path_factory.mktemp("studies")
    with mock.patch.object(runner.concurrent.futures, "ProcessPoolExecutor", Here):
        return workdir, runner.run(LEAST, workdir, 1)


def test_an_arm_may_have_more_seeds_than_the_others(finished):
    """Its own mean is of all of them, a comparison of those that both arms have."""
    more = dataclasses.replace(LEAST, quick=False, seeds=(0, 1), more_seeds={"none": (2,)})
    assert more.selected() == {"bias": (0, 1), "none": (0, 1, 2)}
    assert more.config_hash() != dataclasses.replace(more, more_seeds={}).config_hash()
    runs = [*finished[1], {**finished[1][-1], "seed": 2, "metrics": {"loss": 7.0, "max_vio_global": 0.5}}]
    runs = [{**run, "metrics": {name: run["metrics"][name] for name in ("loss", "max_vio_global")}} for run in runs]

    found = results.by_arm(more, runs)

    assert found["seeds"] == [0, 1] and list(found["arms"]["none"]["metrics"]["loss"]["seeds"]) == ["0", "1", "2"]
    losses = [run["metrics"]["loss"] for run in runs if run["arm"] == "none"]
    assert found["arms"]["none"]["metrics"]["loss"]["mean"] == pytest.approx(sum(losses) / 3)
    assert results.paired(found, found["claims"][0]) == ["0", "1"]
    assert found["claims"] == runner.summarize(LEAST, finished[1])["claims"]
    assert results.verdict_lines(found)[0].endswith("over 2 seeds")


def test_results_name_every_machine_and_version_of_their_runs(finished):
    first, second = ([run for run in finished[1] if run["seed"] == seed] for seed in (0, 1))
    made = {"date": "2031-05-06", "hardware": "An abacus, 1 core", "versions": {**results.provenance()["versions"],
                                                                                 "jax": "99"}}
    here = first[0]["made"]
    found = runner.summarize(LEAST, [*first, *({**run, "made": made} for run in second)])

    assert found["hardware"] == f"{here['hardware']} (seeds 0); An abacus, 1 core (seeds 1)"
    assert found["date"] == "2031-05-06" and found["versions"]["numpy"] == here["versions"]["numpy"]
    assert found["versions"]["jax"] == f"{here['versions']['jax']}, 99"
    alone = runner.summarize(LEAST, finished[1])
    assert {part: alone[part] for part in here} == here == results.provenance()


def test_the_arms_of_a_seed_are_of_one_machine(finished):
    one, *others = finished[1]
    elsewhere = {**one, "made": {**one["made"], "hardware": "An abacus, 1 core"}}
    newer = {**one, "made": {**one["made"], "versions": {**one["made"]["versions"], "jax": "99"}}}
    for other, name in ((elsewhere, "An abacus, 1 core; python"), (newer, "jax 99;")):
        with pytest.raises(ConfigError, match=f"the arms of seed 0 ran on several machines or versions, .*{name} .*"
                                              "Measure all arms of a seed on one: --fresh, or another --workdir"):
            runner.summarize(LEAST, [other, *others])


def test_another_machine_is_refused_before_hours_of_measuring(finished, monkeypatch):
    workdir, runs = finished
    lost = LEAST.run_path(workdir / "least-quick", "bias", 1)
    kept = lost.read_text()
    lost.unlink()
    monkeypatch.setattr(runner, "provenance", lambda: {**runs[0]["made"], "hardware": "An abacus, 1 core"})
    with (mock.patch.object(runner, "measure_all") as measure,
          pytest.raises(ConfigError, match="the arms of seed 1 ran on")):
        runner.run(LEAST, workdir, 1)
    lost.write_text(kept)
    assert not measure.called


def test_a_run_has_its_seconds(tmp_path):
    class Counted(Training):
        def run(self, job):
            yield {"seed": 0}
            yield {"seed": 1, "seconds": 7.0}

    study = dataclasses.replace(LEAST, measure=Counted())
    with mock.patch.object(runner, "_queue", mock.Mock()):
        runner._work(study, "bias", [0, 1], tmp_path, "code")
    first, second = (json.loads(study.run_path(tmp_path, "bias", seed).read_text()) for seed in (0, 1))
    assert 0 <= first["seconds"] < 60 and second["seconds"] == 7.0


def test_more_seeds_are_of_an_arm():
    with pytest.raises(ValueError, match="least: more_seeds names 'biass', which is no arm; there are bias, none"):
        dataclasses.replace(LEAST, more_seeds={"biass": (2,)})


def test_a_quick_study_ends_with_intervals_and_a_verdict(finished):
    found = runner.summarize(LEAST, finished[1])
    loss = found["arms"]["bias"]["metrics"]["loss"]
    assert loss["low"] <= loss["mean"] <= loss["high"] and loss["seeds"].keys() == {"0", "1"}
    assert loss["seeds"]["0"] != loss["seeds"]["1"]
    assert found["claims"][0]["verdict"] in ("reproduced", "not visible at this scale", "contradicted")
    assert len(found["arms"]["none"]["curves"]["train_loss"]) == 1 and found["versions"]["jax"]


def test_seeds_are_paired(finished):
    """Arms of a seed begin with the same numbers and the same text: so the first step, before a bias has moved."""
    workdir, _ = finished
    first = {}
    for path in (workdir / "least-quick").glob("*.json"):
        run = json.loads(path.read_text())
        first.setdefault(run["seed"], set()).add(run["first_loss"])
    assert [len(values) for values in first.values()] == [1, 1] and first[0] != first[1]


def test_a_seed_begins_every_arm_with_the_same_weights_and_another_seed_with_others(finished):
    """The first losses alone do not show it: seeds also read the text in orders of their own."""
    workdir, _ = finished
    begun = {}
    for arm in LEAST.arms:
        made = Arm(LEAST.measure, Job(LEAST, arm, [0, 1], workdir / "least-quick", lambda steps: None))
        made.step = mock.Mock(side_effect=InterruptedError)
        for seed in (0, 1):
            with pytest.raises(InterruptedError):
                made.run(seed)
            begun[arm, seed] = np.concatenate([x.ravel() for x in jax.tree.leaves(made.step.call_args.args[0].params)])

    for seed in (0, 1):
        np.testing.assert_array_equal(begun["bias", seed], begun["none", seed])
    assert (begun["bias", 0] != begun["bias", 1]).mean() > 0.9


def test_what_is_finished_is_not_run_again(finished):
    workdir, runs = finished
    with mock.patch.object(runner, "measure_all", side_effect=AssertionError("ran again")):
        assert runner.run(LEAST, workdir, 1) == runs


def test_finished_runs_are_named_and_fresh_ones_are_measured(finished, capsys):
    workdir, runs = finished
    runner.run(LEAST, workdir, 1)
    assert "4 of 4 runs are taken from" in capsys.readouterr().err
    with mock.patch.object(runner, "measure_all") as measure:
        runner.run(LEAST, workdir, 1, fresh=True)
    assert measure.call_args.args[1] == {"bias": [0, 1], "none": [0, 1]}


def test_runs_of_another_source_are_measured_again(finished, monkeypatch, capsys):
    workdir, _ = finished
    monkeypatch.setattr(source, "digest", lambda study: "another")
    with mock.patch.object(runner, "measure_all") as measure:
        assert runner.run(LEAST, workdir, 1) == []
    assert measure.call_args.args[1] == {"bias": [0, 1], "none": [0, 1]}
    assert "4 finished runs are measured again: the source" in capsys.readouterr().err


def test_a_failed_arm_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    done = []

    def work(study, arm, seeds, folder, code):
        if arm == "first":
            raise ValueError("of no use")
        done.append(arm)

    monkeypatch.setattr(runner, "_work", work)
    monkeypatch.setattr(runner.concurrent.futures, "ProcessPoolExecutor", Here)
    study = dataclasses.replace(CHAIN, arms={**CHAIN.arms, "alone": {}}, quick_arms=("second", "first", "alone"))
    with pytest.raises(ConfigError, match="chain: 1 of 3 arms failed, .* are kept. first: ValueError: of no use"):
        runner.measure_all(study, {arm: [0] for arm in study.quick_arms}, tmp_path, 1, "code")
    assert done == ["alone"] and "Traceback" in capsys.readouterr().err  # "second" continues from "first"


def test_the_source_of_a_run_is_all_that_it_imports_and_no_comment_of_it(tmp_path, monkeypatch):
    (tmp_path / "own_study.py").write_text(
        "from own_rule import rule\nfrom experiments.studies.framework.training import Training\n"
        "MEASURE = Training(network=lambda arm: rule(arm))\n")
    (tmp_path / "own_rule.py").write_text("def rule(arm):\n    return {'model.router': 'own_router:route'}\n")
    (tmp_path / "own_router.py").write_text("SPEED = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    import own_study  # pyright: ignore

    study = dataclasses.replace(LEAST, measure=own_study.MEASURE)
    names = {path.name for path in source.files(study)}
    assert {"own_study.py", "own_rule.py", "own_router.py", "router.py", "step.py", "dispatch.py"} <= names
    assert not names & {"server.py", "test_studies.py"}
    before = source.digest(study)
    (tmp_path / "own_router.py").write_text('"""A rule."""\n\nSPEED = 1  # of what\n')
    assert source.digest(study) == before
    (tmp_path / "own_router.py").write_text("SPEED = 2\n")
    assert source.digest(study) != before


def test_runs_that_read_other_texts_are_not_compared(finished):
    first, *others = finished[1]
    with pytest.raises(ConfigError, match="least: some of the finished runs read another text"):
        runner.summarize(LEAST, [{**first, "corpus": ["another"]}, *others])


def test_a_study_without_a_run_has_nothing_to_report(tmp_path):
    with pytest.raises(ConfigError, match="least: no run is finished yet; leave --report out to measure"):
        runner.summarize(LEAST, runner.finished(LEAST, tmp_path, "code"))


def test_only_what_is_missing_runs_and_gives_the_same_bits(finished):
    workdir, _ = finished
    lost = LEAST.run_path(workdir / "least-quick", "bias", 1)
    before = json.loads(lost.read_text())
    lost.unlink()
    with (mock.patch.object(runner.concurrent.futures, "ProcessPoolExecutor", Here),
          mock.patch.object(runner, "measure_all", wraps=runner.measure_all) as measure):
        runner.run(LEAST, workdir, 1)
    assert measure.call_args.args[1] == {"bias": [1]}
    after = json.loads(lost.read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0}


# Two phases: the second begins with the weights that the first ends with.
CHAIN = dataclasses.replace(
    LEAST, name="chain", quick_arms=("second", "first"), claims=(),
    arms={"second": {"optimizer.learning_rate": 1e-9, "balance.bias_speed": 0.0}, "first": {}},
    measure=dataclasses.replace(LEAST.measure, after={"second": "first"}))


@pytest.mark.slow
def test_an_arm_begins_with_the_weights_of_the_one_it_comes_after(tmp_path):
    with mock.patch.object(runner.concurrent.futures, "ProcessPoolExecutor", Here):
        loss = {(run["arm"], run["seed"]): run["metrics"]["loss"] for run in runner.run(CHAIN, tmp_path, 1)}

    for seed in (0, 1):  # it hardly learns, so it ends where it began
        assert loss["second", seed] == pytest.approx(loss["first", seed], abs=2e-6)
    assert len(list((tmp_path / "chain-quick").glob("first-*.safetensors"))) == 2


def test_arms_run_in_waves_and_know_what_they_come_after():
    three = dataclasses.replace(CHAIN, arms={"third": {}, "second": {}, "first": {}, "alone": {}},
                                measure=Training(after={"second": "first", "third": "second"}))
    assert three.waves(three.arms) == [["first", "alone"], ["second"], ["third"]]
    assert three.arm_hash("first") == three.arm_hash("alone")  # both are the base
    assert len({three.arm_hash(arm) for arm in three.arms}) == 3
    with pytest.raises(ValueError, match="'second' comes after 'fist', and one of them is no arm; there are second"):
        dataclasses.replace(CHAIN, measure=Training(after={"second": "fist"}))


class Marked:
    """Twenty-four secrets and the filling, a token a word."""

    words = ("=", *corpora.SECRETS, *corpora.FILLING)

    def encode(self, text):
        return [self.words.index(word) for word in text.split()]


def test_a_needle_is_told_once_at_its_depth_and_asked_for_at_the_end():
    for length, (tokens_NT, answer_N) in far.haystacks.__wrapped__(Marked()).items():
        assert tokens_NT.shape == (len(far.DEPTHS) * far.ASKED, length) and not tokens_NT[:, -1].any()
        for n, (row, answer) in enumerate(zip(tokens_NT, answer_N)):
            at, = np.flatnonzero(row[:-1] == 0)
            assert row[at + 1] == answer and at == int(far.DEPTHS[n // far.ASKED] * (length - 3))
            assert ((1 <= row) & (row <= len(corpora.SECRETS))).sum() == 1


def test_a_model_that_looks_back_finds_every_needle_and_one_that_does_not_finds_few(monkeypatch):
    loader = types.SimpleNamespace(tokenizer=Marked())

    def model(looks):
        def logits(variables, tokens_BT):
            told = (tokens_BT >= 1) & (tokens_BT <= len(corpora.SECRETS))
            secret = tokens_BT[np.arange(len(tokens_BT)), told.argmax(1)] if looks else np.full(len(tokens_BT), 7)
            return np.eye(len(Marked.words))[np.broadcast_to(secret[:, None], tokens_BT.shape)]

        return lambda cfg: logits

    shares = []
    for looks in (True, False):
        monkeypatch.setattr(far, "_model", model(looks))
        shares.append(far.needles(None, None, loader))
    assert (shares[0] == 1).all() and shares[1].mean() < 0.15 and shares[1].shape == (6, 5)


def test_results_and_picture_are_written(finished, tmp_path):
    found = runner.summarize(LEAST, finished[1])
    runner.write_results(LEAST, found, finished[1], tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert (tmp_path / "load_balance.png").stat().st_size > 10_000
