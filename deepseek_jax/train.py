"""Trains a model, or resumes the run in the work directory.

    python -m deepseek_jax.train --config tiny --workdir run50 --config.train.steps=50
    python -m deepseek_jax.train --config ... --workdir run --config.mesh.node=2 --config.mesh.local=4
"""

import argparse
import sys

from deepseek_jax import cli, logs, stop
from deepseek_jax.config import load_config, named_configs
from deepseek_jax.config.advice import advice
from deepseek_jax.parallel import cluster


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser("train", __doc__)
    parser.add_argument("--config", required=True, help=f"{', '.join(named_configs())}; a Python file "
                        "with get_config(); or the config.json of a run")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and pictures; run again to resume")
    cluster.add_flags(parser)
    parser.epilog = ("Any key of the config can be overridden: --config.train.steps=50 --config.init.from=OTHER_RUN\n"
                     + stop.CODES)
    return parser.parse_known_args()


def main() -> int:
    args, overrides = parse()
    config = load_config(args.config, overrides)
    group = cluster.find_group(args)
    for note in advice(config) if group is None or group.process == 0 else ():
        print(f"note: {note}", file=sys.stderr)

    # Imported after the config has been checked, and each where it is needed: these take seconds.
    from deepseek_jax.parallel.processes import is_first, joined
    from deepseek_jax.training.loop import train

    with logs.kept(args.workdir, group.process if group else 0), joined(group, args.startup_timeout):
        if config.preference.objective is not None:
            from deepseek_jax.posttraining.preferences import train_on_pairs

            return stop.DONE if train_on_pairs(config, args.workdir).finished else stop.STOPPED
        if config.distill.from_ is not None:
            from deepseek_jax.posttraining.distill_logits import distill

            result = distill(config, args.workdir)
        else:
            result = train(config, args.workdir)
        if result.finished and is_first():
            from deepseek_jax.training.summary import summarize  # a second for its plots, so that no start waits for it

            summarize(config, args.workdir, result)
    return stop.DONE if result.finished else stop.STOPPED


if __name__ == "__main__":
    cli.run(main, resumes=True)
