"""Runs the notebooks as Colab does: its versions, and a folder that holds the notebook and nothing else.

    make colab                                              all of them, short
    .venv-colab/bin/python -m notebooks.colab mla_cache     one of them

`make colab` builds .venv-colab from colab_pins.txt. The first cell installs the last commit of this checkout instead of
REPO's, under a kernel that has already imported numpy; it may add packages, but must keep every version it finds.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import nbformat  # pyright: ignore[reportMissingImports] (extra notebooks)
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports] (extra notebooks)
from nbclient.exceptions import CellExecutionError, CellTimeoutError  # pyright: ignore[reportMissingImports]

from notebooks.execute import HERE, faults

INSTALL_SECONDS = 30   # seconds that the first cell promises; four times as many are an error
CELL_SECONDS = 400
ALL_SECONDS = 900      # no notebook is started later than this
ENVIRONMENT = HERE.parent / ".venv-colab"
REPO = re.compile(r'^REPO = ".*"$', re.MULTILINE)


def parsed(freeze: str) -> dict[str, str]:
    """The packages that `pip freeze` lists, with their versions or addresses."""
    return dict(re.findall(r"^([\w.-]+)(?:==| @ )(.*)$", freeze, re.MULTILINE))


def installed() -> dict[str, str]:
    """The packages of this environment."""
    freeze = [sys.executable, "-m", "pip", "freeze", "--all"]
    return parsed(subprocess.run(freeze, check=True, capture_output=True, text=True).stdout)


def fresh() -> dict[str, str]:
    """Removes what an earlier run has added; returns the versions that Colab has."""
    base = parsed((ENVIRONMENT / "base.txt").read_text())
    if added := sorted(set(installed()) - set(base)):
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-qq", "-y", *added], check=True)
    return base


def changed(before: dict[str, str], after: dict[str, str]) -> Iterator[str]:
    """A line for each package that is gone or has another version."""
    for name, version in before.items():
        if after.get(name) != version:
            yield f"the first cell replaced {name} {version} by {after.get(name, 'nothing')}"


def as_in_colab(notebook: nbformat.NotebookNode, address: str) -> None:
    """Names the checkout as REPO, and lets the kernel import numpy before the first cell."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    first.source, found = REPO.subn(f'import numpy\nREPO = "{address}"', first.source)
    if found != 1:
        raise ValueError(f'the first cell has {found} lines REPO = "..."; it needs one.')


def execute(name: str, before: dict[str, str]) -> list[str]:
    """Runs one notebook; returns its faults."""
    notebook = nbformat.read(HERE / f"{name}.ipynb", as_version=4)
    as_in_colab(notebook, f"file://{HERE.parent}")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=CELL_SECONDS, kernel_name="python3",
                                resources={"metadata": {"path": folder}})
        try:
            with client.setup_kernel():
                for number, cell in enumerate(notebook.cells):
                    begun = time.monotonic()
                    client.execute_cell(cell, number)
                    took = time.monotonic() - begun
                    if cell.source.startswith("import numpy\nREPO"):
                        print(f"     first cell of {name}: {took:.0f} s", flush=True)
                        if took > 4 * INSTALL_SECONDS:
                            found.append(f"the first cell took {took:.0f} s, more than {4 * INSTALL_SECONDS}")
        except (CellExecutionError, CellTimeoutError) as error:
            found.append(str(error)[-2000:])
    if replaced := list(changed(before, installed())):
        (ENVIRONMENT / "stamp").unlink(missing_ok=True)  # `make colab` builds it again
    # pip's own notes about the index are not an error of the first cell.
    return [*found, *replaced, *(fault for fault in faults(notebook) if "code cell 0 writes" not in fault)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="without .ipynb; none: all")
    names = parser.parse_args().names or sorted(path.stem for path in HERE.glob("*.ipynb"))
    os.environ |= {"QUICK": "1", "JAX_PLATFORMS": "cpu", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    os.environ.pop("PYTHONPATH", None)  # the notebook has to get the package by itself
    before, started, bad, late = fresh(), time.monotonic(), 0, 0
    for name in names:
        begun = time.monotonic()
        if begun - started > ALL_SECONDS:
            late += 1
            print(f"late {name}: not run, {ALL_SECONDS} s are over", flush=True)
            continue
        found = execute(name, before)
        bad += bool(found)
        took = f"{time.monotonic() - begun:.0f} s"
        print(f"{'red ' if found else 'ok  '} {name}: {took}", *found, sep="\n     ", flush=True)
    print(f"{len(names) - bad - late} passed, {bad} failed, {late} not run, with jax {before['jax']} and Python "
          f"{sys.version.split()[0]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
