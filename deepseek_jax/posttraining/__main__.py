"""Writes problems of a task with their answers, to pre-train or fine-tune on before reinforcement learning.

    python -m deepseek_jax.posttraining reverse --size 4 --examples 20000 > problems.jsonl
    python -m deepseek_jax.train --config problems --workdir run_reverse

Answers are the task's own, or correct answers of a teacher according to the task's rule (distillation):

    python -m deepseek_jax.posttraining reverse --examples 1000 --teacher rl --max-new-tokens 16 > distilled.jsonl
"""

import argparse
import json
import sys
from collections.abc import Iterator

import numpy as np

from deepseek_jax import cli
from deepseek_jax.config import ConfigError
from deepseek_jax.posttraining.tasks import Task, find_task


def parse() -> argparse.Namespace:
    parser = cli.Parser("posttraining", __doc__)
    parser.add_argument("task", help="reverse, sort, addition, countdown, reasoning_gym:NAME or package.module:NAME")
    parser.add_argument("--size", type=int, default=4, help="letters, words, digits or numbers in a problem")
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--teacher", metavar="WORKDIR", help="the run that answers; only right answers are written")
    parser.add_argument("--attempts", type=int, default=1, help="attempts of the teacher per problem (default 1)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="tokens of a teacher's answer (default 64)")
    parser.add_argument("--least", type=float, default=1.0, help="reward of a right answer (default 1)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if min(args.size, args.examples, args.attempts, args.max_new_tokens) < 1 or args.seed < 0:
        raise ConfigError("--size, --examples, --attempts and --max-new-tokens must be positive, and --seed cannot be "
                          "negative.")
    task = find_task(args.task, args.size)
    for prompt, answer in solved(args, task) if args.teacher is None else taught(args, task):
        print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False))


def solved(args: argparse.Namespace, task: Task) -> Iterator[tuple[str, str]]:
    """(prompt, answer) pairs with the task's own answers. Raises ConfigError for a task that has none."""
    if task.solve is None:
        raise ConfigError(f"{args.task} has no answers to give; its Task has no `solve`. Take --teacher RUN.")
    rng = np.random.default_rng(args.seed)
    for _ in range(args.examples):
        prompt, reference = task.draw(rng)
        yield prompt, task.solve(reference)


def taught(args: argparse.Namespace, task: Task) -> Iterator[tuple[str, str]]:
    """Problems that the teacher answered well; prints their number to stderr."""
    from deepseek_jax.posttraining.distill import Asking, teacher_answers

    kept = 0
    for row in teacher_answers(args.teacher, task, args.examples,
                               Asking(args.attempts, args.max_new_tokens, args.least, args.seed)):
        if row.answer is not None:
            kept += 1
            yield row.prompt, row.answer
    print(f"{kept} of {args.examples} problems have an answer that was rewarded with at least {args.least:g}.",
          file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
