"""Loss-free balancing beside the auxiliary loss at several weights, and beside nothing (report section 2.1.2)."""

from experiments.studies.framework.study import Claim, Study

AUXILIARY = {"balance.bias_speed": 0.0}
STUDY = Study(
    name="load_balance",
    arms={
        "loss-free": {},
        "none": {"balance.bias_speed": 0.0},
        "aux 1e-3": {**AUXILIARY, "balance.aux_loss_weight": 1e-3},
        "aux 1e-2": {**AUXILIARY, "balance.aux_loss_weight": 1e-2},
        "aux 1e-1": {**AUXILIARY, "balance.aux_loss_weight": 1e-1},
    },
    quick_arms=("loss-free", "none", "aux 1e-2"),
    claims=(
        Claim("The bias balances the experts.", "max_vio_global", "loss-free", "none", "lower"),
        Claim("The bias balances better than the auxiliary loss at its usual weight.", "max_vio_global", "loss-free",
              "aux 1e-3", "lower"),
        Claim("The bias costs less loss than an auxiliary loss at its usual weight.", "loss", "loss-free", "aux 1e-3",
              "lower"),
        Claim("The bias costs less loss than an auxiliary loss that balances strongly.", "loss", "loss-free",
              "aux 1e-1", "lower"),
    ))
