"""The number of seeds that would decide each open claim, estimated from the existing paired differences.

    python -m experiments.studies.framework.power            prints the tables
    python -m experiments.studies.framework.power --write    also puts each into its study's README

A claim is open if the interval of its difference contains zero. The assumed effect is the published one, if the report
or a paper states it in the same unit, and otherwise the observed one, whichever its direction. The result is the number
of seeds with which a paired t-test at the 5 % level finds that effect in 80 of 100 repetitions, assuming the observed
scatter between seeds. A scatter estimated from three seeds may be wrong by a factor of two or more, and the number of
seeds by a factor of four or more.
"""

import argparse
import importlib
import json
import math
import pathlib
import re
from typing import Any, NamedTuple

from scipy.stats import nct
from scipy.stats import t as student

from deepseek_jax import cli, io
from experiments.studies.framework.results import paired
from experiments.studies.framework.statistics import NOT_VISIBLE

STUDIES = pathlib.Path(__file__).resolve().parents[1]
LEVEL, POWER = 0.05, 0.8
MOST = 10_000  # seeds
AFFORDABLE = 10.0  # hours of two cores, for one claim
# {(study, metric, arm, against): size of the effect in the metric's unit}, as in docs/claims.md: loss-free balancing
# against the auxiliary loss, and steps in proportion against signs, from arXiv 2408.15664 (logarithms of perplexities
# are nats); sequence-wise balance from the report, section 4.5.3.
PUBLISHED = {
    ("load_balance", "loss", "loss-free", "aux 1e-3"): 0.006,
    ("bias_rule", "max_vio_global", "proportional 2e-2", "sign 5e-3"): 0.044 - 0.028,
    ("bias_rule", "loss", "proportional 2e-2", "sign 5e-3"): math.log(9.52 / 9.50),
    ("balance_scope", "loss", "loss-free", "sequence-wise"): 2.258 - 2.253,
    ("balance_scope", "loss", "batch-wise", "sequence-wise"): 2.258 - 2.253,
}
START, END = "<!-- power: start -->", "<!-- power: end -->"


class Needed(NamedTuple):
    """The effort to decide one claim.

    effect: assumed, in the metric's unit.
    basis: where it is from.
    seeds: None beyond MOST.
    hours: of two cores, for both arms and those that they continue from.
    at_eight: the effect that eight seeds would find.
    """

    says: str
    effect: float
    basis: str
    seeds: int | None
    hours: float
    at_eight: float


def power(effect: float, scatter: float, seeds: int) -> float:
    """The chance that the 95 % interval of `seeds` paired differences does not contain zero.

    Args:
      effect: their mean. scatter: their standard deviation.
    """
    edge, centre = student.ppf(1 - LEVEL / 2, seeds - 1), effect / scatter * math.sqrt(seeds)
    if centre > edge + 10:  # certain, and out of range for scipy's series
        return 1.0
    # On the wrong side of zero; far away it vanishes, and is NaN in scipy.
    other = nct.cdf(-edge, seeds - 1, centre) if centre < 5 else 0.0
    return float(nct.sf(edge, seeds - 1, centre) + other)


def seeds_for(effect: float, scatter: float) -> int | None:
    """The smallest number of seeds, at least 2, that finds `effect` with a chance of POWER; None: more than MOST."""
    if not effect or power(effect, scatter, MOST) < POWER:
        return None
    low, high = 1, MOST  # `high` does, `low` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, scatter, middle) >= POWER else (middle, high)
    return high


def effect_for(scatter: float, seeds: int) -> float:
    """The effect that this many seeds find with a chance of POWER."""
    low, high = 0.0, 10 * scatter
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, scatter, seeds) >= POWER else (middle, high)
    return high


def needed(results: dict[str, Any]) -> list[Needed]:
    """The effort to decide the open claims of a results.json."""
    rows = []
    study = results["study"]
    run = results["training_seconds_on_one_core"] / sum(map(_runs, results["arms"].values()))
    for claim in results["claims"]:
        found = claim["difference"]
        if claim["verdict"] != NOT_VISIBLE or found["low"] is None:
            continue
        n = len(paired(results, claim))
        scatter = (found["high"] - found["low"]) / 2 * math.sqrt(n) / student.ppf(1 - LEVEL / 2, n - 1)
        if not scatter:
            continue
        published = PUBLISHED.get((study, claim["metric"], claim["arm"], claim["against"]))
        effect = published or abs(found["mean"])
        seeds = seeds_for(effect, scatter)
        hours = (seeds or MOST) * len(_arms(study, claim)) * run / 2 / 3600
        rows.append(Needed(claim["says"], effect, _basis(claim, published), seeds, hours, effect_for(scatter, 8)))
    return rows


def _runs(arm):
    """How many runs, one a seed, are of this arm."""
    return len(next(iter(arm["metrics"].values()))["seeds"])


def _arms(study, claim) -> set[str]:
    """The arms that a claim compares, and those that they continue from."""
    after = importlib.import_module(f"experiments.studies.{study}.study").STUDY.measure.after
    todo, found = [claim["arm"], claim["against"]], set()
    while todo:
        arm = todo.pop()
        if isinstance(arm, str) and arm not in found:  # the other may be a number
            found.add(arm)
            todo.append(after.get(arm))
    return found


def _basis(claim, published):
    found, sign = claim["difference"], 1 if claim["expected"] == "higher" else -1
    if published:
        return "published" if found["low"] <= sign * published <= found["high"] else "published, excluded"
    return "seen" if sign * found["mean"] > 0 else "seen, against the claim"


def table(rows: list[Needed]) -> list[str]:
    """Rows as Markdown."""
    lines = ["| open claim | effect looked for | seeds | hours of two cores | 8 seeds would find |",
             "|---|---|---|---|---|"]
    for row in rows:
        seeds = f"more than {MOST:,}" if row.seeds is None else f"{row.seeds:,}"
        cost = "" if row.hours <= AFFORDABLE else ": too many"
        lines.append(f"| {row.says} | {row.effect:.2g}, {row.basis} | {seeds} | "
                     f"{'more than ' if row.seeds is None else ''}{row.hours:.2g}{cost} | {row.at_eight:.2g} |")
    return lines


def section(rows: list[Needed]) -> str:
    """The section for a study's README."""
    intro = ("**What would decide what is open.** Paired seeds that would find the effect with a chance of 80 %, if "
             "they scatter as these did\n(`python -m experiments.studies.framework.power`):")
    return "\n".join([START, intro, "", *table(rows), END])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.framework.power", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put each table into the README of its study")
    args = parser.parse_args()
    for path in sorted(STUDIES.glob("*/results.json")):
        results = json.loads(path.read_text())
        rows = needed(results) if results.get("claims") else []
        if rows:
            print("\n".join([path.parent.name, *table(rows), ""]))
        if args.write:
            readme = path.with_name("README.md")
            text = re.sub(rf"\n*{START}.*{END}\n*", "\n", readme.read_text(), flags=re.S).rstrip()
            io.write_text(readme, "\n\n".join([text, *([section(rows)] if rows else [])]) + "\n")


if __name__ == "__main__":
    cli.run(main)
