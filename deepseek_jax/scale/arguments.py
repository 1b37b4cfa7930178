"""Command-line options that `plan` and `compile` share, and what they mean (no jax)."""

import argparse
import contextlib
import math
from typing import Any

from deepseek_jax.config import FP8Config, ModelConfig, model_config
from deepseek_jax.scale.layout import Layout, Split, make_layout

REPORT_SEQUENCES = 15360  # a step's, report section 4.2


def add(parser: argparse.ArgumentParser, fp8: bool = False) -> None:
    """Adds the options. fp8: the default of --fp8."""
    parser.add_argument("--model", required=True, help="tiny, small, v2_lite_16b, v2_236b or v3_671b")
    parser.add_argument("--layers", type=int, help="of the model, if fewer than it has")
    parser.add_argument("--pipe", type=int, default=1, help="ranks of the pipeline")
    parser.add_argument("--expert", type=int, default=1, help="devices that share the experts")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share heads and vocabulary")
    parser.add_argument("--schedule", default="dualpipe", help="gpipe, 1f1b, zb1p, dualpipe or dualpipev")
    parser.add_argument("--deferred", type=_not_negative, help="weight gradients that may wait on a rank (default: the "
                        "schedule's); each takes memory, and fewer lengthen a long step little")
    parser.add_argument("--sequences", type=int, default=REPORT_SEQUENCES, help="of a step (default: the report's)")
    parser.add_argument("--rows", type=int, default=1, help="sequences of a micro-batch on one device")
    parser.add_argument("--sequence-length", type=int, default=4096)
    parser.add_argument("--remat", help="none, report or full (default: the model's)")
    parser.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=fp8,
                        help="products, what is kept, and dispatch in FP8")
    parser.add_argument("--dispatch", default="two_hop", help="two_hop or flat")
    parser.add_argument("--buffers", default="ragged", help="ragged or static")
    parser.add_argument("--capacity", type=_capacity, default=1.25,
                        help="of buffers, in even loads (default 1.25); none: room for all, and nothing is dropped")


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _not_negative(text):
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")


def _capacity(text):
    try:
        return None if text == "none" else float(text)  # the config says which numbers may be
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def model(args: argparse.Namespace) -> ModelConfig:
    """The model.

    Raises:
      ConfigError: an option does not fit it.
    """
    changes = {name: value for name, value in (("remat", args.remat), ("num_layers", args.layers)) if value is not None}
    return model_config(args.model, fp8=FP8Config(enabled=args.fp8), **changes)


def layout(args: argparse.Namespace, c: ModelConfig, devices: int, node_size: int) -> Layout:
    """The layout.

    Raises:
      ConfigError: the numbers do not divide each other or the model.
    """
    split = Split(devices, args.pipe, args.expert, args.tensor, node_size)
    return make_layout(c, split, args.sequences, args.rows, args.sequence_length, args.schedule, args.deferred,
                       **mesh(args))


def mesh(args: argparse.Namespace) -> dict[str, Any]:
    """How tokens travel: fields of MeshConfig."""
    return dict(dispatch=args.dispatch, buffers=args.buffers, capacity=args.capacity, dispatch_fp8=args.fp8)
