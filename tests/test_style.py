"""Style rules: types on every public function, few parameters, functions that fit a screen."""

import ast
import itertools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("deepseek_jax", "kernels_pallas", "experiments", "benchmarks", "examples", "notebooks", "docs")
MOST_PARAMETERS, MOST_LINES, LEAST_ANNOTATED = 8, 60, 0.95


def functions(source):
    """(name, node, whether public) of every function; one inside another is private."""
    def visit(node, prefix, public):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", public and not child.name.startswith("_"))
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
                yield prefix + child.name, child, public and not inside and not child.name.startswith("_")
                yield from visit(child, f"{prefix}{child.name}.", False)
            else:
                yield from visit(child, prefix, public)

    yield from visit(ast.parse(source), "", True)


def parameters(node):
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return [a for a in every if a is not None and a.arg not in ("self", "cls")]


def files():
    return sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))


def test_public_functions_have_types():
    bare, total, unsaid = [], 0, []
    for path in files():
        for name, node, public in functions(path.read_text()):
            if public:
                found = parameters(node)
                total += len(found)
                bare += [f"{path.relative_to(ROOT)}:{node.lineno} {name}({a.arg})" for a in found
                         if a.annotation is None]
                if node.returns is None and name.split(".")[-1] != "__init__":
                    unsaid.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert total > 1000
    assert 1 - len(bare) / total >= LEAST_ANNOTATED, "\n".join(bare)
    assert not unsaid, "what these return is not said:\n" + "\n".join(unsaid)


def too_large(source):
    """(line, name, what is too large) of functions without a comment above them that says why."""
    lines = source.splitlines()
    for name, node, _ in functions(source):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        if first > 1 and lines[first - 2].lstrip().startswith("#"):
            continue
        if len(parameters(node)) > MOST_PARAMETERS:
            yield node.lineno, name, f"{len(parameters(node))} parameters"
        if node.end_lineno - node.lineno >= MOST_LINES:
            yield node.lineno, name, f"{node.end_lineno - node.lineno + 1} lines"


def test_functions_are_short_and_take_few_parameters_or_say_why():
    wrong = [f"{path.relative_to(ROOT)}:{line} {name} has {what}"
             for path in files() for line, name, what in too_large(path.read_text())]
    assert not wrong, "\n".join(["", *wrong])


def test_a_comment_above_a_large_function_is_asked_for():
    large = "def f():\n" + "    x = 1\n" * 60 + "def g(a, b, c, d, e, f, g, h, i):\n    pass\n"
    assert list(too_large(large)) == [(1, "f", "61 lines"), (62, "g", "9 parameters")]
    assert list(too_large("# One kernel.\n" + large.replace("def g", "# Why.\n@decorated\ndef g"))) == []


def test_our_modules_are_imported_under_their_own_names():
    wrong = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PACKAGES:
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno} {a.name} as {a.asname}" for a in node.names
                          if a.asname and a.asname != a.name]
    assert not wrong, "\n".join(["", *wrong])


@pytest.mark.parametrize(("source", "public", "count"), [
    ("def f(a, *, b: int = 1): pass", True, 2), ("def _f(a): pass", False, 1),
    ("class A:\n    def f(self, x): pass", True, 1), ("def f():\n    def g(x): pass", False, 1)])
def test_functions_and_their_parameters_are_found(source, public, count):
    *_, (_, node, found) = itertools.islice(functions(source), 2)
    assert (found, len(parameters(node))) == (public, count)
