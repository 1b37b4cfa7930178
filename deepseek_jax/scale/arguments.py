"""Command-line options shared by `plan` and `compile`, and their meaning (no jax)."""

import argparse
import contextlib
import dataclasses
import math
import os
from typing import Any

from deepseek_jax import io
from deepseek_jax.config import PRESETS, ConfigError, FP8Config, ModelConfig, did_you_mean, load_config, model_config
from deepseek_jax.config.model import RECOMPUTABLE
from deepseek_jax.scale import plan, tables
from deepseek_jax.scale.decoding import check_published
from deepseek_jax.scale.hardware import Hardware, check_fp8
from deepseek_jax.scale.layout import Layout, Split, make_layout

AUTO = "auto"  # --remat: `plan.cheapest_remat` chooses
REPORT_SEQUENCES = 15360  # a step's, report section 4.2

# The report's layout (section 4.2): FP8, 16-way pipeline, 64-way experts on 8 nodes; buffers for 1.25 times the mean
# load. It recomputes the same as the report, and dispatch, without which the step takes 85 of 80 GB. No weight gradient
# is deferred: each takes 6 GB.
LAYOUTS = {"report": {"model": "v3_671b", "hardware": "h800", "devices": 2048, "target": "h100:2048", "pipe": 16,
                      "expert": 64, "fp8": True, "remat": "dispatch", "capacity": 1.25, "deferred": 0}}

IDENTITY = ("model", "hardware", "devices", "pipe", "expert")  # giving these of a layout selects its others too

ALL = ("training", "--serve", "--finetune")  # the questions for `plan`
READERS = {  # options by question; all others are for training on many devices
    **dict.fromkeys(("model", "hardware", "layers", "sequence_length", "fp8", "json", "serve", "finetune"), ALL),
    **dict.fromkeys(("sequences", "rows"), ("training", "--finetune")),
    "cache": ("--serve",), "moments": ("--finetune",)}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--model", required=True, help=f"{', '.join(PRESETS)}; or the folder of a run, of what convert "
                        "from-hf made, or of a Hugging Face checkpoint, of which only config.json is read")
    parser.add_argument("--layers", type=int, help="of the model, if fewer than it has")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), help="a preset of these options, any of which may be "
                        "given besides: the report's run, v3_671b in FP8 on 2,048 GPUs, pipe 16, expert 64")
    parser.add_argument("--pipe", type=int, default=1, help="ranks of the pipeline")
    parser.add_argument("--expert", type=int, default=1, help="devices that share the experts")
    parser.add_argument("--tensor", type=int, default=1, help="devices that share heads and vocabulary")
    parser.add_argument("--parts", type=int, default=1, help="that each sequence is split into: over the nodes of "
                        "experts first, then over copies of them")
    parser.add_argument("--schedule", default="dualpipe", help="gpipe, 1f1b, zb1p, dualpipe or dualpipev")
    parser.add_argument("--deferred", type=_deferred, help="weight gradients that may wait on a rank; all: as many as "
                        "the schedule defers (the default, but 0 of --layout report); each takes memory, and fewer "
                        "lengthen a long step little")
    parser.add_argument("--sequences", type=int, default=REPORT_SEQUENCES, help="of a step (default: the report's)")
    parser.add_argument("--rows", type=int, default=1, help="sequences of a micro-batch on one device")
    parser.add_argument("--sequence-length", "--context", type=int, default=4096, help="tokens (default 4096)")
    parser.add_argument("--remat", help="none, report, full, names of what is recomputed in addition to the report's "
                        f"({', '.join(RECOMPUTABLE)}; with commas between), or auto: the cheapest that fits (default: "
                        "the model's)")
    parser.add_argument("--fp8", action=argparse.BooleanOptionalAction, default=False,
                        help="products, what is kept, and dispatch in FP8; with --serve: weights")
    parser.add_argument("--dispatch", default="two_hop", help="two_hop or flat")
    parser.add_argument("--buffers", default="ragged", help="ragged or static")
    parser.add_argument("--capacity", type=_capacity, default=1.25,
                        help="of buffers, in even loads (default 1.25); none: room for all, and nothing is dropped")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options. A --layout sets the defaults of the others."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--layout", nargs="?")  # the parser refuses it if it has no value
    return _with_defaults(parser, LAYOUTS.get(first.parse_known_args()[0].layout, {}))


def _with_defaults(parser, given):
    for action in parser._actions:
        if action.dest in given:
            action.required, action.default = False, given[action.dest]
    return parser.parse_args()


