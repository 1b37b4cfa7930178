"""The requirements in setup.py are compatible with those of jax on each accelerator."""

import importlib.metadata
import pathlib
import re

import jax
import pytest
from packaging.requirements import Requirement

SETUP = (pathlib.Path(__file__).resolve().parent.parent / "setup.py").read_text()


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_jax_has_the_extra_of_each_accelerator(extra):
    assert f'"{extra}": ["jax[{extra}]"]' in SETUP
    assert extra in importlib.metadata.metadata("jax").get_all("Provides-Extra")


def test_the_plugin_that_compiles_is_of_the_versions_that_jax_takes():
    ours = Requirement(re.search(r'"(jax-cuda13-plugin[^"]*)"', SETUP)[1]).specifier
    if jax.__version_info__ < (0, 11, 2):
        pytest.skip("compiling for absent GPUs needs a newer jax")
    theirs = [Requirement(text) for text in importlib.metadata.requires("jax")]
    asked, = [r for r in theirs if r.name == "jax-cuda13-plugin" and r.marker.evaluate({"extra": "cuda13"})]
    assert ours.contains(jax.__version__) and asked.specifier.contains(jax.__version__)
