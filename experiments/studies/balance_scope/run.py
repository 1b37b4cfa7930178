"""The command line of the study balance_scope."""

from experiments.studies.balance_scope.study import STUDY
from experiments.studies.framework import runner

if __name__ == "__main__":
    runner.main(STUDY)
