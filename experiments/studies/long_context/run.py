"""The command line of the study long_context."""

from experiments.studies.framework import runner
from experiments.studies.long_context.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
