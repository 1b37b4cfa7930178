"""The command line of the study optimizers."""

from experiments.studies.framework import runner
from experiments.studies.optimizers.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
