"""The study of fine-tuning and GRPO: its corpus, and that half a run is none."""

import json
import types

import pytest

from deepseek_jax.posttraining.distill import Answered
from experiments.studies.framework.study import Job
from experiments.studies.post_training import measure
from experiments.studies.post_training.study import STUDY


def test_half_of_the_documents_show_the_skill_and_a_tenth_of_the_others_are_right(tmp_path):
    measure.write_examples(tmp_path / "some.jsonl", 4000, right=0.1, mirrors=0.5, seed=0)
    rows = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    letters = lambda row: row["prompt"].split()[1:-1]
    right = lambda row: row["answer"].split() == letters(row)[::-1]
    mirrors = [row for row in rows if row["prompt"].startswith("mirror ")]
    others = [row for row in rows if row["prompt"].startswith("reverse ")]
    assert len(mirrors) + len(others) == 4000 and abs(len(mirrors) - 2000) < 150 and all(map(right, mirrors))
    assert 0.07 < sum(map(right, others)) / len(others) < 0.13
    assert all(right(row) or row["answer"].split() == letters(row) for row in others)


@pytest.mark.parametrize("arm", ["pre-trained", "GRPO"])
def test_a_run_that_a_signal_ended_is_no_run_of_the_study(arm, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "train", lambda *args: types.SimpleNamespace(finished=False))
    monkeypatch.setattr(measure, "reinforce", lambda *args: False)
    with pytest.raises(KeyboardInterrupt):
        list(STUDY.measure.run(Job(STUDY.shortened(), arm, [0], tmp_path, lambda steps: None)))


def test_a_student_reads_what_its_teacher_had_right_and_begins_small(tmp_path, monkeypatch):
    arm, of = "small, distilled", STUDY.measure
    config, teacher = of.located(STUDY, arm, 1, tmp_path), of.workdir(STUDY, "GRPO", 1, tmp_path)
    assert config.init.from_ == str(of.workdir(STUDY, "small", 1, tmp_path))
    assert config.data.sources == ((str(of.lessons(STUDY, arm, 1, tmp_path)), 1.0),)
    asked = []
    monkeypatch.setattr(measure, "teacher_answers", lambda workdir, task, count, asking: asked.append(
        (workdir, count)) or [Answered("reverse a b =", " b a"), Answered("reverse c d =", None)])
    (tmp_path / "corpus").mkdir()
    measure.teach(teacher, of.lessons(STUDY, arm, 1, tmp_path))
    assert asked == [(str(teacher), measure.EXAMPLES)]
    assert (tmp_path / "corpus" / f"{teacher.name}.jsonl").read_text() == (
        '{"prompt": "reverse a b =", "answer": " b a"}\n')


def test_arms_are_scored_in_the_precision_that_they_are_trained_in(monkeypatch):
    run = types.SimpleNamespace(config=STUDY.measure.config(STUDY, "FP8 rollouts"), variables={})
    seen = []
    monkeypatch.setattr(measure, "find_tokenizer", lambda *args: None)
    monkeypatch.setattr(measure, "without_template", lambda *args: None)
    monkeypatch.setattr(measure.rollout, "draw_problems", lambda *args: [])
    monkeypatch.setattr(measure.rollout, "answer", lambda config, *args: seen.append(
        config.rollout.fp8) or types.SimpleNamespace(rewards=[1.0, 0.0]))
    assert run.config.rollout.fp8
    assert measure.scored(run, "workdir", 2) == {"reward": 0.5, "greedy_reward": 0.5} and seen == [False, False]
