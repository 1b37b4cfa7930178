"""Applies mutations to copies of the tree, runs their tests, and records the failures."""

import argparse
import concurrent.futures
import datetime
import json
import os
import pathlib
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

from tests import mutations
from tests.mutations import MUTATIONS
from tests.mutations.row import Mutation

ROOT = pathlib.Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests" / "mutations" / "results.json"
COPIED = ("deepseek_jax", "kernels_pallas", "experiments", "benchmarks", "examples", "docs", "tests",
          "pyproject.toml", "mkdocs.yml", "setup.py", "Makefile", "README.md", "LOG.md", "CHANGELOG.md",
          "CONTRIBUTING.md")


class Verdict(NamedTuple):
    """The result of one mutation: the first failed test, or why there is none."""

    noticed: bool
    words: str


def run_tests(tree: pathlib.Path, tests: str) -> Verdict:
    """Runs pytest on `tests` inside `tree` until the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "--maxfail=1", "-p", "no:cacheprovider",
               "-o", "addopts=--import-mode=importlib", *(f"tests/{test}" if not test.startswith("-") else test
                                                          for test in tests.split())]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), **os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return Verdict(False, f"SURVIVED {tests}")
    red = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", done.stdout, re.MULTILINE)
    # A module that can no longer be imported, or a failing fixture, is a collection error: pytest exits with 2.
    if done.returncode not in (1, 2) or red is None:
        return Verdict(False, f"pytest could not run:\n{(done.stdout + done.stderr).strip()[-2000:]}")
    return Verdict(True, red[1])


def judge(mutation: Mutation, tree: pathlib.Path) -> Verdict:
    """Applies one mutation to the copy `tree`, runs its tests, and reverts it."""
    path = tree / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        return Verdict(False, f"STALE: its text is there {source.count(mutation.old)} times in {mutation.file}, not "
                              "once")
    mutated = source.replace(mutation.old, mutation.new)
    try:
        if path.suffix == ".py":
            compile(mutated, mutation.file, "exec")
    except SyntaxError as error:
        return Verdict(False, f"no Python: {error}")
    path.write_text(mutated)
    try:
        return run_tests(tree, mutation.tests)
    finally:
        path.write_text(source)


def copy_tree(folder: str) -> pathlib.Path:
    tree = pathlib.Path(folder)
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
    return tree


def record(mutation: Mutation, verdict: Verdict):
    """Puts the verdict into results.json, in the order of the tables."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[mutation.name] = {"date": datetime.date.today().isoformat(),
                            "red": verdict.words if verdict.noticed else None}
    ordered = {m.name: found[m.name] for m in MUTATIONS if m.name in found}
    RESULTS.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in ordered.items()) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=mutations.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--room", action="append", help="only the rows of this module; may be repeated")
    parser.add_argument("--missing", action="store_true", help="only rows that results.json has no red test for")
    parser.add_argument("--jobs", type=int, default=1, help="mutations at once, each in a copy of the tree")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.words or any(w.lower() in m.name.lower() for w in args.words)]
    if args.room:
        names = {m.name for room in args.room for m in sys.modules[f"tests.mutations.{room}"].MUTATIONS}
        chosen = [m for m in chosen if m.name in names]
    if args.missing and RESULTS.exists():
        found = json.loads(RESULTS.read_text())
        chosen = [m for m in chosen if not found.get(m.name, {}).get("red")]
    if args.list or not chosen:
        print("\n".join(m.name for m in chosen))
        return 0
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder, \
            concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        trees: queue.Queue[pathlib.Path] = queue.Queue()
        for i in range(args.jobs):
            trees.put(copy_tree(f"{folder}/{i}"))

        def one(mutation: Mutation) -> tuple[Mutation, Verdict, float]:
            tree, start = trees.get(), time.time()
            try:
                return mutation, judge(mutation, tree), time.time() - start
            finally:
                trees.put(tree)

        for future in concurrent.futures.as_completed([pool.submit(one, m) for m in chosen]):
            mutation, verdict, seconds = future.result()
            survived += not verdict.noticed
            record(mutation, verdict)
            print(f"{'red ' if verdict.noticed else 'LEFT'} {seconds:4.0f} s  {mutation.name:48}  {verdict.words}",
                  flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations were noticed.")
    return 1 if survived else 0
