"""A starting point for the tests of posttraining."""

import pytest

from tests.posttraining import policies


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A config that starts from a run with random weights, of the smallest model with experts."""
    return policies.start_run(tmp_path_factory.mktemp("small") / "run", policies.config_of(model=policies.SMALL))
