"""Balance inside every sequence, or only over a batch: what it does to experts' specialisation (report section 4.5.3).

The text is of three kinds in equal shares: code, prose, tables.
"""

from experiments.studies.framework.study import Claim, Study

NO_BIAS = {"balance.bias_speed": 0.0}
STUDY = Study(
    name="balance_scope",
    base={"data.sources": (("corpus/code", 1.0), ("corpus/prose", 1.0), ("corpus/tables", 1.0))},
    quick={"data.sources": (("corpus/code", 1.0), ("corpus/prose", 1.0), ("corpus/tables", 1.0))},
    corpus="kinds",
    arms={"loss-free": {}, "batch-wise": {**NO_BIAS, "balance.aux_loss_weight": 0.1},
          "sequence-wise": {**NO_BIAS, "balance.sequence_loss_weight": 0.1}},
    quick_arms=("loss-free", "sequence-wise"),
    probe="experiments.studies.balance_scope.measure:specialisation",
    claims=(
        Claim("Balance inside every sequence leaves experts less specialised than the bias does.", "specialisation",
              "sequence-wise", "loss-free", "lower"),
        Claim("Balance inside every sequence leaves experts less specialised than balance over a batch.",
              "specialisation", "sequence-wise", "batch-wise", "lower"),
        Claim("The bias has a lower loss than balance inside every sequence.", "loss", "loss-free", "sequence-wise",
              "lower"),
        Claim("Balance over a batch has a lower loss than inside every sequence.", "loss", "batch-wise",
              "sequence-wise", "lower"),
    ))
