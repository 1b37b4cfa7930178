"""Writes problems of a task with their answers, to pre-train or fine-tune on before reinforcement learning.

    python -m deepseek_jax.posttraining reverse --size 4 --examples 20000 > reverse.jsonl
    python -m deepseek_jax.train --config tiny --workdir run_reverse --config.data.sources="[('reverse.jsonl', 1)]" \
        --config.data.packing=whole --config.data.mask_documents=True
"""

import argparse
import json

import numpy as np

from deepseek_jax import cli
from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining.tasks import find_task


def parse() -> argparse.Namespace:
    parser = cli.Parser("posttraining", __doc__)
    parser.add_argument("task", help="reverse, sort, addition, countdown, reasoning_gym:NAME or package.module:NAME")
    parser.add_argument("--size", type=int, default=4, help="letters, words, digits or numbers of a problem")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if min(args.size, args.examples) < 1 or args.seed < 0:
        raise ConfigError("--size and --examples must be positive, and --seed cannot be negative.")
    task = find_task(args.task, args.size)
    if task.solve is None:
        raise ConfigError(f"{args.task} has no answers to give; its Task has no `solve`.")
    rng = np.random.default_rng(args.seed)
    for _ in range(args.examples):
        prompt, reference = task.draw(rng)
        print(json.dumps({"prompt": prompt, "answer": task.solve(reference)}, ensure_ascii=False))


if __name__ == "__main__":
    cli.run(main)
