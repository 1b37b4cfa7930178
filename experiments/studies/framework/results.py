"""From finished runs to results.json: means with 95 % intervals, judged claims, and the origin of the numbers."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

from deepseek_jax.config import ConfigError
from experiments.studies.framework.statistics import Estimate, difference, estimate, verdict
from experiments.studies.framework.study import Study

Runs = list[dict[str, Any]]


def by_arm(study: Study, runs: Runs) -> dict[str, Any]:
    """results.json of a study whose runs have metrics, curves, probes and arrays.

    Raises:
      ConfigError: the runs did not all read the same text, or those of a seed are of several machines or versions.
    """
    if len({json.dumps(run["corpus"]) for run in runs}) > 1:
        raise ConfigError(f"{study.name}: some of the finished runs read another text than the others (another Python, "
                          "or corpora.py has changed); take another --workdir, or delete the study's folder in it.")
    arms, seeds = {}, set.intersection(*_seeds(runs).values())
    for arm in dict.fromkeys(run["arm"] for run in runs):
        mine = {run["seed"]: run for run in runs if run["arm"] == arm}
        first = next(iter(mine.values()))
        arms[arm] = {
            "config": study.arms[arm], "steps": study.measure.steps(study, arm), "parameters": first["parameters"],
            "metrics": {name: {**interval(estimate([run["metrics"][name] for run in mine.values()])),
                               "seeds": {str(seed): run["metrics"][name] for seed, run in mine.items()}}
                        for name in first["metrics"]},
            "curves": {name: _means([run["curves"][name] for run in mine.values()]) for name in first["curves"]},
            "probes": {name: _means([run["probes"][name] for run in mine.values()]) for name in first["probes"]},
            "arrays": first["arrays"]}
    return {"study": study.name, "quick": study.quick, "config_hash": study.config_hash(), "seeds": sorted(seeds),
            "claims": judged(study, runs), "arms": arms, "corpus": runs[0]["corpus"],
            "command": f"python -m experiments.studies.{study.name}.run" + (" --quick" if study.quick else ""),
            "training_seconds_on_one_core": round(seconds(runs)), **origin(runs)}


def _seeds(runs):
    """{arm: its seeds}."""
    found = {}
    for run in runs:
        found.setdefault(run["arm"], set()).add(run["seed"])
    return found


def judged(study: Study, runs: Runs) -> list[dict[str, Any]]:
    """The claims whose arms have run, each with the paired difference and its verdict."""
    values = {}  # metric -> arm -> seed -> value
    for run in runs:
        for name, value in run["metrics"].items():
            values.setdefault(name, {}).setdefault(run["arm"], {})[run["seed"]] = value
    claims = []
    for claim in study.claims:
        there = values.get(claim.metric, {})
        if claim.arm in there and (claim.against in there or not isinstance(claim.against, str)):
            against = there[claim.against] if isinstance(claim.against, str) else claim.against
            found = difference(there[claim.arm], against)
            claims.append({**dataclasses.asdict(claim), "difference": interval(found),
                           "verdict": verdict(found, claim.expected)})
    return claims


def verdict_lines(results: dict[str, Any]) -> list[str]:
    """The judged claims in words."""
    lines = []
    for claim in results["claims"]:
        d = claim["difference"]
        bounds = "no interval" if d["low"] is None else f"[{d['low']:+.4g}, {d['high']:+.4g}]"
        lines.append(f"{claim['verdict'].upper()}: {claim['says']}\n  {claim['metric']} of {claim['arm']} minus "
                     f"{claim['against']}: {d['mean']:+.4g} {bounds} over {len(paired(results, claim))} seeds")
    return lines


def paired(results: dict[str, Any], claim: dict[str, Any]) -> list[str]:
    """The seeds that a claim of a results.json compares: those of both of its arms."""
    arms = [arm for arm in (claim["arm"], claim["against"]) if arm in results["arms"]]
    first, *other = (results["arms"][arm]["metrics"][claim["metric"]]["seeds"] for arm in arms)
    return [seed for seed in first if all(seed in theirs for theirs in other)]


def interval(found: Estimate) -> dict[str, float | None]:
    """As JSON data: None stands for infinity, which JSON does not have."""
    bound = lambda x: x if math.isfinite(x) else None
    return {"mean": found.mean, "low": bound(found.low), "high": bound(found.high)}


def _means(curves):
    return [sum(column) / len(column) for column in zip(*curves, strict=True)]


def seconds(runs: Runs) -> float:
    """The seconds that all runs took together."""
    return round(sum(run["seconds"] for run in runs), 1)


def origin(runs: Runs) -> dict[str, Any]:
    """The provenance of finished runs: the newest date, and where they differ, every machine and version.

    Raises:
      ConfigError: the runs of a seed are of several machines or versions, which round differently; arms are compared by
        seed.
    """
    machines, of_seed = {}, {}
    for run in runs:
        hardware, versions = run["made"]["hardware"], run["made"]["versions"]
        machines.setdefault(hardware, set()).add(run["seed"])
        of_seed.setdefault(run["seed"], set()).add("; ".join([hardware, *map(" ".join, versions.items())]))
    for seed, found in of_seed.items():
        if len(found) > 1:
            raise ConfigError(f"the arms of seed {seed} ran on several machines or versions, which round differently: "
                              f"{' and '.join(sorted(found))}. Measure all arms of a seed on one: --fresh, or another "
                              "--workdir.")
    name = lambda machine, mine: f"{machine} (seeds {', '.join(map(str, sorted(mine)))})"
    return {"date": max(run["made"]["date"] for run in runs),
            "hardware": "; ".join(name(*x) for x in machines.items()) if len(machines) > 1 else next(iter(machines)),
            "versions": {library: ", ".join(sorted({run["made"]["versions"][library] for run in runs}))
                         for library in runs[0]["made"]["versions"]}}


def provenance() -> dict[str, Any]:
    """The date, the machine and the versions of what this process measures."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers")
    return {"date": datetime.date.today().isoformat(), "hardware": f"{_cpu_model()}, {os.cpu_count()} cores",
            "versions": {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}}


def _cpu_model() -> str:
    """Its name, and family and model, since virtual machines call processors of several generations the same."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.machine()
    return f"{found['model name']}, family {found.get('cpu family')} model {found.get('model')}"
