"""Tokenizes a corpus before a run, on all cores and without jax; `train` then starts at once.

    python -m deepseek_jax.prepare --config tiny --workdir run
    python -m deepseek_jax.prepare --config my_config.py --out /shared/tokens --shard 3/16

Run it again to continue after an interruption. With several shards, such as the tasks of a Slurm array, each makes its
part, and the one that finds all others complete finishes. `train` finds the tokens in its --workdir or data.cache_dir.
With --verify nothing is made: every file is read and compared with its hash from when its tokens were made.
"""

import argparse
import dataclasses
import re

from deepseek_jax import cli
from deepseek_jax.config import Config, ConfigError, load_config, named_configs
from deepseek_jax.data.ahead import Made, Share, cores, prepare_ahead
from deepseek_jax.data.verify import verify


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = cli.Parser("prepare", __doc__)
    parser.add_argument("--config", required=True, help=f"{', '.join(named_configs())}; a Python file "
                        "with get_config(); or the config.json of a run")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--workdir", help="of the run; its tokenizer is taken, if it has one")
    where.add_argument("--out", metavar="DIR", help="for any number of runs with --config.data.cache_dir=DIR")
    parser.add_argument("--shard", metavar="I/N", default="0/1", help="which one this is, from 0, and of how many")
    parser.add_argument("--workers", type=int, default=cores(), help="processes of this shard")
    parser.add_argument("--verify", action="store_true", help="say which files have changed since; exit code 2 if any")
    parser.epilog = "Any key of the config can be overridden, as for train: --config.data.validation_fraction=0.01"
    return parser.parse_known_args()


def share_of(args: argparse.Namespace) -> Share:
    """Raises ConfigError for an invalid shard."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", args.shard)
    if not found or int(found[1]) >= int(found[2]):
        raise ConfigError(f"--shard={args.shard} must be I/N with 0 <= I < N, such as 0/16 for the first of 16.")
    if args.workers < 1:
        raise ConfigError(f"--workers={args.workers} must be positive.")
    return Share(int(found[1]), int(found[2]))


def config_of(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The run's config, with the folder of --out. Raises ConfigError for a run without documents."""
    config = load_config(args.config, overrides)
    if config.preference.objective is not None:
        raise ConfigError("a run on preference pairs makes its tokens itself; there is nothing to prepare.")
    if args.out is None:
        return config
    if config.data.cache_dir not in (None, args.out):
        raise ConfigError(f"--out={args.out} is not data.cache_dir={config.data.cache_dir}; give one of them.")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, cache_dir=args.out))


def told(made: Made, shards: int) -> str:
    """One line about a source."""
    if not made.missing:
        return f"{made.path}: {made.tokens:,} tokens in {made.parts:,} parts, complete"
    others = sorted({i % shards for i in made.missing})
    shown = ", ".join(f"{i}/{shards}" for i in others[:8]) + (", ..." if len(others) > 8 else "")
    return f"{made.path}: {len(made.missing):,} of {made.parts:,} parts are still to be made, by --shard {shown}"


def main() -> None:
    args, overrides = parse()
    share, config = share_of(args), config_of(args, overrides)
    if args.verify:
        for line in verify(config, args.workdir, args.workers):
            print(line, flush=True)
        return
    for made in prepare_ahead(config, args.workdir, share, args.workers):
        print(told(made, share.count), flush=True)


if __name__ == "__main__":
    cli.run(main)