def add_one_device(parser: argparse.ArgumentParser) -> None:
    """Adds the questions about a single device."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--serve", action="store_true", help="plan one device that serves: users of --context tokens")
    what.add_argument("--finetune", action="store_true", help="plan one device that trains all parameters: --sequences "
                      "(default 1) of --context tokens, all at once unless --rows says otherwise")
    parser.add_argument("--cache", choices=("bfloat16", "float32", "fp8"), help="with --serve: of the latents "
                        "(default: as the model computes)")
    parser.add_argument("--moments", choices=("bfloat16", "float32"), default="float32", help="with --finetune: of "
                        "Adam's moments (default float32, as train has it)")
    parser.set_defaults(fp8=None, sequences=None, rows=None)


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of `plan`. Raises ConfigError for an option that the question does not use."""
    args = parse(parser)
    for name, layout in LAYOUTS.items():
        asked = not (args.layout or args.serve or args.finetune)
        if asked and all(getattr(args, option) == layout[option] for option in IDENTITY):
            args = _with_defaults(parser, layout | {"layout": name})
            print(f"These are the options of --layout {name}, from which others are taken that are not given.\n")
    check_counts(args)
    question = "--serve" if args.serve else "--finetune" if args.finetune else "training"
    for name, value in vars(args).items():
        readers = READERS.get(name, ("training",))
        if question in readers or value == parser.get_default(name):
            continue
        option = "--" + name.replace("_", "-") + (f" {value}" if type(value) in (int, str) else "")
        if question == "training":
            raise ConfigError(f"{option} goes with {' and '.join(readers)}; add {readers[0]}, or leave it out.")
        if name != "devices" or value != 1:
            raise ConfigError(f"{question} plans one device and does not read {option}; leave out {option}"
                              + (", or --serve and --finetune." if name == "devices" else "."))
    return args


def check_counts(args: argparse.Namespace) -> None:
    """Raises ConfigError, which names the option, for a number below 1."""
    for name in ("devices", "layers", "pipe", "expert", "tensor", "parts", "sequences", "rows", "sequence_length",
                 "decode", "length"):
        if type(value := getattr(args, name, None)) is int and value < 1:  # in plan, --decode is a switch
            option = "context" if name == "sequence_length" else name
            raise ConfigError(f"--{option} {value} must be positive.")


def complete(args: argparse.Namespace, machine: Hardware) -> None:
    """Fills in the missing options of `plan`, which depend on the question.

    Raises:
      ConfigError: options that do not go together, or FP8 where there is none.
    """
    one_device = args.serve or args.finetune
    if one_device:
        args.devices = None
    elif args.devices is None:
        raise ConfigError("--devices is missing: how many train together; for one device take --serve or --finetune.")
    if args.decode:
        check_published(args.model, args.devices)
    if args.fp8:
        check_fp8(args.hardware, machine)
    if args.fp8 is None:  # training in the report's layouts uses FP8 if possible, and `train` does not
        args.fp8 = machine.fp8 is not None and not one_device
    if args.sequences is None:
        args.sequences = 1 if args.devices in (None, 1) else REPORT_SEQUENCES
    if args.rows is None:
        args.rows = args.sequences if one_device else 1


def positive(text: str) -> float:
    """A finite number above 0, for argparse."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def _deferred(text):
    if text == "all":
        return None
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number from 0 on nor all")


def _capacity(text):
    try:
        return None if text == "none" else float(text)  # the config checks the range
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor none") from None


def model(args: argparse.Namespace) -> ModelConfig:
    """The model.

    Raises:
      ConfigError: an option does not fit it, or there is no such model.
    """
    remat = "report" if args.remat == AUTO else args.remat
    changes = {name: value for name, value in (("remat", remat), ("num_layers", args.layers)) if value is not None}
    changes["fp8"] = FP8Config(enabled=args.fp8)
    if args.model in PRESETS:
        return model_config(args.model, **changes)
    return dataclasses.replace(_saved(args.model), **changes)


def _saved(path: str) -> ModelConfig:
    """The model that the config.json at `path`, or in the folder `path`, describes: ours or Hugging Face's."""
    file = os.path.join(path, "config.json") if os.path.isdir(path) else path
    if not os.path.isfile(file) or not file.endswith(".json"):
        raise ConfigError(f"unknown model {path!r}; {did_you_mean(path, PRESETS)} A folder with a config.json is taken "
                          "too: of a run, of what convert from-hf made, or of a Hugging Face checkpoint.")
    try:
        raw = io.read_json(file)
    except ValueError:
        raw = None
    if isinstance(raw, dict) and "model_type" in raw:
        from deepseek_jax.interop import hf_config

        return hf_config.read(raw, raw.get("num_nextn_predict_layers") or 0)
    return load_config(file).model  # raises with what is wrong


def with_remat(args: argparse.Namespace, c: ModelConfig, machine: Hardware, layout: Layout) -> ModelConfig:
    """The model, under --remat auto with the cheapest choice that fits; prints how it was chosen."""
    if args.remat != AUTO:
        return c
    tried = plan.cheapest_remat(c, machine, layout)
    print(tables.chosen_remat(tried))
    return dataclasses.replace(c, remat=tried[-1].remat)


def is_report(args: argparse.Namespace, c: ModelConfig, layout: Layout) -> bool:
    """Whether these are the settings of the report's run, to which its published figures apply, whatever is
    recomputed."""
    asked = args.model, args.hardware, layout.name, layout.sequence_length, args.layers
    return asked == ("v3_671b", "h800", tables.REPORT, 4096, None) and c.fp8.enabled and c.remat != "none"


def layout(args: argparse.Namespace, c: ModelConfig, devices: int, node_size: int) -> Layout:
    """The layout.

    Raises:
      ConfigError: the numbers do not divide each other or the model.
    """
    split = Split(devices, args.pipe, args.expert, args.tensor, node_size, args.parts)
    return make_layout(c, split, args.sequences, args.rows, args.sequence_length, args.schedule, args.deferred,
                       **mesh(args))


def mesh(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of dispatch: fields of MeshConfig."""
    return dict(dispatch=args.dispatch, buffers=args.buffers, capacity=args.capacity, dispatch_fp8=args.fp8)
