"""Notes on settings that are allowed but rarely intended, one line each."""

from __future__ import annotations

from deepseek_jax.config.load import Config


def advice(config: Config) -> list[str]:
    """Notes on a valid config, for the person who starts the run."""
    model, balance, notes = config.model, config.balance, []
    moves = model.num_moe_layers > 0 and model.has_router_bias and balance.bias_speed > 0
    if moves and model.score == "softmax":
        notes.append(f"model.score='softmax' with a routing bias: the scores of {model.num_experts} experts are about "
                     f"{1 / model.num_experts:.2g}, and the bias moves by balance.bias_speed={balance.bias_speed:g} a "
                     "step; take model.router_bias='none' (as V2), or a smaller speed.")
    if moves and balance.aux_loss_weight > 0:
        notes.append("two balancers at once: the routing bias and balance.aux_loss_weight; take "
                     "balance.bias_speed=0 for the loss alone, or balance.aux_loss_weight=0 for the bias alone.")
    if balance.force_balanced:
        notes.append("balance.force_balanced=True is for measuring speed: experts are assigned in turn, and no "
                     "routing is learned.")
    return notes
