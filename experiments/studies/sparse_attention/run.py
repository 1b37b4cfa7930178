"""The command line of the study sparse_attention."""

from experiments.studies.framework import runner
from experiments.studies.sparse_attention.study import STUDY

if __name__ == "__main__":
    runner.main(STUDY)
