"""The numbers of the page, computed by the library: no number that the page shows was entered by hand.

The page has arithmetic of its own, so that it can respond while a control is dragged. This module has the data that the
page starts from (schedules, counts, constants, a trained model's drafts) and a few results that it must reproduce.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError, ModelConfig, model_config
from deepseek_jax.model import router
from deepseek_jax.pipeline.orders import Cell
from deepseek_jax.pipeline.schedule import NAMES, make_schedule
from deepseek_jax.pipeline.validate import validate
from deepseek_jax.scale import costs, plan
from deepseek_jax.scale.hardware import HARDWARE
from docs.explore import quiz
from kernels_pallas.api import dequantize, quantize
from kernels_pallas.constants import BLOCK
from kernels_pallas.formats import E4M3
from kernels_pallas.reference.quantize import SMALLEST_AMAX

FOLDER = pathlib.Path(__file__).resolve().parent
AFFINITIES = (0.90, 0.16, 0.26)  # of a token to three experts
EXPERTS, CHOSEN, TOKENS, STEPS = 64, 6, 1024, 120  # of the simulation
SPEED, SKEW = 0.01, 1.0  # at which it starts
SPREAD = 1.7320508  # of a sum of four uniform numbers, to a variance of 1
RANKS, MICROBATCHES = (2, 4, 6, 8), (4, 8, 12, 16, 20, 24)
MODELS = ("v3_671b", "v2_236b", "v2_lite_16b", "moonlight_16b", "kimi_k2_1t", "tiny")
LENGTH = 4096  # tokens of a sequence in pre-training (report, section 4.2)
PER_TRILLION = 180e3  # H800 hours (report, section 1)
SCALES = {"tensor": {"share": "tensor"}, "tile": {}, "power_of_two": {"scale": "power_of_two"}}
LETTERS = {"F": "F", "B": "B", "Bi": "I", "W": "W"}


def collect() -> dict[str, Any]:
    """All numbers of the page, JSON-able."""
    return {"routing": routing(), "fp8": fp8(), "pipeline": pipeline(), "cost": cost(),
            "drafts": json.loads((FOLDER / "drafts.json").read_text(encoding="utf-8")), "quiz": quiz.questions()}


def one_layer(experts: int, chosen: int, normalize: bool) -> ModelConfig:
    """A router without groups, whose gates are plain affinities or sum to one."""
    return model_config("tiny", num_experts=experts, experts_per_token=chosen, num_groups=1, groups_kept=1,
                        normalize_gates=normalize, route_scale=1.0)


def three(affinities: tuple[float, ...], bias: tuple[float, ...], chosen: int, normalize: bool) -> dict[str, Any]:
    """The experts, of three, that a token goes to, and the gate of each expert (0 for the others)."""
    cfg = one_layer(len(affinities), chosen, normalize)
    scores_1E = jnp.array([affinities], jnp.float32)
    chosen_1K = router.select(cfg, scores_1E, jnp.array(bias, jnp.float32))
    gates_E = np.zeros(len(affinities))
    gates_E[np.asarray(chosen_1K[0])] = np.asarray(router.gates(cfg, scores_1E, chosen_1K)[0])
    return {"chosen": sorted(np.asarray(chosen_1K[0]).tolist()), "gates": [round(float(g), 6) for g in gates_E]}


def uniform(seed: int, count: int) -> np.ndarray:
    """float64 [count] in [0, 1): mulberry32, which the page has too. Its n-th number needs none before it."""
    state = np.uint32(seed) + np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x6D2B79F5)
    x = (state ^ (state >> np.uint32(15))) * (state | np.uint32(1))
    x ^= x + (x ^ (x >> np.uint32(7))) * (x | np.uint32(61))
    return (x ^ (x >> np.uint32(14))).astype(np.float64) / 2**32


def bell(seed: int, count: int) -> np.ndarray:
    """float64 [count], about normal: a sum of four uniform numbers, without a logarithm that browsers round."""
    return (uniform(seed, 4 * count).reshape(count, 4).sum(axis=1) - 2) * SPREAD


def affinities(step: int, skew: float, popularity_E: np.ndarray) -> np.ndarray:
    """float32 [N, E] of a step's tokens: sigmoid(skew * popularity + noise)."""
    noise_NE = bell(1000 + step, TOKENS * len(popularity_E)).reshape(TOKENS, -1)
    return (1 / (1 + np.exp(-(skew * popularity_E[None] + noise_NE)))).astype(np.float32)


def simulate(speed: float = SPEED, skew: float = SKEW, steps: int = STEPS) -> list[float]:
    """MaxVio of every step of a layer whose tokens prefer some experts, while the library moves the bias."""
    cfg, popularity_E = one_layer(EXPERTS, CHOSEN, True), bell(7, EXPERTS)
    bias_1E, found = jnp.zeros((1, EXPERTS), jnp.float32), []
    for step in range(steps):
        chosen_NK = router.select(cfg, jnp.asarray(affinities(step, skew, popularity_E)), bias_1E[0])
        counts_E = router.count_choices(chosen_NK, EXPERTS)
        found.append(float(counts_E.max() / (TOKENS * CHOSEN / EXPERTS) - 1))
        bias_1E = router.update_bias(bias_1E, counts_E[None], speed)
    return found


