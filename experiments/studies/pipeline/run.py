"""The command line of the study pipeline."""

from experiments.studies.framework import runner
from experiments.studies.pipeline.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
