"""The command line of the study post_training."""

from experiments.studies.framework import runner
from experiments.studies.post_training.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
