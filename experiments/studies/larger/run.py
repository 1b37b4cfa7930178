"""The command line of the study larger."""

from experiments.studies.framework import runner
from experiments.studies.larger.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
