"""The tests that need a GPU, in a pytest of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.gpu.stages import Cases
from benchmarks.machine import ROOT

FILE = "tests/kernels/test_on_gpu.py"


def cases(rehearse: bool) -> Cases:
    yield FILE, run


def run() -> dict[str, Any]:
    """{"right", "summary": pytest's last line, "red": the tests that failed}."""
    if importlib.util.find_spec("pytest") is None:
        return {"right": True, "summary": "missing: pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider",
               "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", FILE]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    print(done.stdout, done.stderr, sep="\n")
    red = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip() or "it said nothing").splitlines()[-1]
    return {"right": done.returncode in (0, 5), "summary": last, "red": [line[:200] for line in red]}  # 5: none was run
