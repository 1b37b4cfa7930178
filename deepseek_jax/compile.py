"""Compiles the training step for a machine that is not here, and reads off what it takes and communicates.

    python -m deepseek_jax.compile --model v2_lite_16b --target h100:8 --expert 8 --sequences 512 --json lite.json
    python -m deepseek_jax.compile --model v3_671b --target h100:2048 --pipe 16 --expert 64 --fp8 --capacity 1.25

Targets: h100:N, h800:N (the extra `aot`), v5p:AxBxC, v6e:AxB, 7x:AxBxC (libtpu). Prints bytes per device by XLA's own
analysis beside the planner's, and every kind of collective: along which axes, how large, how many with products
between their start and their done. Exit code 1: it compiles, and does not fit.
"""

from deepseek_jax import command
from deepseek_jax.scale import arguments, targets


def parse():
    parser = command.Parser("compile", __doc__)
    parser.add_argument("--target", required=True, help="such as h100:8, h100:2048, v5p:8x16x16")
    arguments.add(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the report there")
    parser.add_argument("--plot", metavar="FILE", help="also draw memory by group there")
    return parser.parse_args()


def main():
    args = parse()
    model = arguments.model(args)
    layout = arguments.layout(args, model, targets.count(args.target), node_size=8)

    from deepseek_jax.scale.aot import report

    found = report(model, layout, args.target)
    found["model"] = args.model
    print(table(found))
    if args.json:
        command.write_json(args.json, found)
    if args.plot:
        from deepseek_jax.scale.draw import draw_memory

        draw_memory(args.plot, {"planned": found["planned"], "compiled": found["bytes"]}, found["memory"],
                    f"{args.model} on {args.target}: bytes per device")
    return 0 if found["fits"] else 1


def table(found) -> str:
    giga = lambda n: f"{n / 1e9:9.2f} GB"
    lines = [f"{found['model']} on {found['target']}: {found['layout']}",
             f"lowered in {found['seconds']['lowering']:.0f} s, compiled in {found['seconds']['compiling']:.0f} s, "
             f"{found['compiler_gigabytes']:.1f} GB here", ""]
    lines += [f"{name:28} {giga(size)}" for name, size in found["bytes"].items()]
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines += [f"{'per device, by XLA':28} {giga(found['bytes_per_device'])}   of {found['memory'] / 1e9:.0f}: "
              f"{verdict}",
              f"{'per device, planned':28} {giga(found['planned_bytes_per_device'])}   "
              f"{found['planned_over_compiled'] - 1:+.1%}", "",
              f"{'collective':20} {'axes':22} {'count':>6} {'GB once':>9} {'async':>6} {'hidden':>7} "
              f"{'GB exposed':>11}"]
    lines += [f"{row['kind']:20} {'+'.join(row['axes']) or '-':22} {row['count']:6} {row['bytes'] / 1e9:9.3f} "
              f"{row['asynchronous']:6} {row['hidden']:7} {row['exposed_bytes'] / 1e9:11.3f}"
              for row in found["collectives"]]
    return "\n".join(lines)


if __name__ == "__main__":
    command.run(main)
