"""The README and the pages of docs: their links lead somewhere, their lines fit, and the commands in them exist."""

import ast
import importlib.util
import pathlib
import re

import pytest

from deepseek_jax.__main__ import COMMANDS

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


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_lines_fit_a_terminal(page):
    long = []
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if len(line) > 100 and not line.startswith("|") and "](" not in line:
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_are_there(page):
    for name in re.findall(r"-m (deepseek_jax(?:\.\w+)?|experiments(?:\.\w+)+|benchmarks\.\w+)", page.read_text()):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name
        if name.startswith("deepseek_jax.") and name != "deepseek_jax.config":
            assert name.removeprefix("deepseek_jax.") in COMMANDS
