"""Every mutation can still be applied: its text occurs in the source, as otherwise it would break nothing."""

import json
import pathlib
import re

import pytest

from tests.mutations import MUTATIONS

ROOT = pathlib.Path(__file__).parents[2]


def test_names_of_mutations_differ():
    names = [name for name, *_ in MUTATIONS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("file", sorted({file for _, file, *_ in MUTATIONS}))
def test_the_text_of_a_mutation_stands_in_its_file_once(file):
    source = (ROOT / file).read_text()
    stale = [name for name, where, old, new, _ in MUTATIONS
             if where == file and (source.count(old) != 1 or old == new)]
    assert not stale
    for name, where, old, new, _ in MUTATIONS:
        if where == file and file.endswith(".py"):
            compile(source.replace(old, new), name, "exec")


def test_the_tests_that_should_notice_exist():
    named = {path for *_, tests in MUTATIONS for path in tests.split() if not path.startswith("-")}
    assert all((ROOT / "tests" / path.split("::")[0]).exists() for path in named)


def test_every_mutation_has_gone_red_in_a_test_that_is_still_there():
    results = json.loads((ROOT / "tests/mutations/results.json").read_text())
    assert {name for name, *_ in MUTATIONS} == results.keys()
    gone = []
    for name, row in results.items():
        path, _, test = (row["red"] or "").partition("::")
        source = ROOT / "tests" / path
        if test and not (source.is_file() and re.search(rf"^def {re.match('[a-z0-9_]*', test)[0]}", source.read_text(),
                                                        re.MULTILINE)):
            gone.append(f"{name}: {row['red']}")
        if not row["red"]:
            gone.append(f"{name}: never red")
    assert not gone, "\n".join(gone)
