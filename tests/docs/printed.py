"""Where commands are printed: pages, docstrings of modules, prose of notebooks, CI, and the recipes of the Makefile."""

import ast
import functools
import json
import pathlib
import shutil
import subprocess

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROOMS = ("deepseek_jax", "kernels_pallas", "experiments", "benchmarks", "notebooks", "docs", "examples", "tests")
TARGETS = ("train", "test", "readme", "cluster", "lint", "bench", "kernels", "aot", "rehearse", "studies-quick",
           "notebooks", "colab", "docs", "clean")


@functools.cache
def texts() -> list[str]:
    """All of them. LOG.md and CHANGELOG.md are left out: they have the commands of their day."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages += [page for room in ("experiments", "benchmarks") for page in sorted((ROOT / room).rglob("*.md"))]
    pages += [ROOT / name for name in ("Makefile", ".github/workflows/ci.yml", ".ci/run") if (ROOT / name).exists()]
    modules = [module for room in ROOMS for module in sorted((ROOT / room).rglob("*.py"))]
    cells = [cell for notebook in sorted((ROOT / "notebooks").glob("*.ipynb"))
             for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    return [*(page.read_text(encoding="utf-8") for page in pages),
            *(ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or "" for module in modules),
            *("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"), recipes()]


def recipes() -> str:
    """What make would run for all targets; nothing where there is no make, or no Makefile."""
    if shutil.which("make") is None or not (ROOT / "Makefile").exists():
        return ""
    return subprocess.run(["make", "--dry-run", "--always-make", "--keep-going", "PYTHON=python3", *TARGETS], cwd=ROOT,
                          check=False, capture_output=True, text=True).stdout
