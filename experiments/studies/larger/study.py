"""The four central claims with `small`, of 22M parameters where the models of the other studies have about 1.3M.

Each arm differs from the recipe in one thing: how the experts are balanced, whether there is multi-token prediction,
how large the experts are, and the attention (report sections 2.1.1, 2.1.2 and 2.2).
"""

import json
import pathlib
from typing import Any

from deepseek_jax.config.presets import PRESETS
from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.larger.attention import CACHE, attention_of

STUDIES = pathlib.Path(__file__).resolve().parents[1]
# Without groups of experts, as in the other studies, so that 13 experts need none either.
SMALL = {f"model.{name}": value for name, value in
         {**PRESETS["small"], "num_groups": 1, "groups_kept": 1, "mtp_depth": 0}.items()}
# 640 hidden units active in a MoE layer, as in the recipe (four of 32 and a shared one, 128 wide each).
FEW_LARGE = {"model.num_experts": 13, "model.experts_per_token": 2, "model.expert_ffn_dim": 320,
             "model.num_shared_experts": 0}
# What is compared here -> the same comparison with the small model: (label, arms here, study, arms there).
COMPARED = (
    ("the bias, against an\nauxiliary loss of 1e-3", ("recipe", "aux 1e-3"), "load_balance", ("loss-free", "aux 1e-3")),
    ("multi-token prediction,\nagainst none", ("MTP", "recipe"), "mtp", ("MTP", "none")),
    ("fine-grained and shared\nexperts, against few large", ("recipe", "few large"), "experts",
     ("finer, shared", "few large")),
    ("MLA, against MHA of as\nmany weights", ("recipe", "MHA"), "mla", ("MLA", "MHA")),
)


def draw(results: dict[str, Any], runs: list[dict[str, Any]], folder: pathlib.Path) -> None:
    made, (balance, apart) = plots.figure(4.2, 2, gridspec_kw={"width_ratios": [1, 1.7]})
    plots.intervals(balance, results, "max_vio_global")
    plots.logarithmic(balance, "x")
    plots.finish(balance, "Balance: left is better", "MaxVio_global (0: even loads)")
    for row, (_, here, study, there) in enumerate(COMPARED):
        small = json.loads((STUDIES / study / "results.json").read_text())
        _difference(apart, small, there, row - 0.14, "1.3M parameters", color=plots.PALETTE[0], marker="s")
        _difference(apart, results, here, row + 0.14, "22M parameters", color=plots.PALETTE[1], marker="o")
    apart.axvline(0, color="0.4", linewidth=1)
    apart.set_yticks(range(len(COMPARED)), [label for label, *_ in COMPARED], fontsize=plots.SMALL)
    apart.set_ylim(len(COMPARED) - 0.4, -0.6)
    plots.legend(apart, loc="lower left")
    plots.finish(apart, "Loss, paired: left of 0 the report's choice is better", "nats per token")
    plots.save(made, folder / "larger.png", plots.INTERVALS)


def _difference(axis, results, arms, height, size, **style):
    """The mean difference of loss of two arms with its interval, if the results have both."""
    for claim in results["claims"]:
        if (claim["metric"], claim["arm"], claim["against"]) == ("loss", *arms):
            mean, low, high = (claim["difference"][x] for x in ("mean", "low", "high"))
            bars = None if low is None else [[mean - low], [high - mean]]
            named = size not in axis.get_legend_handles_labels()[1]
            axis.errorbar(mean, height, xerr=bars, capsize=3, linestyle="", label=size if named else None, **style)


STUDY = Study(
    name="larger",
    arms={"recipe": {}, "aux 1e-3": {"balance.bias_speed": 0.0, "balance.aux_loss_weight": 1e-3},
          "MTP": {"model.mtp_depth": 1}, "few large": FEW_LARGE, "MHA": {}},
    measure=Training(base={**SMALL, "optimizer.learning_rate": 2e-3}, quick={"model.expert_ffn_dim": 32},
                     network=attention_of),
    draw=draw,
    seeds=tuple(range(4)),
    quick_arms=("recipe", "few large"),
    claims=(
        Claim("The bias balances better than the auxiliary loss at its usual weight.", "max_vio_global", "recipe",
              "aux 1e-3", "lower"),
        Claim("The bias costs less loss than an auxiliary loss at its usual weight.", "loss", "recipe", "aux 1e-3",
              "lower"),
        Claim("Predicting the token after next as well makes the main head better.", "loss", "MTP", "recipe", "lower"),
        Claim("Fine-grained experts and a shared one beat few large ones.", "loss", "recipe", "few large", "lower"),
        Claim(f"MLA learns better than MHA, from a cache of {CACHE['recipe']} numbers instead of {CACHE['MHA']}.",
              "loss", "recipe", "MHA", "lower"),
    ))
