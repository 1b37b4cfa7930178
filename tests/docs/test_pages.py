"""The README and the pages of docs: their links lead somewhere, their lines fit, and the commands in them exist."""

import ast
import importlib.util
import pathlib
import re

import pytest

from deepseek_jax.__main__ import COMMANDS
from deepseek_jax.config import named_configs
from deepseek_jax.config.load import RENAMED
from docs import tree

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"config.md"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_readme_has_two_hundred_lines_at_most_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text]


@pytest.mark.parametrize("page", [*(page for page in PAGES if page.name not in GENERATED), ROOT / "CONTRIBUTING.md",
                                  ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_fit_a_terminal(page):
    long = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if len(line) > 100 and not line.startswith(("|", "!")):
            long.append(number)
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_a_page_parses_and_imports_what_is_there(page):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("deepseek_jax", "experiments"):
                found = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(found, alias.name)
                            and importlib.util.find_spec(f"{node.module}.{alias.name}") is None]


def test_the_page_of_files_has_what_modules_say():
    assert (ROOT / "docs" / "tree.md").read_text() == tree.page(), "python -m docs.tree > docs/tree.md"


def test_the_tree_of_the_readme_has_every_folder():
    (block,) = re.findall(r"^```text\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    named = set(re.findall(r"(\w+)/", block))
    code = ["deepseek_jax", "kernels_pallas", "experiments", "benchmarks", "notebooks", "examples", "docs", "tests"]
    inside = {path.parent.name for path in (ROOT / "deepseek_jax").glob("*/__init__.py")}
    assert named == {*code, *inside} - {"plots"} and all((ROOT / name).is_dir() for name in code)


def test_every_config_has_its_name_in_the_page_of_training():
    text = (ROOT / "docs" / "training.md").read_text()
    assert not [name for name in named_configs() if f"`{name}`" not in text]


KEYS = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", (ROOT / "docs" / "config.md").read_text(), re.M)) | set(RENAMED)
SECTIONS = {key.split(".")[0] for key in KEYS}


def named_keys(text):
    """Config keys that a page names: options of a command, and `section.key`, with or without a value."""
    told = re.findall(r"--config\.([a-z0-9_.]*[a-z0-9_])=", text)
    told += re.findall(r"`([a-z0-9]+\.[a-z0-9][a-z0-9_]*)(?:=[^`]*)?`", text)
    return {key for key in told if key.split(".")[0] in SECTIONS and not key.endswith((".py", ".md", ".json"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_of_a_page_are_there(page):
    assert not named_keys(page.read_text()) - KEYS


def test_a_key_that_is_not_there_is_seen():
    text = "`balance.bias_sped`, `train.steps=3`, `model.py`, --config.mesh.schedule=dualpipe --config.train.steps=1"
    assert named_keys(text) - KEYS == {"balance.bias_sped", "mesh.schedule"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_are_there(page):
    for name in re.findall(r"-m (deepseek_jax(?:\.\w+)?|experiments(?:\.\w+)+|benchmarks\.\w+)", page.read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
        if name.startswith("deepseek_jax.") and name != "deepseek_jax.config":
            assert name.removeprefix("deepseek_jax.") in COMMANDS
