"""Which optimizers are compared, at which rates, and how many steps of Muon take as long as AdamW's (no jax)."""

import json
import pathlib
from typing import Any

SECONDS = pathlib.Path(__file__).with_name("seconds.json")  # of a step, by optimizer, written by timing.py
STEPS = 300
TAU = 4.0  # far below the 100 of Kimi K2: the logits of a run of this length are small
KINDS = {"AdamW": {}, "Muon": {"optimizer.kind": "muon"}}
RATES = {"half": 1.5e-3, "": 3e-3, "twice": 6e-3, "four times": 1.2e-2}


def arms() -> dict[str, dict[str, Any]]:
    """{name of an arm: its keys}."""
    rates = {f"{kind}, {rate} the rate" if rate else kind: {**keys, "optimizer.learning_rate": value}
             for kind, keys in KINDS.items() for rate, value in RATES.items()}
    best = "Muon, twice the rate"
    return {**rates, f"{best}, equal time": {**rates[best], "train.steps": equal_time_steps()},
            "Muon, QK-clip": {**KINDS["Muon"], "optimizer.qk_clip": TAU}}


def equal_time_steps() -> int:
    """Steps of Muon that take as long as STEPS of AdamW on the machine that seconds.json names."""
    seconds = json.loads(SECONDS.read_text())["seconds"]
    return round(STEPS * seconds["AdamW"] / seconds["Muon"])
