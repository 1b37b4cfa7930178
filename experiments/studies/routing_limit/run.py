"""The command line of the study routing_limit."""

from experiments.studies.framework import runner
from experiments.studies.routing_limit.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
