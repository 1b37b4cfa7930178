"""The command line of the study load_balance."""

from experiments.studies.framework import runner
from experiments.studies.load_balance.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
