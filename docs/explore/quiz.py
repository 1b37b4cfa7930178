"""Ten questions. The library computes the right answers, so a question follows when its answer changes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import model_config
from deepseek_jax.model import router
from deepseek_jax.pipeline.schedule import make_schedule
from deepseek_jax.pipeline.validate import validate
from deepseek_jax.scale import costs, plan
from deepseek_jax.scale.hardware import HARDWARE
from kernels_pallas.api import dequantize, quantize

AFFINITIES = (0.90, 0.16, 0.26)


def questions() -> list[dict[str, Any]]:
    """[{"question", "choices", "right": index of a choice, "why"}]."""
    return [*of_routing(), *of_attention_and_drafts(), *of_numbers(), *of_pipelines_and_cost()]


def question(text: str, choices: tuple[str, ...], right: str, why: str) -> dict[str, Any]:
    """One question. Raises ValueError if the right answer is none of the choices."""
    return {"question": text, "choices": choices, "right": choices.index(right), "why": why}


def gate(bias: tuple[float, ...], chosen: int) -> np.ndarray:
    """Gates of three experts, normalized as in V3."""
    cfg = model_config("tiny", num_experts=3, experts_per_token=chosen, num_groups=1, groups_kept=1, route_scale=1.0)
    scores_1E = jnp.array([AFFINITIES], jnp.float32)
    chosen_1K = router.select(cfg, scores_1E, jnp.array(bias, jnp.float32))
    gates_E = np.zeros(3)
    gates_E[np.asarray(chosen_1K[0])] = np.asarray(router.gates(cfg, scores_1E, chosen_1K)[0])
    return gates_E


def of_routing() -> list[dict[str, Any]]:
    """Bias and affinity."""
    before, after = gate((0, 0, 0), 2), gate((0.3, 0, 0), 2)
    change = float(np.abs(after - before).max())
    swapped = gate((0, 0.2, 0), 2)
    moved = float(router.update_bias(jnp.zeros((1, 3)), jnp.array([[290, 5, 5]]), 0.01)[0, 0])
    v3 = model_config("v3_671b")
    nodes = v3.groups_kept
    return [
        question("Affinities are 0.90, 0.16 and 0.26, two experts are chosen. The bias of the first rises by 0.3, and "
                 "the same two are chosen. What happens to their gates?",
                 ("they change by 0.3", "they sum to more than 1", "nothing"), "nothing" if change == 0 else "?",
                 "The bias decides which experts are chosen. The gates depend only on affinities, which are the same."),
        question("Now the second expert's bias is 0.2, so the first and the second are chosen. What is the second's "
                 "gate?", ("0.36 / (0.90 + 0.36)", "0.16 / (0.90 + 0.16)", "0.16"),
                 "0.16 / (0.90 + 0.16)" if abs(swapped[1] - 0.16 / 1.06) < 1e-6 else "?",
                 f"Its affinity divided by the sum of the chosen affinities: {swapped[1]:.2f}. The bias of 0.2 decided "
                 "the choice, but is not part of the gate."),
        question("An expert gets 290 of 300 tokens, the speed is 0.01. What is added to its bias?",
                 ("-0.01", "-0.95", "-1.9"), f"{moved:g}",
                 "The sign rule: the bias moves by one speed against the load error, however large it is. So a bias "
                 "needs many steps, and in the end oscillates by one speed."),
        question(f"How many of its {v3.num_experts} routed experts does a token of V3 use in a layer, and in how "
                 "many of the 8 groups?", ("8, in at most 4", "8, in at most 8", "256, in 8"),
                 f"{v3.experts_per_token}, in at most {nodes}",
                 "Groups are nodes in the report's layout. A token is sent to at most four of them, which bounds the "
                 "traffic on the slow network between nodes.")]


def of_attention_and_drafts() -> list[dict[str, Any]]:
    """The contents of a cache, and the value of a draft."""
    v3 = model_config("v3_671b")
    latent, full = v3.kv_rank + v3.rope_head_dim, 2 * v3.num_heads * v3.v_head_dim
    return [
        question(f"Plain attention with {v3.num_heads} heads of {v3.v_head_dim} would cache {full:,} numbers per "
                 "token and layer. How many does MLA cache?", ("4,096", "576", "16,384"), f"{latent}",
                 f"A latent of {v3.kv_rank} numbers for all heads, and one rotary key of {v3.rope_head_dim}."),
        question("A draft of the MTP module is wrong. What happens to the text?",
                 ("it gets a little worse", "nothing, only time is lost", "the model starts over"),
                 "nothing, only time is lost",
                 "The model checks every draft and keeps those that it would have written itself. A rejected draft "
                 "costs only its own computation; the text is the same with and without drafts.")]


def of_numbers() -> list[dict[str, Any]]:
    """FP8."""
    row = jnp.full((1, 256), 0.3).at[0, 1::2].set(1.0).at[0, 200].set(100_000.0)
    off = {share: float(abs(dequantize(quantize(row, share=share))[0, 0] - 0.3) / 0.3) for share in ("tile", "tensor")}
    worse = off["tensor"] > 2 * off["tile"]
    scale = float(quantize(row, scale="power_of_two").scales[0, 0])
    return [
        question("256 numbers are 0.3 or 1, but one of the second 128 is 100,000. How should 0.3 be stored in FP8?",
                 ("with one scale for all 256", "with one scale for each 128", "it makes no difference"),
                 "with one scale for each 128" if worse else "it makes no difference",
                 f"With one scale for all, 0.3 has an error of {off['tensor']:.0%}; with one scale for each 128, of "
                 f"{off['tile']:.0%}: the outlier affects only its own tile."),
        question("Why are some scales powers of two?",
                 ("they are more precise", "multiplying by one changes only the exponent", "they are smaller"),
                 "multiplying by one changes only the exponent",
                 f"Here 2^{int(np.log2(scale))} instead of 1 / 448. Nothing is rounded when such a scale is applied or "
                 "replaced by another, so numbers can be requantized in tiles along the other dimension without a "
                 "second loss. The price: up to half of the range is unused.")]


def of_pipelines_and_cost() -> list[dict[str, Any]]:
    """Bubbles and dollars."""
    dual, one = (validate(make_schedule(name, 8, 20)) for name in ("dualpipe", "1f1b"))
    v3 = model_config("v3_671b", mtp_depth=0)
    afterwards = sum(plan.AFTERWARDS.values())
    hours = 180e3 * plan.TOKENS / 1e12 + afterwards
    dollars = hours * (HARDWARE["h800"].price or 0)
    active = costs.conventions(v3)["active per token"] / costs.conventions(v3)["main model"]
    return [
        question("8 ranks, 20 micro-batches, F, B and W take 1, 2 and 1. How long is a rank idle in DualPipe, and in "
                 "1F1B?", ("21 and 6", "0 and 6", "6 and 21"), f"{max(dual.idle):g} and {max(one.idle):g}",
                 f"Of {dual.makespan:g} and {one.makespan:g}. DualPipe feeds micro-batches from both ends, and "
                 "postpones gradients of weights, which no other rank waits for, into time that would be idle."),
        question("What would reduce the $5.576 million most?",
                 ("no long-context extension", "no post-training", "half the price of a GPU hour"),
                 "half the price of a GPU hour" if dollars / 2 > afterwards * 2 else "?",
                 f"${dollars / 1e6:.3f} million = {hours / 1e6:.3f}M hours times $2. Of the hours "
                 f"{afterwards / hours:.0%} came after pre-training. The cost is so low because a token uses "
                 f"only {active:.0%} of the parameters.")]
