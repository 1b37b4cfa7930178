"""Scoring a model: nats per token, bits per byte, and the balance of the experts over a complete set of documents."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tqdm

from deepseek_jax import fp8
from deepseek_jax.config import ConfigError, FP8Config
from deepseek_jax.data.baselines import compressed_bits_per_byte
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import prepare, prepare_evaluation
from deepseek_jax.data.validation import WholeValidation
from deepseek_jax.training.metrics import all_layers, max_vio
from deepseek_jax.training.step import eval_step
from deepseek_jax.training.types import Sums, TokenLosses
from deepseek_jax.workdir import load_run


class Score(NamedTuple):
    """Scores over a complete set of documents, or an evenly spread part of it.

    loss: nats per token. max_vio_global: balance over all batches together (max / mean load - 1).
    by_source: {source: its loss} for a run with several; {} for one. share: of the documents' batches; 1: all.
    """

    loss: float
    bits_per_byte: float
    max_vio_global: float
    by_source: dict[str, float]
    share: float = 1.0


def evaluate(loader: Loader, step: Callable[..., Sums], params: dict[str, Any], router: dict[str, jax.Array],
             limit: int = 0, progress: bool = False) -> Score:
    """Main-head loss over `limit` validation batches; 0: all of them.

    Args:
      step: `eval_step` with its config, (params, router, micro-batch) -> Sums.
      router: biases float32 [L, E] by name. progress: show a bar.
    """
    counts, losses = None, []  # kept on the device until the end: fetching after each batch would block
    sources: dict[str, list[TokenLosses]] = {}
    numbers = loader.validation.batch_numbers(loader.rows * loader.hosts, limit)
    batches = zip(numbers, loader.validation_batches(loader.rows, limit))
    for number, micro in tqdm.tqdm(batches, "evaluate", len(numbers), unit="batch", leave=False, disable=not progress):
        sums = step(params, router, micro)
        losses.append(sums.losses)
        counts = sums.counts if counts is None else jax.tree.map(jnp.add, counts, sums.counts)
        parts = loader.weights_by_source(number, loader.rows, micro["weights"])
        for source, weights_BT in parts.items():
            part = sums if len(parts) == 1 else step(params, router, micro | {"weights": weights_BT})
            sources.setdefault(source, []).append(part.losses)
    losses, sources, counts = jax.device_get((losses, sources, counts or {}))
    bits = sum(float(part.nats) for part in losses) / math.log(2)
    return Score(_mean(losses), bits / loader.validation_bytes(loader.rows, limit), max_vio(all_layers(counts)),
                 {source: _mean(parts) for source, parts in sources.items()},
                 len(numbers) / max(1, len(loader.validation.batch_numbers(loader.rows * loader.hosts))))


def _mean(parts: list[TokenLosses]) -> float:
    """Nats per token, added up in double precision."""
    nats, weight = (sum(float(x) for x in xs) for xs in zip(*((part.nats, part.weight) for part in parts)))
    return nats / weight if weight else math.nan  # only prompts


def evaluate_workdir(workdir: str, data: str | None = None, ema: bool = False,
                     compressors: bool = False, step: int | None = None) -> dict[str, float]:
    """Scores a checkpoint of a run (the newest, or that of `step`) on all held-out documents, or on those of `data`.

    Raises ConfigError for a work directory or data that cannot be read.
    """
    config, variables, step = load_run(workdir, ema, step)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, fp8=_here(config.model.fp8)))
    prepared = prepare(config, workdir) if data is None else prepare_evaluation(config, workdir, data)
    loader = Loader(config, prepared)
    if isinstance(loader.validation, WholeValidation) and (count := loader.validation.left_out):
        print(f"note: {count:,} documents are longer than train.sequence_length={config.train.sequence_length} and are "
              "not scored.", file=sys.stderr)
    compiled = jax.jit(lambda *args: eval_step(config, *args))
    score = evaluate(loader, compiled, variables["params"], variables["router"], progress=True)
    result = {"step": step, **score._asdict()}
    del result["share"]  # all
    result |= {f"loss/{source}": loss for source, loss in result.pop("by_source").items()}
    return result | (compressed_bits_per_byte(config.data, data, workdir) if compressors else {})


def _here(recipe: FP8Config) -> FP8Config:
    """The recipe, with this device's kernels if those that it names are for the machine that trained."""
    try:
        fp8.check_here(dataclasses.replace(recipe, enabled=True))
    except ConfigError:
        return dataclasses.replace(recipe, implementation="auto")
    return recipe
