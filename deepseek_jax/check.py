"""Reads every file of checkpoints and compares it with its checksum. Other commands check only the parts that they
read.

    python -m deepseek_jax.check run                     (all checkpoints of a run)
    python -m deepseek_jax.check gs://BUCKET/run/checkpoints/500

Exit code 0: all are intact. 3: some are damaged; the files are named, and --workdir resumes from the newest intact one.
2: a mistake, such as a path without checkpoints, or a file that cannot be read. Checkpoints that their run removes in
the meantime do not count.
"""

from __future__ import annotations

import argparse
import pathlib

from deepseek_jax import cli, storage
from deepseek_jax.config import ConfigError

DAMAGED = 3  # exit code; Python's own for a traceback is 1


def parse() -> argparse.Namespace:
    parser = cli.Parser("check", __doc__)
    parser.add_argument("checkpoint", metavar="WORKDIR|CHECKPOINT", help="of a run, or a folder in its checkpoints/")
    return parser.parse_args()


def find(folder: str) -> list[pathlib.Path]:
    """The checkpoints of a work directory, or the folder itself if it is one. Raises ConfigError if there are none."""
    from deepseek_jax.checkpoint import manifest

    directory = manifest.directory_of(folder)
    found = [directory / str(step) for step in manifest.steps(directory)]
    path = storage.as_path(folder)
    if not found and any(storage.is_file(path / name) for name in ("manifest.json", "meta.json")):
        found = [path]
    if not found:
        raise ConfigError(f"{folder} holds no checkpoint; give a work directory, or a folder in its checkpoints/.")
    return found


def main() -> int:
    args = parse()

    from deepseek_jax.checkpoint.manifest import damages, is_there, size_of

    wrong = 0
    for path in find(args.checkpoint):
        before = is_there(path)
        why = list(damages(path))
        if before and not is_there(path):
            print(f"{path}: removed by its run", flush=True)
            continue
        print(f"{path}: " + (f"damaged, {len(why)} of its files" if why else size_of(path)), flush=True)
        for line in why:
            print(f"  {line}")
        wrong += bool(why)
    return DAMAGED if wrong else 0


if __name__ == "__main__":
    cli.run(main)
