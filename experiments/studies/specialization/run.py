"""The command line of the study specialization."""

from experiments.studies.framework import runner
from experiments.studies.specialization.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
