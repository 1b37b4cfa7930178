"""The cost of a model on a machine: training (memory, step time, MFU, hours, dollars), or serving on one device.

    python -m deepseek_jax.plan --model v2_lite_16b --hardware a100 --serve --context 4096
    python -m deepseek_jax.plan --model small --hardware rtx4090 --finetune --sequences 8 --context 2048
    python -m deepseek_jax.plan --layout report --json plan.json
    python -m deepseek_jax.plan --model v2_lite_16b --hardware h100 --devices 8 --search --price 2.5
    python -m deepseek_jax.plan --layout report --ablations

Counts are exact, bytes are those of this program as laid out by XLA:GPU, times are based on published measurements that
the output names, and serving rates are bounds. Exit code 1: it does not fit.
"""

import argparse
import dataclasses
from typing import Any

from deepseek_jax import cli, io
from deepseek_jax.config import ModelConfig
from deepseek_jax.scale import arguments, decoding, one_device, plan, tables
from deepseek_jax.scale.costs import conventions, parameters
from deepseek_jax.scale.hardware import HARDWARE, Hardware, Measured, hardware


def parse() -> argparse.Namespace:
    parser = cli.Parser("plan", __doc__)
    parser.add_argument("--hardware", type=str.lower, required=True, help=", ".join(HARDWARE))
    parser.add_argument("--devices", type=int, help="of the training; --serve and --finetune plan one")
    arguments.add(parser)
    arguments.add_one_device(parser)
    parser.add_argument("--tokens", type=arguments.positive, default=plan.TOKENS,
                        help="of all training (default: the report's)")
    parser.add_argument("--price", type=arguments.positive,
                        help="dollars a device-hour (default: the machine's, where known)")
    parser.add_argument("--search", action="store_true", help="look for the fastest layouts that fit, over --pipe, "
                        "--expert, --rows, --schedule and, unless it or --layout is given, --remat")
    parser.add_argument("--ablations", action="store_true", help="what each of the report's inventions is worth here")
    parser.add_argument("--decode", action="store_true", help="the published layouts that serve v3_671b")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    parser.add_argument("--plot", metavar="FILE", help="also draw memory by group there")
    return arguments.checked(parser)


def main() -> int:
    args = parse()
    machine = hardware(args.hardware)
    arguments.complete(args, machine)
    model = arguments.model(args)
    plan.check_known(model)
    result = {"model": args.model, "hardware": args.hardware, "parameters": parameters(model),
              "conventions": conventions(model), "sources": machine.sources}
    print(tables.counts(result))
    alone = args.serve or args.finetune
    found = one_device.answer(args, model) if alone else training(args, machine, model)
    result |= found
    if args.json:
        io.write_json(args.json, result)
    return 0 if found["fits"] else 1


def training(args: argparse.Namespace, machine: Hardware, model: ModelConfig) -> dict[str, Any]:
    """Prints the plan of one layout, or the best layouts with --search; returns what --json writes."""
    result: dict[str, Any] = {"measured": dataclasses.asdict(Measured())}
    if args.search:
        chosen = {} if args.remat is None else {"remats": (args.remat,)}
        best, reasons = plan.search(model, machine, args.devices, args.sequences, args.sequence_length, args.price,
                                    args.tokens, deferred=args.deferred, parts=args.parts, **chosen,
                                    **arguments.mesh(args))
        result["search"] = {"best": [{"remat": remat} | tables.flat(found) for remat, found in best],
                            "others": {name: n for name, (n, _) in reasons.items()}}
        print(tables.searched(best, reasons))
        result["fits"] = bool(best)
    else:
        layout = arguments.layout(args, model, args.devices, machine.node_size)
        model = arguments.with_remat(args, model, machine, layout)
        found = plan.plan(model, machine, layout, args.tokens, args.price)
        result |= {"plan": tables.flat(found), "fits": found.fits}
        advice = "" if found.fits else "; ".join(filter(None, (
            plan.what_to_change(model, layout, found), plan.what_fits(model, machine, found))))
        print(tables.planned(found, advice))
        if arguments.is_report(args, model, layout):
            result["published"] = plan.published(found)
            print(tables.published(result["published"]))
        if args.ablations:
            result["ablations"], result["sparsity"] = plan.ablations(model, machine, layout), plan.sparsity(model)
            print(tables.ablated(result["ablations"], result["sparsity"]))
        if args.plot:
            from deepseek_jax.scale.draw import draw_memory

            draw_memory(args.plot, {"planned, by what the bytes are for": found.bytes}, machine.memory,
                        f"{args.model} on {args.hardware}\n{layout.name}")
    if args.decode:
        result["decode"] = decoding.published(model, machine)
        print(tables.decoded(result["decode"]))
    return result


if __name__ == "__main__":
    cli.run(main)
