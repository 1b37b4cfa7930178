"""The run with Colab's versions: which packages count as replaced, and where this package comes from."""

import types

import pytest

pytest.importorskip("nbclient", reason="extra notebooks")

from notebooks import colab


def test_a_replaced_or_missing_package_is_named_and_a_new_one_is_allowed():
    before = {"numpy": "2.1.3", "jax": "0.7.2", "flax": "0.11.2"}
    after = {"numpy": "2.5.5", "jax": "0.7.2", "toolz": "1"}
    assert list(colab.changed(before, after)) == ["the first cell replaced numpy 2.1.3 by 2.5.5",
                                                  "the first cell replaced flax 0.11.2 by nothing"]
    assert not list(colab.changed(before, before | {"toolz": "1"}))


def test_the_checkout_takes_the_place_of_the_address_and_numpy_is_there_first():
    cells = [types.SimpleNamespace(cell_type="markdown", source="REPO"),
             types.SimpleNamespace(cell_type="code", source='REPO = "https://x/y"\n%pip install "git+{REPO}"')]
    colab.as_in_colab(types.SimpleNamespace(cells=cells), "file:///here")
    assert cells[1].source == 'import numpy\nREPO = "file:///here"\n%pip install "git+{REPO}"'
    with pytest.raises(ValueError, match="has 0 lines REPO"):
        colab.as_in_colab(types.SimpleNamespace(cells=[types.SimpleNamespace(cell_type="code", source="")]), "file:///")


def test_what_an_earlier_run_added_is_removed_and_its_replacements_do_not_become_the_measure(monkeypatch, tmp_path):
    commands = []
    here = "numpy==2.5.5\ndeepseek-jax @ git+file:///here@1a2b\n# a remark\n"

    def run(command, **options):
        commands.append(command[3:])
        return types.SimpleNamespace(stdout=here)

    (tmp_path / "base.txt").write_text("numpy==2.1.3\n")
    monkeypatch.setattr(colab, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(colab.subprocess, "run", run)
    assert colab.installed() == {"numpy": "2.5.5", "deepseek-jax": "git+file:///here@1a2b"}
    assert colab.fresh() == {"numpy": "2.1.3"}
    assert commands[-1] == ["uninstall", "-qq", "-y", "deepseek-jax"]
