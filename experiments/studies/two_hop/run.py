"""The command line of the study two_hop."""

from experiments.studies.framework import runner
from experiments.studies.two_hop.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
