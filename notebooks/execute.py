"""Runs the notebooks top to bottom, each in a separate kernel.

    python notebooks/execute.py                     all of them, short; nothing is written
    python notebooks/execute.py --write mla_cache   in full, and keeps the outputs in the file

QUICK=1 in the environment makes a notebook train less. Output on stderr counts as a failure: notebooks should show no
warnings.
"""

import argparse
import os
import pathlib
import sys
import time
from collections.abc import Iterator

import nbformat  # pyright: ignore[reportMissingImports] (extra notebooks)
from nbclient import NotebookClient  # pyright: ignore[reportMissingImports] (extra notebooks)

HERE = pathlib.Path(__file__).resolve().parent
LONGEST_CELL = 40  # lines: a screen


def faults(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Faults of a notebook: code longer than a screen, warnings."""
    for number, cell in enumerate(c for c in notebook.cells if c.cell_type == "code"):
        if len(cell.source.splitlines()) > LONGEST_CELL:
            yield f"code cell {number} has {len(cell.source.splitlines())} lines, more than {LONGEST_CELL}"
        for output in cell.outputs:
            if output.get("name") == "stderr":
                yield f"code cell {number} writes to stderr: {output.text.strip()[:200]}"


def execute(path: pathlib.Path, write: bool) -> list[str]:
    """Runs one notebook; returns its faults."""
    notebook = nbformat.read(path, as_version=4)
    # A kernel with widgets sometimes misses the end of a cell, and the client then waits for all of the limit.
    client = NotebookClient(notebook, timeout=600 if write else 300, kernel_name="python3",
                            resources={"metadata": {"path": str(HERE)}})
    client.execute()
    found = list(faults(notebook))
    if write and not found:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which differ from run to run
        nbformat.write(notebook, path)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="without .ipynb; none: all")
    parser.add_argument("--write", action="store_true", help="in full, and keep the outputs")
    args = parser.parse_args()
    if not args.write:
        os.environ["QUICK"] = "1"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    names = args.names or sorted(path.stem for path in HERE.glob("*.ipynb"))
    bad = 0
    for name in names:
        begun = time.perf_counter()
        found = execute(HERE / f"{name}.ipynb", args.write)
        bad += bool(found)
        took = f"{time.perf_counter() - begun:.0f} s"
        print(f"{'red ' if found else 'ok  '} {name}: {took}", *found, sep="\n     ", flush=True)
    print(f"{len(names) - bad} passed, {bad} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
