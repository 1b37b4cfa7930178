"""The tests that need a GPU, in a separate pytest process."""

import ast
import functools
import importlib.util
import os
import re
import subprocess
import sys
from typing import Any

from benchmarks.gpu.stages import Cases
from benchmarks.machine import ROOT

FILE = "tests/kernels/test_on_gpu.py"


SECONDS = 100  # of one function's tests


def cases(rehearse: bool) -> Cases:
    for node in ast.parse((ROOT / FILE).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, functools.partial(run, f"{FILE}::{node.name}")


def run(tests: str) -> dict[str, Any]:
    """{"right", "summary": pytest's last line, "red": the tests that failed}."""
    if importlib.util.find_spec("pytest") is None:
        return {"right": True, "summary": "missing: pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=line", "-p", "no:cacheprovider",
               "-o", "addopts=--import-mode=importlib", "-o", "filterwarnings=default", tests]
    # Plugins that happen to be installed may import jax before tests/conftest.py has set its flags.
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        print((error.stdout or b"").decode(errors="replace"))
        return {"right": False, "summary": f"cut off after {SECONDS} s", "red": []}
    print(done.stdout, done.stderr, sep="\n")
    red = re.findall(r"^(?:FAILED|ERROR) (.*)", done.stdout, re.MULTILINE)
    last = (done.stdout.strip() or done.stderr.strip() or "it said nothing").splitlines()[-1]
    return {"right": done.returncode in (0, 5), "summary": last, "red": [line[:200] for line in red]}  # 5: no tests
