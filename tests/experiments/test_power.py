"""How many seeds decide a claim: against repetitions that are drawn, and the tables of the studies' READMEs."""

import json
import re

import numpy as np
import pytest

from experiments.studies.framework import power
from experiments.studies.framework.statistics import NOT_VISIBLE, estimate


@pytest.mark.parametrize(("effect", "seeds"), [(1.0, 3), (1.0, 8), (0.5, 20), (0.0, 5)])
def test_power_is_the_share_of_drawn_repetitions_whose_interval_leaves_out_zero(effect, seeds):
    drawn = np.random.default_rng(0).normal(effect, 1.0, (4000, seeds))
    decided = [not found.low <= 0 <= found.high for found in map(estimate, drawn)]

    assert power.power(effect, 1.0, seeds) == pytest.approx(np.mean(decided), abs=0.025)


def test_so_many_seeds_do_and_one_less_does_not():
    for effect in (0.05, 0.5, 2.0, 20.0):
        seeds = power.seeds_for(effect, 1.0)
        assert power.power(effect, 1.0, seeds) >= power.POWER
        assert seeds == 2 or power.power(effect, 1.0, seeds - 1) < power.POWER
        assert power.effect_for(1.0, seeds) <= effect + 1e-9


def test_no_effect_takes_more_seeds_than_there_are():
    assert power.seeds_for(0.0, 1.0) is None and power.seeds_for(1e-3, 1.0) is None


def arms_of(seeds, *arms):
    """The arms of a results.json: {arm: its metrics with so many seeds}."""
    return {arm: {"metrics": {"loss": {"seeds": dict.fromkeys(map(str, range(seeds)), 0.0)}}} for arm in arms}


def test_only_open_claims_are_asked_about_and_the_published_effect_comes_first():
    claim = {"metric": "loss", "arm": "loss-free", "against": "aux 1e-3", "expected": "lower"}
    results = {"study": "load_balance", "arms": arms_of(3, "loss-free", "aux 1e-3"),
               "training_seconds_on_one_core": 6 * 3600.0, "claims": [
                   {**claim, "says": "open", "difference": {"mean": -0.004, "low": -0.007, "high": 0.001},
                    "verdict": "not visible at this scale"},
                   {**claim, "says": "decided", "difference": {"mean": -2, "low": -3, "high": -1},
                    "verdict": "reproduced"}]}

    [row] = power.needed(results)

    assert (row.says, row.effect, row.basis) == ("open", 0.006, "published")
    assert 2 <= row.seeds <= 4
    assert row.hours == row.seeds  # an hour a run, two arms, two cores


@pytest.mark.parametrize(("against", "expected", "mean", "basis"), [
    ("aux 1e-3", "lower", 0.0, "published"), ("aux 1e-3", "lower", 0.005, "published, excluded"),
    ("aux 1e-1", "lower", -0.005, "seen"), ("aux 1e-1", "lower", 0.005, "seen, against the claim"),
    ("aux 1e-1", "higher", 0.005, "seen"), ("aux 1e-1", "higher", -0.005, "seen, against the claim")])
def test_an_effect_that_is_excluded_or_of_the_other_direction_is_marked(against, expected, mean, basis):
    claim = {"metric": "loss", "arm": "loss-free", "against": against, "expected": expected, "says": "open",
             "verdict": NOT_VISIBLE, "difference": {"mean": mean, "low": mean - 0.009, "high": mean + 0.009}}

    [row] = power.needed({"study": "load_balance", "arms": arms_of(8, "loss-free", against),
                           "training_seconds_on_one_core": 1.0, "claims": [claim]})

    assert row.basis == basis


def test_the_hours_contain_the_arms_that_a_claim_s_arms_continue_from():
    claim = {"metric": "loss", "arm": "512, YaRN", "against": "64", "expected": "lower", "says": "open",
             "verdict": NOT_VISIBLE, "difference": {"mean": 0.1, "low": -1.0, "high": 1.2}}
    results = {"study": "long_context", "arms": arms_of(3, "64", "512, YaRN", "2048, YaRN"),
               "training_seconds_on_one_core": 9 * 3600.0, "claims": [claim, {**claim, "arm": "2048, YaRN"}]}

    two, three = power.needed(results)

    assert (two.hours, three.hours) == (two.seeds, 1.5 * two.seeds)


def test_seeds_of_both_arms_count_and_not_those_of_one():
    claim = {"metric": "loss", "arm": "loss-free", "against": "aux 1e-1", "expected": "lower", "says": "open",
             "verdict": NOT_VISIBLE, "difference": {"mean": 0.1, "low": -1.0, "high": 1.2}}
    arms = {**arms_of(8, "loss-free"), **arms_of(3, "aux 1e-1")}
    least = {"study": "load_balance", "training_seconds_on_one_core": 1.0, "claims": [claim]}

    [row], [other] = (power.needed({**least, "arms": x}) for x in (arms, arms_of(3, "loss-free", "aux 1e-1")))

    assert (row.seeds, row.at_eight) == (other.seeds, other.at_eight)


def test_every_published_effect_is_of_a_claim():
    claims = {(path.parent.name, claim["metric"], claim["arm"], claim["against"])
              for path in power.STUDIES.glob("*/results.json")
              for claim in json.loads(path.read_text()).get("claims", ())}

    assert power.PUBLISHED.keys() <= claims


@pytest.mark.parametrize("path", sorted(power.STUDIES.glob("*/results.json")), ids=lambda path: path.parent.name)
def test_the_readme_of_a_study_with_open_claims_says_what_would_decide_them(path):
    results = json.loads(path.read_text())
    rows = power.needed(results) if results.get("claims") else []

    text = path.with_name("README.md").read_text()
    assert power.section(rows) in text if rows else power.START not in text


def test_the_readme_of_fp8_says_how_many_seeds_would_decide_its_bound():
    folder = power.STUDIES / "fp8"
    results = json.loads((folder / "results.json").read_text())
    seeds = {}
    for setting, found in results["settings"].items():
        largest = list(found["compared"]["fp8"]["largest"].values())
        assert found["compared"]["fp8"]["stays_below_the_limit"] == NOT_VISIBLE
        seeds[setting] = power.seeds_for(abs(results["config"]["limit"] - np.mean(largest)), np.std(largest, ddof=1))

    says = f"{seeds['small_calm']} would show it with a chance of 80 %, and {seeds['tiny']} at the config's own rate"
    assert says in (folder / "README.md").read_text()


def test_the_claims_page_counts_the_open_claims_and_those_that_few_seeds_decide():
    text = " ".join((power.STUDIES.parents[1] / "docs" / "claims.md").read_text().split())
    counts = re.search(r"for (\d+) of the (\d+) open claims of all studies at most (\d+)", text)
    assert counts
    decide, claims, few = map(int, counts.groups())
    found = [json.loads(path.read_text()) for path in power.STUDIES.glob("*/results.json")]
    rows = [row for results in found if results.get("claims") for row in power.needed(results)]
    assert (len(rows), sum(row.seeds is not None and row.seeds <= few for row in rows)) == (claims, decide)
