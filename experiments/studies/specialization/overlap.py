"""Whether experts of other seeds are the same experts in another order: from the choices of the same held-out tokens.

    python -m experiments.studies.specialization.overlap       reads the finished runs, writes overlap.json

For each pair of seeds and each layer, experts are matched one to one so that as many choices as possible agree. With
the same loads and nothing else in common, the share that agrees after matching is about that of `chance`: the second
model's tokens in another order.
"""

import argparse
import itertools
import json
import pathlib
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from deepseek_jax import cli, io
from deepseek_jax.config import ConfigError, ModelConfig
from experiments.studies.framework.results import provenance
from experiments.studies.framework.runner import ROOT, finished, run_folder
from experiments.studies.framework.source import digest
from experiments.studies.specialization.study import STUDY

OUT = pathlib.Path(__file__).with_name("overlap.json")


def choices(cfg: ModelConfig, digits: str) -> np.ndarray:
    """bool [L, N, E] of a run's hexadecimal digits [L, N, K]: whether a token chose an expert; L, the MoE layers."""
    layers = cfg.num_layers - cfg.num_dense_layers
    chosen_LNK = np.array([int(digit, 16) for digit in digits]).reshape(layers, -1, cfg.experts_per_token)
    return (chosen_LNK[..., None] == np.arange(cfg.num_experts)).any(axis=2)


def agreement(one_NE: np.ndarray, other_NE: np.ndarray) -> float:
    """The share of one model's choices that the other makes too, with its experts in the order that agrees best."""
    both_EE = one_NE.T.astype(float) @ other_NE.astype(float)
    return float(both_EE[linear_sum_assignment(-both_EE)].sum() / one_NE.sum())


def overlap(cfg: ModelConfig, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """{arm: agreement of pairs of seeds, mean of the layers, and that of chance}.

    Pairs share seeds, so their scatter gives no interval: the smallest and the largest value are given.
    """
    found, rng = {}, np.random.default_rng(0)
    for arm in dict.fromkeys(run["arm"] for run in runs):
        seeds = [choices(cfg, run["arrays"]["chosen"]) for run in runs if run["arm"] == arm]
        pairs = [[(a, b) for a, b in zip(*pair)] for pair in itertools.combinations(seeds, 2)]
        agree = [float(np.mean([agreement(a, b) for a, b in pair])) for pair in pairs]
        chance = [float(np.mean([agreement(a, rng.permutation(b)) for a, b in pair])) for pair in pairs]
        if agree:
            found[arm] = {"mean": float(np.mean(agree)), "least": min(agree), "largest": max(agree),
                          "chance": float(np.mean(chance)), "pairs": len(agree)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.specialization.overlap",
                                     description="Compares the experts of seeds, from finished runs.")
    parser.add_argument("--quick", action="store_true", help="of the short form; writes nothing")
    parser.add_argument("--workdir", default=str(ROOT / ".cache" / "studies"), help="of all studies")
    args = parser.parse_args()
    study = STUDY.shortened() if args.quick else STUDY
    runs = finished(study, run_folder(study, pathlib.Path(args.workdir).resolve()), digest(study))
    selected = study.selected()
    if missing := sum(map(len, selected.values())) - len(runs):
        raise ConfigError(f"{study.name}: {missing} runs are not finished; start python -m experiments.studies."
                          f"{study.name}.run{' --quick' * args.quick}.")
    # All arms have the same model.
    found = overlap(study.measure.config(study, next(iter(selected))).model, runs)  # pyright: ignore[reportAttributeAccessIssue]
    print(json.dumps(found, indent=1))
    if not args.quick:
        io.write_json(OUT, {"arms": found, **provenance()}, indent=1)


if __name__ == "__main__":
    cli.run(main)
