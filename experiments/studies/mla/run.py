"""The command line of the study mla."""

from experiments.studies.framework import runner
from experiments.studies.mla.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
