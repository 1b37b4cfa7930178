"""The top of every notebook says what it is for, and the first cell is the same everywhere."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPOSITORY = re.search(r'^REPOSITORY = "https://github.com/(.*?)"', (ROOT / "setup.py").read_text(), re.M)[1]
FIRST_CELL = f'''\
REPO = "https://github.com/{REPOSITORY}"
import importlib.util

if importlib.util.find_spec("deepseek_jax") is None:  # in Colab: adds what is missing, replaces nothing
    %pip install -q --no-deps "git+{{REPO}}" "chex==0.1.90" toolz ml-collections tensorboardX
'''


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param.stem, json.loads(request.param.read_text())


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_the_top_says_how_long_it_takes_and_for_whom_and_opens_in_colab(notebook):
    name, content = notebook
    top = sources(content, "markdown")[0]
    assert content["cells"][0]["cell_type"] == "markdown" and top.startswith("# ")
    assert f"(https://colab.research.google.com/github/{REPOSITORY}/blob/main/notebooks/{name}.ipynb)" in top
    assert re.search(r"\*\*Takes\*\* [\w ]+ (seconds|minutes?) on two CPU cores", top) and "**For** " in top


def test_the_first_cell_installs_what_is_missing(notebook):
    assert sources(notebook[1], "code")[0].startswith(FIRST_CELL)


def test_the_address_of_setup_py_is_used_everywhere(notebook):
    assert set(re.findall(r"github(?:\.com)?/([\w-]+/deepseek-jax)", json.dumps(notebook[1]))) == {REPOSITORY}


def test_a_kernel_is_named(notebook):
    assert notebook[1]["metadata"]["kernelspec"]["name"] == "python3"


def test_axes_in_names_are_explained(notebook):
    name, content = notebook
    code, text = "\n".join(sources(content, "code")), "\n".join(sources(content, "markdown"))
    if re.search(r"\b[a-z]\w*_[A-Z0-9]*[A-Z]\b", code):
        assert "its axes" in text or "axes of an array" in text


def test_a_loss_in_nats_is_explained(notebook):
    _, content = notebook
    if "nats a byte" in "\n".join(sources(content, "code")):
        assert "*nats a byte*: the mean of -ln" in "\n".join(sources(content, "markdown"))


def test_sliders_capture_nothing(notebook):
    """`interact` sometimes makes nbclient miss the end of a cell."""
    assert "interact(" not in "\n".join(sources(notebook[1], "code"))


def test_every_notebook_has_its_row_in_the_docs():
    page = (ROOT / "docs" / "notebooks.md").read_text()
    assert not [path.name for path in NOTEBOOKS if f"(../notebooks/{path.name})" not in page]
