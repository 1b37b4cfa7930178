"""The measured operations of the pipeline study are those of a stage."""

import jax
import numpy as np
import pytest

from experiments.studies.pipeline import measure


@pytest.mark.slow
def test_the_operations_of_a_stage_run_and_bi_with_w_gives_what_b_gives():
    config = measure.config_of("1f1b", 4, vocab_size=512, d_model=32, num_experts=4, num_groups=1, groups_kept=1)
    calls = measure.operations(config)
    assert list(calls) == ["F", "B", "Bi", "W", "F&B"]
    (dx, dparams), (dx_first, _), dparams_later = calls["B"](), calls["Bi"](), calls["W"]()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), (dx, dparams),
                 (dx_first, dparams_later))
