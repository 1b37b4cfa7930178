"""Multi-token prediction against none, on the same data (report section 2.2)."""

from experiments.studies.framework.study import Claim, Study

STUDY = Study(
    name="mtp",
    arms={"none": {}, "MTP": {"model.mtp_depth": 1}},
    quick_arms=("none", "MTP"),
    probe="experiments.studies.mtp.measure:acceptance", probes=6,
    base={"train.steps": 360},
    claims=(
        Claim("Predicting the token after next as well makes the main head better.", "loss", "MTP", "none", "lower"),
        Claim("The second token is accepted in 85 to 90 % of the cases (greedy decoding, at least 85 %).",
              "acceptance_decoding", "MTP", 0.85, "higher"),
        Claim("Drafts get better while the model learns (held-out text, from a sixth of the run to its end).",
              "acceptance_greedy_gained", "MTP", 0.0, "higher"),
        Claim("The module drafts better than a table of which token follows which.", "acceptance_over_bigrams",
              "MTP", 0.0, "higher"),
        Claim("A pass of the main model gives more than one token (tokens a pass, greedy decoding).",
              "tokens_per_pass", "MTP", 1.0, "higher"),
    ))
