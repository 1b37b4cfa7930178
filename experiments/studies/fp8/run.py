"""The command line of the study fp8."""

from experiments.studies.fp8.study import STUDY
from experiments.studies.framework import runner

if __name__ == "__main__":
    runner.main(STUDY)
