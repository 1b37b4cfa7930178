"""The command line of the study bias_rule."""

from experiments.studies.bias_rule.study import STUDY
from experiments.studies.framework import runner

if __name__ == "__main__":
    runner.main(STUDY)
