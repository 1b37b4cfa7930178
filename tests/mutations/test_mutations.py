"""The mutations can still be applied: a row whose text has gone from the source breaks nothing."""

import pathlib

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
        if where == file:
            compile(source.replace(old, new), name, "exec")


def test_the_tests_that_should_notice_exist():
    named = {path for *_, tests in MUTATIONS for path in tests.split() if not path.startswith("-")}
    assert all((ROOT / "tests" / path.split("::")[0]).exists() for path in named)
