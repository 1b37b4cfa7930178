"""Evaluation: the kernels that are used for a finished run."""

import pytest

from deepseek_jax.config import freeze
from deepseek_jax.training import evaluate
from tests.model import naive


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize(("asked", "taken"), [("reference", "reference"), ("auto", "auto"), ("hopper", "auto"),
                                              ("tpu", "auto")])
def test_only_kernels_that_this_machine_does_not_have_are_replaced(monkeypatch, asked, taken, enabled):
    config = freeze({"model": naive.TINY, "fp8": {"enabled": enabled, "implementation": asked}})
    monkeypatch.setattr(evaluate, "load_run", lambda *_: (config, {}, 1))

    def prepared(config, workdir):
        raise InterruptedError(config.model.fp8.implementation)

    monkeypatch.setattr(evaluate, "prepare", prepared)
    with pytest.raises(InterruptedError, match=f"^{taken}$"):
        evaluate.evaluate_workdir("run")
