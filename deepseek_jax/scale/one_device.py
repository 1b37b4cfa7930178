"""The answers of `plan --serve` and `plan --finetune`: printed, and as plain dictionaries (no jax)."""

import argparse
import dataclasses
from typing import Any

from deepseek_jax.config import ModelConfig
from deepseek_jax.scale import finetune, serve, tables
from deepseek_jax.scale.hardware import device


def answer(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """Prints the plan; returns it as JSON data, including whether it "fits"."""
    print()
    machine = device(args.hardware)
    return _serving(args, machine, model) if args.serve else _finetuning(args, machine, model)


def _serving(args, machine, model):
    asked = serve.Asked(args.sequence_length, args.fp8, args.cache or model.dtype)
    found = serve.serve(model, machine, asked)
    advice = "" if found.users else serve.instead(model, machine, asked, found)
    print(tables.served(args.hardware, machine, asked, found, advice))
    return {"serve": dataclasses.asdict(asked) | dataclasses.asdict(found), "fits": found.users > 0}


def _finetuning(args, machine, model):
    step = finetune.Step(args.sequences, args.rows, args.sequence_length, args.moments)
    rows = finetune.finetune(model, machine, step)
    fits = any(row.fits for row in rows)
    advice = "" if fits else finetune.instead(model, machine, step, rows)
    print(tables.finetuned(args.hardware, machine, step, rows, advice))
    return {"finetune": {"step": dataclasses.asdict(step), "remat": [dataclasses.asdict(row) for row in rows]},
            "fits": fits}
