"""The models that are compared, and how many steps of each make an equal budget (no jax).

All have the same attention and three layers. Of FFN weights a token visits as many in the mixture as in "active", and
the mixture has in total as many, router included, as "total".
"""

import json
import pathlib

from deepseek_jax.config import ModelConfig
from deepseek_jax.scale.costs import training_flops_per_token
from experiments.studies.framework.training import MODEL

SECONDS = pathlib.Path(__file__).with_name("seconds.json")  # of a step, by kind, written by timing.py
STEPS = 300  # of the mixture
LONG = 4  # times as many steps
TOKENS = 8 * 128  # of a step
# In each of the two MoE layers 16 experts and a shared one, 64 wide, of which a token visits 3; else 192 wide.
WIDTH, DENSE = {"model.dense_ffn_dim": 192}, {"model.num_dense_layers": 3}
KINDS = {"mixture": WIDTH, "active": {**WIDTH, **DENSE}, "total": {**DENSE, "model.dense_ffn_dim": 793}}


def model(kind: str) -> ModelConfig:
    """The complete config of a kind."""
    return ModelConfig(**{**MODEL, **{name.removeprefix("model."): value for name, value in KINDS[kind].items()}})


def flops(kind: str) -> float:
    """FLOPs of one training step; masked products are not counted."""
    return TOKENS * training_flops_per_token(model(kind), 128)


def seconds(kind: str) -> float:
    """Seconds of one training step on all cores of the machine that seconds.json names."""
    return json.loads(SECONDS.read_text())["seconds"][kind]


def steps(kind: str, budget: str) -> int:
    """Steps of `kind` that take as many "tokens", as much "compute" or as much "time" as STEPS of the mixture; "long":
    LONG times the tokens."""
    if budget == "long":
        return LONG * STEPS
    cost = {"tokens": lambda kind: 1.0, "compute": flops, "time": seconds}[budget]
    return round(STEPS * cost("mixture") / cost(kind))
