"""Node-limited routing: the best 1, 2, 4 of 8 groups of experts, or all of them (report section 2.1.2)."""

import pathlib

from experiments.studies.framework import plots
from experiments.studies.framework.study import Claim, Study
from experiments.studies.framework.training import Training
from experiments.studies.routing_limit.measure import copies


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    made, (both, apart) = plots.figure(4, 2)
    plots.scatter(both, results, "nodes_per_token", "loss")
    plots.legend(both, title="nodes allowed", loc="center", bbox_to_anchor=(0.63, 0.5))
    plots.finish(both, "Loss against copies: lower left is better", "nodes that a token is sent to",
                 "held-out loss, nats per token")
    plots.differences(apart, results, "loss", [(arm, "8 of 8") for arm in results["arms"] if arm != "8 of 8"])
    plots.finish(apart, "What a limit costs, paired by seed", "nats per token (right of 0: the limit costs loss)")
    plots.save(made, folder / "routing_limit.png", plots.INTERVALS)


STUDY = Study(
    name="routing_limit",
    arms={f"{kept} of 8": {"model.groups_kept": kept} for kept in (1, 2, 4, 8)},
    measure=Training(base={"model.num_experts": 32, "model.experts_per_token": 4, "model.expert_ffn_dim": 32,
                           "model.num_groups": 8}, probe=copies),
    draw=draw,
    seeds=tuple(range(8)),
    quick_arms=("1 of 8", "8 of 8"),
    claims=(
        Claim("Two of eight nodes as the limit send fewer copies across nodes.", "nodes_per_token", "2 of 8", "8 of 8",
              "lower"),
        Claim("One node as the limit costs loss.", "loss", "1 of 8", "8 of 8", "higher"),
        Claim("Half of the nodes as the limit costs loss (the report trains with it).", "loss", "4 of 8", "8 of 8",
              "higher"),
    ))
