"""Seconds of a training step with each optimizer, which equal time is computed from.

    python -m experiments.studies.optimizers.timing        writes seconds.json; the study's steps follow from it
"""

from deepseek_jax import cli
from experiments.studies.framework.timing import write_seconds
from experiments.studies.optimizers.arms import KINDS, SECONDS

if __name__ == "__main__":
    cli.run(lambda: write_seconds("optimizers", KINDS, SECONDS))
