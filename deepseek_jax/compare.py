"""Compares runs: the differences between their configs, and the results of each.

    python -m deepseek_jax.compare run50 run100
    python -m deepseek_jax.compare runs/* --plot compare.png --json compare.json
"""

import argparse
import os
import pathlib
import sys

from deepseek_jax import cli, io
from deepseek_jax.config import ConfigError, as_dict
from deepseek_jax.table import aligned

HELD_OUT = ("sources", "validation_fraction", "validation", "validation_tokens")  # keys of the section data


def parse() -> argparse.Namespace:
    parser = cli.Parser("compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="work directories of deepseek_jax.train")
    parser.add_argument("--plot", metavar="FILE", help="draw losses and validation of all runs there")
    parser.add_argument("--json", metavar="FILE", help="write the table there")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if len(set(map(os.path.abspath, args.runs))) != len(args.runs) or len(args.runs) < 2:
        raise ConfigError("give two or more different runs to compare.")
    from deepseek_jax.training.comparison import compare
    from deepseek_jax.training.metrics import read_metrics
    from deepseek_jax.workdir import load_workdir_config

    configs = {run: as_dict(load_workdir_config(run)) for run in args.runs}
    rows = {run: read_metrics(run) for run in args.runs}
    if empty := [run for run in args.runs if not any("loss" in row for row in rows[run])]:
        raise ConfigError(f"{empty[0]} has no metrics yet; let it train a step, or leave it out.")
    table = compare(configs, rows)
    _print(table)
    if len({str([config["data"][key] for key in HELD_OUT]) for config in configs.values()}) > 1:
        print("note: these runs hold out different texts, so their bits_per_byte cannot be compared.", file=sys.stderr)
    elif len({row["eval_share"] for row in table.values()}) > 1:
        print("note: eval_share says how much of the held-out text each run has scored; compare bits_per_byte where it "
              "is the same.", file=sys.stderr)
    if args.json:
        io.write_json(args.json, table)
    if args.plot:
        from deepseek_jax.plots.training import plot_runs

        print(f"Picture: {plot_runs({name: rows[run] for run, name in _names(args.runs).items()}, args.plot)}")


def _names(runs):
    """{run: the name of its folder, or its path if two folders have the same name}."""
    short = {run: pathlib.Path(os.path.abspath(run)).name for run in runs}
    return short if len(set(short.values())) == len(runs) else {run: run for run in runs}


def _print(table):
    def show(value):
        if not isinstance(value, float):
            return "-" if value is None else f"{value}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

    from deepseek_jax.training.comparison import label

    names = _names(table)
    columns = [["", *map(label, next(iter(table.values())))],
               *([names[run], *map(show, of_run.values())] for run, of_run in table.items())]
    print(aligned(list(zip(*columns))))


if __name__ == "__main__":
    cli.run(main)
