"""Trains a model from a config file, or goes on with the run that the work directory holds.

    python -m deepseek_jax.train --config experiments/configs/tiny.py --workdir run --config.train.steps=50
"""

from deepseek_jax import command
from deepseek_jax.config import load_config


def parse():
    parser = command.Parser("train", __doc__)
    parser.add_argument("--config", required=True, help="a Python file with get_config()")
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and pictures; run again to resume")
    parser.epilog = "Any key of the config can be overridden: --config.train.steps=50 --config.init.from=OTHER_RUN"
    return parser.parse_known_args()


def main():
    args, overrides = parse()
    config = load_config(args.config, overrides)

    # After the config is known to be good: these take seconds.
    from deepseek_jax.training.loop import train
    from deepseek_jax.training.report import finish

    done = train(config, args.workdir)
    if done is not None:
        finish(config, args.workdir, *done)


if __name__ == "__main__":
    command.run(main)
