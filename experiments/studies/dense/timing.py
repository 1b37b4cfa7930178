"""Seconds of a training step of each kind, which equal time is computed from.

    python -m experiments.studies.dense.timing        writes seconds.json; the study's steps follow from it
"""

from deepseek_jax import cli
from experiments.studies.dense.kinds import KINDS, SECONDS
from experiments.studies.framework.timing import write_seconds

if __name__ == "__main__":
    cli.run(lambda: write_seconds("dense", KINDS, SECONDS))
