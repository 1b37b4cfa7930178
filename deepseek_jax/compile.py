"""Compiles a training or decode step for a machine that you don't have, and reports its memory and communication.

    python -m deepseek_jax.compile --model v2_lite_16b --target h100:8 --expert 8 --sequences 512 --json lite.json
    python -m deepseek_jax.compile --layout report [--program evaluate | --program sample]
    python -m deepseek_jax.compile --model v2_lite_16b --target h100:8 --decode 32 --length 4096

Targets: h100:N, h800:N (the extra `aot`), v5p:AxBxC, v6e:AxB, 7x:AxBxC (libtpu). Prints bytes per device by XLA's own
analysis next to the planner's; every kind of collective: along which axes, how large, how many with products between
their start and their done; and registers and spills of the kernels. Exit code 1: it compiles, but does not fit.
"""

from __future__ import annotations

import argparse

from deepseek_jax import cli, io
from deepseek_jax.config import ConfigError, LoraConfig
from deepseek_jax.scale import arguments
from deepseek_jax.scale.compile import targets
from deepseek_jax.scale.compile.report import table
from deepseek_jax.scale.hardware import device


def parse() -> argparse.Namespace:
    parser = cli.Parser("compile", __doc__)
    parser.add_argument("--target", required=True, help="such as h100:8, h100:2048, v5p:8x16x16")
    arguments.add(parser)
    parser.add_argument("--program", default="train", choices=("train", "evaluate", "sample"), help="of a run")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of that rank alone, of a frozen base")
    parser.add_argument("--lora-fp8", action="store_true", help="with --lora: the base is kept in FP8")
    parser.add_argument("--decode", type=int, metavar="SEQUENCES", help="a decode step, all of a model on each device")
    parser.add_argument("--length", type=int, default=4096, help="with --decode: tokens of cache of a sequence")
    parser.add_argument("--drafts", type=int, default=0, help="with --decode: tokens drafted in a step, by MTP modules")
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    parser.add_argument("--plot", metavar="FILE", help="also draw memory by group there")
    args = arguments.parse(parser)
    arguments.check_counts(args)
    if args.lora_fp8 and args.lora is None:
        raise ConfigError("--lora-fp8 is of the base that adapters are trained next to; add --lora RANK.")
    if args.lora is not None and args.remat == arguments.AUTO:
        raise ConfigError("--remat auto plans a step that trains all weights; with --lora name one, such as full.")
    if args.program != "train" and (args.lora, args.decode) != (None, None):
        raise ConfigError(f"--program {args.program} is of a run that trains all weights; omit --lora and --decode.")
    return args


def main() -> int:
    args = parse()
    model = arguments.model(args)
    if args.decode is not None:
        from deepseek_jax.scale.compile.aot_decode import measure_decode

        found = measure_decode(model, args.target, args.decode, args.length, args.drafts)
    else:
        from deepseek_jax.scale.compile import aot, aot_forward

        layout = arguments.layout(args, model, targets.count(args.target), node_size=8)
        if args.remat == arguments.AUTO:
            model = arguments.with_remat(args, model, device(args.target.partition(":")[0]), layout)
        found = (aot.measure_step(model, layout, args.target, LoraConfig(args.lora, fp8=args.lora_fp8))
                 if args.program == "train" else aot_forward.measure_forward(model, layout, args.target, args.program))
    found |= {"model": args.model, "layers": model.num_layers}
    print(table(found))
    if args.json:
        io.write_json(args.json, found)
    if args.plot:
        from deepseek_jax.scale.draw import draw_report

        draw_report(args.plot, found)
    return 0 if found["fits"] else 1


if __name__ == "__main__":
    cli.run(main)
