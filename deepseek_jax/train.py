"""Trains a model, or resumes the run in the work directory.

    python -m deepseek_jax.train --config tiny --workdir run50 --config.train.steps=50
    python -m deepseek_jax.train --config ... --workdir run --config.mesh.node=2 --config.mesh.local=4
"""

import argparse
import sys

from deepseek_jax import cli
from deepseek_jax.config import ConfigError, load_config, named_configs
from deepseek_jax.config.advice import advice


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser("train", __doc__)
    parser.add_argument("--config", required=True, help=f"{', '.join(named_configs())}; a Python file "
                        "with get_config(); or the config.json of a run")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and pictures; run again to resume")
    group = parser.add_argument_group("several processes", "the same command for each, with its own number")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="process 0; it listens there and on the next port")
    group.add_argument("--processes", type=int, help="how many there are")
    group.add_argument("--process", type=int, help="which one this is, from 0")
    parser.epilog = "Any key of the config can be overridden: --config.train.steps=50 --config.init.from=OTHER_RUN"
    return parser.parse_known_args()


def main() -> None:
    args, overrides = parse()
    config = load_config(args.config, overrides)
    group = (args.coordinator, args.processes, args.process)
    if any(x is not None for x in group) and None in group:
        raise ConfigError("--coordinator, --processes and --process go together: give all three, or none.")

    for note in advice(config) if not args.process else ():
        print(f"note: {note}", file=sys.stderr)

    # After the config is known to be good, and each where it is needed: these take seconds.
    from deepseek_jax.parallel.processes import Group, is_first, joined
    from deepseek_jax.training.loop import train

    with joined(Group(*group) if args.processes is not None else None):
        if config.preference.objective is not None:
            from deepseek_jax.posttraining.preferences import train_on_pairs

            train_on_pairs(config, args.workdir)
            return
        if config.distill.from_ is not None:
            from deepseek_jax.posttraining.distill_logits import distill

            result = distill(config, args.workdir)
        else:
            result = train(config, args.workdir)
        if result.finished and is_first():
            from deepseek_jax.training.summary import summarize  # a second for its pictures, which no start waits for

            summarize(config, args.workdir, result)


if __name__ == "__main__":
    cli.run(main)
