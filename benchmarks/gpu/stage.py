"""One stage in its own process: `python -m benchmarks.gpu.stage CASES FILE [--rehearse]`, started by runner.py.

Each case is a row of FILE, written before it starts ("running") and after it has ended. Cases that FILE already has are
skipped. After a case that raised, the process exits with AGAIN: after an illegal memory access, all later cases in the
same CUDA context would fail too.
"""

import argparse
import ctypes
import importlib
import json
import sys
import time
import traceback
from typing import Any

from benchmarks.gpu.stages import Cases
from deepseek_jax import io

AGAIN = 75


def run(cases: Cases, path: str) -> int:
    """Returns 0: all cases have rows; AGAIN: one raised, and others remain."""
    rows = read(path)
    for name, measure in cases:
        if name in rows:
            continue
        start = time.time()
        rows[name] = {"state": "running", "began": start}
        io.write_json(path, rows, indent=1)
        try:
            found = measure()
            found = json.loads(json.dumps(found), parse_constant=str)  # JSON has no NaN
            rows[name] = {"state": "done" if found.get("right", True) else "wrong", **found}
        except Exception as error:
            traceback.print_exc()
            why = (str(error).strip() or "no message").splitlines()[0][:300]
            rows[name] = {"state": "failed", "why": f"{type(error).__name__}: {why}"}
        rows[name]["seconds_in_all"] = round(time.time() - start, 2)
        io.write_json(path, rows, indent=1)
        print(f"{name}: {rows[name]['state']}", flush=True)
        if rows[name]["state"] == "failed":
            return AGAIN
    return 0


def read(path: str) -> dict[str, Any]:
    """The rows of a stage so far; none if there is no file."""
    try:
        return io.read_json(path)
    except FileNotFoundError:
        return {}


def end_with_parent() -> None:
    """On Linux, ends this process if its parent is killed: it would keep the GPU and write into the next run's file."""
    parent_died, kill = 1, 9  # PR_SET_PDEATHSIG, SIGKILL
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(parent_died, kill)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", help="module:function of (rehearse) -> Cases")
    parser.add_argument("file")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    end_with_parent()
    module, function = args.cases.split(":")
    return run(getattr(importlib.import_module(module), function)(args.rehearse), args.file)


if __name__ == "__main__":
    sys.exit(main())
