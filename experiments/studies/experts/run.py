"""The command line of the study experts."""

from experiments.studies.experts.study import STUDY
from experiments.studies.framework import runner

if __name__ == "__main__":
    runner.main(STUDY)
