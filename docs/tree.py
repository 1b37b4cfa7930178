"""What every file of the packages is for: the first sentence of each module, as a page.

    python -m docs.tree > docs/tree.md
"""

import argparse
import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("deepseek_jax", "kernels_pallas")
HEAD = """# Every module in a line

The first sentence of each module of both packages; written by `python -m docs.tree > docs/tree.md`.
Tests mirror the tree, and what imports what is in [design](design.md). Functions and classes are in
the site's API reference. Studies: [claims](claims.md); benchmarks: [benchmarks](benchmarks.md).
"""
SENTENCE = re.compile(r"(.+?)(?:[.:]?\n\n|\.\s|\.?$)", re.DOTALL)


def page() -> str:
    """The page: a table for each folder."""
    folders: dict[pathlib.Path, list[pathlib.Path]] = {}
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        if first_sentence(path):
            folders.setdefault(path.parent, []).append(path)
    return HEAD + "".join(f"\n## {folder.relative_to(ROOT)}\n\n| | |\n|---|---|\n" + "".join(
        f"| [{path.name}](../{path.relative_to(ROOT)}) | {first_sentence(path)} |\n" for path in paths)
        for folder, paths in folders.items())


def first_sentence(path: pathlib.Path) -> str:
    """The first sentence of a module, without its point; nothing if the module has no docstring."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    found = SENTENCE.match(said)
    return " ".join(found[1].split()).replace("|", r"\|") if found else ""


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m docs.tree", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(page(), end="")
