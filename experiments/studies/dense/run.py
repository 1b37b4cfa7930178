"""The command line of the study dense."""

from experiments.studies.dense.study import STUDY
from experiments.studies.framework import runner

if __name__ == "__main__":
    runner.main(STUDY)
