"""Trains a model on its own answers, by rewards (GRPO) or by a teacher, or resumes the run in the work directory.

    python -m deepseek_jax.reinforce --config grpo_reverse --workdir rl --config.init.from=run
    python -m deepseek_jax.reinforce --config my_config.py --workdir rl --config.rollout.task=my_package:TASK
"""

import argparse
import sys

from deepseek_jax import cli, logs, stop
from deepseek_jax.config import load_config
from deepseek_jax.config.advice import advice
from deepseek_jax.parallel import cluster


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser("reinforce", __doc__)
    parser.add_argument("--config", required=True, help="grpo_reverse or distill_on_policy; a Python file with "
                        "get_config(); or the config.json of a run")
    parser.add_argument("--workdir", required=True, help="checkpoints and metrics; run again to resume")
    parser.epilog = ("Any key of the config can be overridden: --config.rollout.group_size=16 --config.grpo.updates=2\n"
                     + stop.CODES)
    return parser.parse_known_args()


def main() -> int:
    args, overrides = parse()
    config = load_config(args.config, overrides)
    cluster.check_alone()
    for note in advice(config):
        print(f"note: {note}", file=sys.stderr)

    # Imported after the config has been checked: it takes seconds.
    from deepseek_jax.posttraining.loop import reinforce

    with logs.kept(args.workdir, 0):
        return stop.DONE if reinforce(config, args.workdir) else stop.STOPPED


if __name__ == "__main__":
    cli.run(main, resumes=True)
