"""Checks a pipeline schedule, computes its costs, and draws it.

    python -m deepseek_jax.pipeline --schedule dualpipe --ranks 8 --microbatches 20 --plot dualpipe.png
    python -m deepseek_jax.pipeline --schedule all --ranks 4,8,16 --microbatches 32,64 --json table.json
"""

import argparse
from collections.abc import Callable
from typing import Any

from deepseek_jax import cli, io
from deepseek_jax.config.schema import ConfigError
from deepseek_jax.pipeline.schedule import NAMES, make_schedule
from deepseek_jax.pipeline.validate import validate

COLUMNS = {"schedule": "schedule", "ranks": "ranks", "microbatches": "micro-batches", "makespan": "makespan",
           "idle": "idle", "lockstep": "lock step", "ticks": "ticks", "activations": "activations",
           "deferred": "deferred W"}


def numbers(text: str, name: str, kind: Callable[[str], Any]) -> list[Any]:
    """The comma-separated numbers of an option."""
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--{name} {text} should be numbers with commas between them.") from None


def parse() -> argparse.Namespace:
    parser = cli.Parser("pipeline", __doc__)
    parser.add_argument("--schedule", required=True, help=f"one of {', '.join(NAMES)}, or all: a table")
    parser.add_argument("--ranks", required=True, help="devices along the pipeline; for the table several: 4,8")
    parser.add_argument("--microbatches", required=True, help="micro-batches of a step; for the table several: 20,40")
    parser.add_argument("--costs", default="1,2,1",
                        help="time of F, B, W and, if the two overlap, of F&B (default: 1,2,1, and F + B)")
    parser.add_argument("--plot", metavar="FILE", help="draw the schedule into a .png, .svg or .pdf")
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    args = parser.parse_args()
    args.ranks, args.microbatches = (numbers(getattr(args, name), name, int) for name in ("ranks", "microbatches"))
    costs = numbers(args.costs, "costs", float)
    if len(costs) not in (3, 4):
        raise ConfigError(f"--costs takes three or four numbers, not {len(costs)}: F, B, W and perhaps F&B.")
    args.costs = dict(zip(("f", "b", "w", "fb"), costs))
    return args


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one schedule, which is drawn if --plot is given."""
    if len(args.ranks) + len(args.microbatches) > 2:
        raise ConfigError("several --ranks or --microbatches make a table; say --schedule all.")
    schedule = make_schedule(args.schedule, args.ranks[0], args.microbatches[0])
    report = validate(schedule, args.costs)
    if args.plot:
        from deepseek_jax.pipeline.draw import draw

        draw(schedule, args.plot, args.costs)
    return {"schedule": args.schedule, "ranks": schedule.ranks, "microbatches": schedule.microbatches,
            "makespan": report.makespan, "lockstep_makespan": report.lockstep_makespan, "ticks": report.ticks,
            "idle": report.idle, "idle_by_formula": report.bubble, "peak_activations": report.peak_activations,
            "peak_deferred": report.peak_deferred, "slots": schedule.slots._asdict()}


def table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of all schedules."""
    if args.plot:
        raise ConfigError("--plot draws one schedule; name it instead of --schedule all.")
    from deepseek_jax.pipeline.validate import compare

    return compare(args.ranks, args.microbatches, args.costs)


def main() -> None:
    args = parse()
    if args.schedule == "all":
        result = table(args)
        print("  ".join(f"{title:>9s}" for title in COLUMNS.values()))
        for row in result:
            print("  ".join(f"{row[key]:>{max(9, len(title))}}" if isinstance(row[key], (str, int)) else
                            f"{row[key]:>{max(9, len(title))}.4g}" for key, title in COLUMNS.items()))
    else:
        result = one(args)
        for name, value in result.items():
            shown = " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else value
            print(f"{name:18s} {shown}")
    if args.json:
        io.write_json(args.json, result)


if __name__ == "__main__":
    cli.run(main)
