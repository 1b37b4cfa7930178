"""Node-limited routing: the best 1, 2, 4 of 8 groups of experts, or all of them (report section 2.1.2)."""

from experiments.studies.framework.study import Claim, Study

STUDY = Study(
    name="routing_limit",
    base={"model.num_experts": 32, "model.experts_per_token": 4, "model.expert_ffn_dim": 32, "model.num_groups": 8},
    arms={f"{kept} of 8": {"model.groups_kept": kept} for kept in (1, 2, 4, 8)},
    quick_arms=("1 of 8", "8 of 8"),
    probe="experiments.studies.routing_limit.measure:copies",
    claims=(
        Claim("Two of eight nodes as the limit send fewer copies across nodes.", "nodes_per_token", "2 of 8", "8 of 8",
              "lower"),
        Claim("One node as the limit costs loss.", "loss", "1 of 8", "8 of 8", "higher"),
        Claim("Half of the nodes as the limit costs loss (the report trains with it).", "loss", "4 of 8", "8 of 8",
              "higher"),
    ))
