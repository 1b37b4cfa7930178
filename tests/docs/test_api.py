"""The API pages: each public module is on one, what is public says what it is, and names in docstrings are true."""

import ast
import inspect
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = ("deepseek_jax", "kernels_pallas")
ENTRY = re.compile(r"^::: (\S+)$", re.M)


def module_files():
    """{dotted name: file} of the public modules: neither entry points of packages nor empty ones."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__main__.py" and path.read_text().strip():
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = module_files()


def pages():
    """{module: the pages that show it}."""
    found = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for name in ENTRY.findall(page.read_text()):
            found.setdefault(name, []).append(page.name)
    return found


def test_every_public_module_is_on_one_page():
    found = pages()
    assert not sorted(set(MODULES) - set(found)), "these are on no page of docs/api"
    assert not sorted(set(found) - set(MODULES)), "these are on a page and not there"
    assert not {name: on for name, on in found.items() if len(on) > 1}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_module_is_on_the_page_of_its_package(name):
    package, *rest = name.split(".")
    inner = rest and (len(rest) > 1 or MODULES[name].name == "__init__.py")
    page = f"{package}.{rest[0]}" if inner else package
    assert pages()[name] == [f"{page.removeprefix('deepseek_jax.')}.md"]


# What the module's own docstring describes: a command and its options, a config.
DESCRIBED_ABOVE = ("main", "parse", "get_config")


def public(tree):
    """(name, node, whether it needs a docstring) of what a module shows: functions, classes and their methods.

    A property or a method of one line says itself what it is; so does one that overrides another of the same name.
    """
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, node, node.name not in DESCRIBED_ABOVE
            if isinstance(node, ast.ClassDef):
                for child in node.body:
                    if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not child.name.startswith("_"):
                        yield f"{node.name}.{child.name}", child, not node.bases and len(child.body) > 1


def undocumented(source):
    return [name for name, node, needed in public(ast.parse(source)) if needed and not ast.get_docstring(node)]


def test_every_public_function_and_class_says_what_it_is():
    bare = [f"{name}: {which}" for name, path in MODULES.items() for which in undocumented(path.read_text())]
    assert not bare, "\n".join(["no docstring:", *sorted(bare)])


def test_every_module_says_what_it_is():
    assert not [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))]


def named_in_args(docstring):
    """The names that a section `Args:` explains; one line may name several ("bos, eos: ...")."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", inspect.cleandoc(docstring) + "\n", re.M)
    if not section:
        return []
    indent = min((len(line) - len(line.lstrip()) for line in section[1].splitlines() if line.strip()), default=0)
    lines = re.findall(rf"^ {{{indent}}}(\*{{0,2}}\w+(?:, \*{{0,2}}\w+)*):", section[1], re.M)
    return [name.lstrip("*") for line in lines for name in line.split(", ")]


def parameters(node, tree):
    """Names of a function's parameters; of a class, those of __init__, of __call__ and its fields."""
    if isinstance(node, ast.ClassDef):
        fields = {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}
        return fields.union(*(parameters(child, tree) for child in node.body if isinstance(child, ast.FunctionDef)
                              and child.name in ("__init__", "__call__")))
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
    return {a.arg for a in every if a is not None}


def strange_names(source):
    """Names that a docstring explains and that are no parameters."""
    tree = ast.parse(source)
    return [f"{name}({strange})" for name, node, _ in public(tree)
            for strange in named_in_args(ast.get_docstring(node) or "") if strange not in parameters(node, tree)]


def test_docstrings_explain_parameters_that_are_there():
    strange = [f"{name}.{which}" for name, path in MODULES.items() for which in strange_names(path.read_text())]
    assert not strange, "\n".join(["no such parameter:", *strange])


@pytest.mark.parametrize(("source", "bare", "strange"), [
    ("def f(x): pass", ["f"], []), ("def _f(x): pass", [], []),
    ('def f(x):\n    """F.\n\n    Args:\n      x, y: two.\n    """', [], ["f(y)"]),
    ('def f(x):\n    """F.\n\n    Args:\n      x: 1,\n        z: none.\n    Returns:\n      w: 1.\n    """', [], []),
    ('class A:\n    """A."""\n    def f(self):\n        x = 1\n        return x', ["A.f"], []),
    ('class A(B):\n    """A."""\n    def f(self):\n        x = 1\n        return x', [], []),
    ('class A:\n    """A.\n\n    Args:\n      x: y.\n    """\n    def __init__(self, x): pass', [], [])])
def test_what_is_missing_or_strange_is_found(source, bare, strange):
    assert undocumented(source) == bare and strange_names(source) == strange
