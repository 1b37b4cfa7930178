"""The claims table of the README: every interval in it stands in the results of the study that its row names."""

import itertools
import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUMBER = r"[-+]?\d+(?:\.\d+)?"
# "60 % [50, 70]", "0.007 nats lower [0.014 lower, 0.0004 higher]": a mean, what it is of, and both ends.
INTERVAL = re.compile(rf"({NUMBER})((?: %| nats| lower| fewer)*) \[({NUMBER})[^\],]*, ({NUMBER})[^\]]*\]")


def rows():
    """(study, claim, what is ours) of each row of the table."""
    text = (ROOT / "README.md").read_text().split("| claim | report | ours", 1)[1]
    study = None
    for line in itertools.takewhile(lambda line: line.startswith("|"), text.splitlines()[2:]):
        claim, _, ours, _, command, _ = (cell.strip() for cell in line.strip("|").split("|"))
        found = re.search(r"experiments\.studies\.(\w+)\.run", command)
        study = found.group(1) if found else study
        yield study, claim, ours


ROWS = list(rows())


def intervals(found):
    """Every {"mean", "low", "high"} within a tree."""
    if isinstance(found, dict):
        if {"mean", "low", "high"} <= found.keys():
            yield [found[name] for name in ("mean", "low", "high")]
        for part in found.values():
            yield from intervals(part)
    elif isinstance(found, list):
        for part in found:
            yield from intervals(part)


def says(printed, value, percent):
    """Whether `value` is printed like that; the sign may stand in a word, as in "0.007 lower"."""
    digits = len(printed.partition(".")[2])
    return value is not None and f"{abs(value) * (100 if percent else 1):.{digits}f}" == printed.lstrip("+-")


def stands_in(results, mean, unit, low, high):
    percent = "%" in unit
    ends = lambda a, b: says(low, a, percent) and says(high, b, percent)
    return any(says(mean, m, percent) and (ends(a, b) or ends(b, a)) for m, a, b in intervals(results))


@pytest.mark.parametrize(("study", "claim", "ours"), ROWS, ids=lambda x: str(x)[:40])
def test_every_interval_of_the_readme_stands_in_the_results_of_its_study(study, claim, ours):
    results = json.loads((ROOT / "experiments" / "studies" / study / "results.json").read_text())
    if study == "pipeline":
        mine = [row for row in results["rows"]["no overlap gains"] if row["microbatches"] == 32]
        idle = {row["schedule"]: f"{row['idle']:g}" for row in mine}
        assert ours.startswith(f"{idle['dualpipe']}, {idle['zb1p']}, {idle['1f1b']} of")
        return
    found = INTERVAL.findall(ours)

    assert found and ours.count("[") == len(found)
    assert [x for x in found if not stands_in(results, *x)] == []


def test_another_figure_would_not():
    results = {"claims": [{"difference": {"mean": -0.0066, "low": -0.0138, "high": 0.0004}}]}
    for text, right in (("0.007 nats lower [0.014 lower, 0.0004 higher]", True), ("0.007 [-0.014, +0.0004]", True),
                        ("0.008 nats lower [0.014 lower, 0.0004 higher]", False), ("0.007 [0.013, 0.0004]", False),
                        ("0.7 % [1.4, 0.0]", True), ("0.7 [1.4, 0.0]", False)):
        assert stands_in(results, *INTERVAL.search(text).groups()) == right, text
