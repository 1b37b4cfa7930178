"""Scores a trained model: loss, bits per byte, and balance of its experts; or by the tasks of lm-eval.

    python -m deepseek_jax.evaluate --workdir run                    (the run's own held-out files)
    python -m deepseek_jax.evaluate --workdir run --data docs/ --compressors --json result.json
    python -m deepseek_jax.evaluate --hf DIR --tasks hellaswag,arc_easy --limit 200
"""

from __future__ import annotations

import argparse
from typing import Any

from deepseek_jax import cli, io
from deepseek_jax.config import ConfigError


def parse() -> argparse.Namespace:
    parser = cli.Parser("evaluate", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="a run of deepseek_jax.train")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face checkpoint, for --tasks")
    parser.add_argument("--data", help="a folder, file or glob to score all of, instead of the held-out files")
    parser.add_argument("--ema", action="store_true", help="score the moving average of the weights")
    parser.add_argument("--step", type=int, help="of the checkpoint (default: the newest)")
    parser.add_argument("--compressors", action="store_true", help="also gzip -9 and xz -9 on the same files")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    tasks = parser.add_argument_group("tasks of lm-eval (pip install 'deepseek-jax[eval]')")
    tasks.add_argument("--tasks", metavar="NAME[,NAME]", help="which")
    tasks.add_argument("--task-folder", metavar="DIR", help="with task files of your own")
    tasks.add_argument("--shots", type=int, help="examples before each question (default: as the task says)")
    tasks.add_argument("--limit", type=int, help="questions of each task (default: all)")
    tasks.add_argument("--chat", action="store_true", help="ask in the form of the model's chat template")
    tasks.add_argument("--max-length", type=int, default=2048, help="tokens of context and continuation")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for contradictory options."""
    if args.hf and not args.tasks:
        raise ConfigError("--hf is for --tasks; a corpus is scored by a run (deepseek_jax.convert from-hf makes one).")
    if args.tasks and (args.data or args.compressors or args.step is not None):
        raise ConfigError("--data, --compressors and --step do not go with --tasks; score one at a time.")
    for name in ("task_folder", "shots", "limit", "chat"):
        if getattr(args, name) not in (None, False) and not args.tasks:
            raise ConfigError(f"--{name.replace('_', '-')} is for --tasks.")
    if min(args.shots or 0, (args.limit or 1) - 1, args.max_length - 2) < 0:
        raise ConfigError("--shots cannot be negative, --limit must be positive, and --max-length at least 2.")


def by_tasks(args: argparse.Namespace) -> dict[str, Any]:
    """{"task metric": value} of lm-eval's tasks. Raises ConfigError if lm-eval is not installed."""
    try:
        from deepseek_jax.serving.harness import EngineLM, evaluate_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks needs {error.name}; pip install 'deepseek-jax[eval]'.") from None
    from deepseek_jax.chat.template import of_folder
    from deepseek_jax.workdir import load

    folder = args.hf or args.workdir
    cfg, variables, tokenizer = load(folder, args.ema, hf=args.hf is not None, on_host=True)
    text = of_folder(folder, tokenizer, chats=args.chat)
    model = EngineLM(cfg, variables, tokenizer, text, args.max_length, args.chat)
    scores = evaluate_tasks(model, args.tasks.split(","), args.task_folder, args.shots, args.limit)
    return {f"{task} {metric.removesuffix(',none')}": value for task, found in scores.items()
            for metric, value in found.items() if isinstance(value, (int, float))}


def main() -> None:
    args = parse()
    check(args)
    if args.tasks:
        result = by_tasks(args)
    else:
        from deepseek_jax.training.evaluate import evaluate_workdir

        result = evaluate_workdir(args.workdir, args.data, args.ema, args.compressors, args.step)
    for name, value in result.items():
        print(f"{name:38s} {value:.4f}" if isinstance(value, float) else f"{name:38s} {value}")
    if args.json:
        io.write_json(args.json, result)


if __name__ == "__main__":
    cli.run(main)
