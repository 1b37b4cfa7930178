"""The output of a finished run: its score compared with compressors', plots, and a sample of generated text."""

from __future__ import annotations

from typing import Any

from deepseek_jax.config import Config
from deepseek_jax.data.baselines import compressed_bits_per_byte
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.plots.training import plot_expert_load, plot_loss
from deepseek_jax.serving import generate
from deepseek_jax.training.loop import TrainResult
from deepseek_jax.training.metrics import LAST_STEPS, read_metrics
from deepseek_jax.training.sample import TEMPERATURE, sample_prompt


def summarize(config: Config, workdir: str, result: TrainResult) -> None:
    """Prints the last evaluation next to compressors, draws the plots, prints a sample if there are weights."""
    rows = read_metrics(workdir)
    last, steps = [r for r in rows if "eval_loss" in r][-1], [r for r in rows if "loss" in r][-LAST_STEPS:]
    limit = config.train.final_eval_batches
    name = f"model, {limit} batches" if limit else "model"
    scores = {name: last["eval_bits_per_byte"]} | compressed_bits_per_byte(config.data, workdir=workdir)
    print("Bits per byte of the held-out files:")
    for name, value in scores.items():
        print(f"  {name.removesuffix('_bits_per_byte').replace('_', ' '):16s} {value:.3f}")
    vio = [r["max_vio"] for r in steps]
    print(f"MaxVio (busiest over mean load): {sum(vio) / len(vio):.3f} a batch (the last {len(vio)} steps; at most "
          f"{max(vio):.3f}), {last['max_vio_global']:.3f} over the held-out files together")
    pictures = [plot_loss(workdir)]
    if config.model.num_moe_layers or config.model.mtp_depth:
        pictures.append(plot_expert_load(workdir))
    print("Pictures: " + ", ".join(str(p) for p in pictures))
    if result.variables is not None:
        print("Sample:\n" + sample(config, result.variables, result.tokenizer, result.held_out))
    if result.sample is not None:
        print("Sample:\n" + result.sample)


def sample(config: Config, variables: dict[str, Any], tokenizer: Tokenizer, held_out: str = "") -> str:
    """A continuation of config.train.sample_prompt, or of the first words of `held_out`, drawn by the engine."""
    prompt = sample_prompt(config, tokenizer, held_out)
    made = generate(config.model, variables, [prompt], config.train.sample_tokens, temperature=TEMPERATURE,
                    seed=config.train.seed, eos_id=tokenizer.eos)
    return tokenizer.decode([*prompt[1:], *made.tokens[0]])
