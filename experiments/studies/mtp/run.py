"""The command line of the study mtp."""

from experiments.studies.framework import runner
from experiments.studies.mtp.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
