"""The source code that a study's runs depend on: the files that its functions import, and one hash of them.

Comments, docstrings and layout do not count, nor do files outside the checkout and the study's own folder (libraries):
their versions are part of the results.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import pathlib
import re
from collections.abc import Iterator

from deepseek_jax.config.model import OWN
from experiments.studies.framework.study import Study

ROOT = pathlib.Path(__file__).resolve().parents[3]


def digest(study: Study) -> str:
    """One hash of the source; it changes with every change that could affect a run."""
    total = hashlib.sha256()
    for path, tree in sorted(files(study).items()):
        total.update(f"{path.name}\0{ast.dump(_without_docstrings(tree))}\n".encode())
    return total.hexdigest()[:16]


def files(study: Study) -> dict[pathlib.Path, ast.Module]:
    """{file: its syntax tree}: the measure's class and functions, and what they import, directly or not."""
    measure = study.measure
    functions = [value for value in vars(measure).values() if inspect.isfunction(value)]
    todo = [pathlib.Path(inspect.getfile(x)).resolve() for x in (type(measure), *functions)]
    own, found = {path.parent for path in todo}, {}
    while todo:
        path = todo.pop()
        if path in found or not any(path.is_relative_to(folder) for folder in (ROOT, *own)):
            continue
        if "site-packages" in path.parts:
            continue
        found[path] = ast.parse(path.read_bytes())
        todo += [file for name in _modules(found[path]) if (file := _file(name))]
    return found


def _modules(tree: ast.Module) -> Iterator[str]:
    """Names that may be modules: imported, or named in a string as "package.module:name"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(OWN, node.value):
            yield node.value.partition(":")[0]


@functools.cache
def _file(module: str) -> pathlib.Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):  # a name in a module, or not a module
        return None
    is_python = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return pathlib.Path(spec.origin).resolve() if is_python else None  # pyright: ignore


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
                node, clean=False) is not None:
            node.body = node.body[1:]
    return tree
