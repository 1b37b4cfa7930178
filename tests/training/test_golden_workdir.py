"""A work directory of an earlier version can be loaded, scored, sampled and resumed (tests/golden/make_workdir.py)."""

import json
import pathlib
import shutil

import pytest

from tests import runs

GOLDEN = pathlib.Path(__file__).resolve().parents[1] / "golden" / "workdir_v0.1"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A copy, with the current folder set to the one to which the paths of its config are relative."""
    shutil.copytree(GOLDEN, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return "run"


def test_it_scores_as_it_did(workdir, tmp_path):
    assert runs.run("evaluate", "--workdir", workdir, "--json", tmp_path / "score.json").code == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score.keys() == EXPECTED["score"].keys() and score == pytest.approx(EXPECTED["score"], rel=1e-4)


def test_it_continues_a_prompt_as_it_did(workdir):
    made = runs.run("generate", "--workdir", workdir, "--prompt", EXPECTED["prompt"], "--max-new-tokens", 12)
    assert (made.code, made.out) == (0, EXPECTED["text"])


def test_it_resumes_to_the_end_that_it_would_have_had(workdir):
    resumed = runs.run("train", "--config", "config.py", "--workdir", workdir)
    assert resumed.code == 0 and "Resuming from step 2 of 4" in resumed.out, resumed
    expected = [{k: v for k, v in row.items() if k not in runs.TIMINGS} for row in EXPECTED["rows"]]
    found = runs.rows(workdir)
    assert len(found) == len(expected)
    for row, same in zip(found, expected):
        assert same.keys() <= row.keys()  # newer versions record more
        assert {key: row[key] for key in same} == pytest.approx(same, rel=1e-4)
