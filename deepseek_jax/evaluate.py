"""Scores a trained model: loss, bits per byte, and how evenly its experts are loaded over the whole set.

    python -m deepseek_jax.evaluate --workdir run                    (the run's own held-out files)
    python -m deepseek_jax.evaluate --workdir run --data docs/ --compressors --json result.json
"""

import argparse

from deepseek_jax import cli, io


def parse() -> argparse.Namespace:
    parser = cli.Parser("evaluate", __doc__)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--data", help="a folder, file or glob to score all of, instead of the held-out files")
    parser.add_argument("--ema", action="store_true", help="score the moving average of the weights")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--compressors", action="store_true", help="also gzip -9 and xz -9 on the same files")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    return parser.parse_args()


def main() -> None:
    args = parse()

    from deepseek_jax.training.evaluate import evaluate_workdir

    result = evaluate_workdir(args.workdir, args.data, args.ema, args.compressors, args.step)
    for name, value in result.items():
        print(f"{name:38s} {value:.4f}" if isinstance(value, float) else f"{name:38s} {value}")
    if args.json:
        io.write_json(args.json, result)


if __name__ == "__main__":
    cli.run(main)