def routing() -> dict[str, Any]:
    """Three experts by hand, and a simulation of 64."""
    biases = ((0.0, 0.0, 0.0), (-0.5, 0.0, 0.2), (-0.8, 0.2, 0.0), (0.0, 0.2, 0.0))
    examples = [{"bias": bias, "experts": chosen, "normalize": normalize, **three(AFFINITIES, bias, chosen, normalize)}
                for bias in biases for chosen, normalize in ((1, False), (2, False), (2, True))]
    return {"affinities": AFFINITIES, "examples": examples, "experts": EXPERTS, "chosen": CHOSEN, "tokens": TOKENS,
            "steps": STEPS, "speed": SPEED, "skew": SKEW, "report_speed": model_speed(),
            "max_vio": [round(x, 6) for x in simulate()], "max_vio_unmoved": [round(x, 6) for x in simulate(speed=0.0)]}


def model_speed() -> float:
    """The change of a bias per step in the report's recipe."""
    from deepseek_jax.config import default_config

    return float(default_config("v3_671b").balance.bias_speed)


def fp8_row(outlier: float, same_tile: bool) -> np.ndarray:
    """float32 [1, 256]: two tiles of ordinary numbers, and one outlier; the reader's own number replaces the first.

    An outlier may be at two positions; the other one is 0.
    """
    row = np.round(bell(11, 2 * BLOCK), 3).astype(np.float32)
    row[[1, BLOCK]] = 0
    row[1 if same_tile else BLOCK] = outlier
    return row[None]


def rounded(row: np.ndarray, kind: str) -> dict[str, Any]:
    """A row quantized with one kind of scale: its first number and the scale of that number; for all numbers the mean
    relative error, and how many became 0.
    """
    q = quantize(jnp.asarray(row), **SCALES[kind])
    there, back = row[row != 0].astype(np.float64), np.asarray(dequantize(q))
    error = float(np.mean(np.abs(back[row != 0] - there) / np.abs(there)))
    return {"scale": float(q.scales[0, 0]), "value": float(q.values[0, 0].astype(jnp.float32)),
            "back": float(back[0, 0]), "error": round(error, 6), "zeros": int((back[row != 0] == 0).sum())}


def fp8() -> dict[str, Any]:
    """The format's constants, the numbers that share a scale with the reader's, and examples."""
    info = jnp.finfo(E4M3)
    examples = []
    for number, outlier, same in ((0.3, 1.0, False), (0.3, 1e5, False), (0.3, 1e5, True), (3.1416, 1e3, False)):
        row = fp8_row(outlier, same)
        row[0, 0] = number
        examples += [{"number": number, "outlier": outlier, "same_tile": same, "kind": kind, **rounded(row, kind)}
                     for kind in SCALES]
    return {"largest": float(info.max), "smallest_normal": float(info.smallest_normal),
            "smallest": float(info.smallest_subnormal), "mantissa": int(info.nmant), "block": BLOCK,
            "smallest_amax": SMALLEST_AMAX, "row": [round(float(x), 3) for x in fp8_row(0.0, True)[0]],
            "examples": examples}


def encoded(cell: Cell) -> str:
    """A cell in a few letters: "F3" is a forward pass of micro-batch 3, "f3" one of the other direction, "I" is Bi."""
    return "&".join((LETTERS[op.kind] if op.direction == 0 else LETTERS[op.kind].lower()) + str(op.microbatch)
                    for op in cell)


def pipeline() -> dict[str, Any]:
    """The orders of every rank, for all schedules and sizes that the page offers; error messages for refused ones."""
    orders, refused, reports = {}, {}, {}
    for name in NAMES:
        for ranks in RANKS:
            for microbatches in MICROBATCHES:
                key = f"{name},{ranks},{microbatches}"
                try:
                    schedule = make_schedule(name, ranks, microbatches)
                except ConfigError as error:
                    refused[key] = str(error)
                    continue
                orders[key] = ["".join(f"{encoded(cell)} " for cell in schedule.order(rank)).strip()
                               for rank in range(ranks)]
                found = validate(schedule)
                reports[key] = {"makespan": found.makespan, "idle": found.idle, "bubble": found.bubble,
                                "activations": max(found.peak_activations)}
    return {"names": NAMES, "ranks": RANKS, "microbatches": MICROBATCHES, "orders": orders, "refused": refused,
            "reports": reports}


def counted(name: str) -> dict[str, float]:
    """A model's parameters, and the operations of one token in training without MTP, as published figures count."""
    cfg = model_config(name, mtp_depth=0)
    found = costs.conventions(cfg)
    return {"parameters": found["main model"], "active": found["active, without the input embedding"],
            "flops": costs.training_flops_per_token(cfg, LENGTH)}


def cost() -> dict[str, Any]:
    """The parts of the published cost."""
    return {"per_trillion": PER_TRILLION, "tokens": plan.TOKENS, "context": plan.AFTERWARDS["context extension"],
            "post_training": plan.AFTERWARDS["post-training"], "price": HARDWARE["h800"].price,
            "peak": HARDWARE["h800"].bf16, "devices": 2048, "length": LENGTH,
            "models": {name: counted(name) for name in MODELS}}
