"""The overlap study: its layouts, what its products are worth, and the shares it commits."""

import json
import pathlib

import pytest

from experiments.studies.pipeline import overlap

RESULTS = pathlib.Path(overlap.__file__).parent / "overlap.json"


def test_the_experts_products_count_the_rows_that_hold_tokens():
    rows = overlap.CAPACITY * 1024 * overlap.MODEL.experts_per_token
    one = 2 * rows * overlap.MODEL.d_model * overlap.MODEL.expert_ffn_dim

    assert overlap.worth(one * 1.001, 1024) == pytest.approx(one / overlap.CAPACITY, rel=2e-3)
    assert overlap.worth(one / 2, 1024) == one / 2
    assert overlap.worth(one * 1.2, 1024) == one * 1.2  # attention's


def test_both_lengths_and_machines_hide_at_least_nine_tenths_of_dualpipes_exchanges():
    cells = {(row["tokens"], row["machine"]): row["exposed"] for row in json.loads(RESULTS.read_text())["rows"]
             if row["cell"] == "F&B"}
    assert cells.keys() == {(tokens, machine) for tokens in (1024, 4096) for machine in ("h100", "h800")}
    assert max(cells.values()) <= 0.1


def test_the_compiled_layouts_are_those_of_the_schedules():
    for schedule in overlap.CELLS:
        layout = overlap.layout_of(schedule, 1024)
        assert (layout.mesh.devices, layout.pipeline.name, layout.tokens) == (128, schedule, 1024)


def test_exposed_shares_are_those_of_the_committed_transfers():
    for row in json.loads(RESULTS.read_text())["rows"]:
        waited, seconds = (sum(t[name] for t in row["transfers"]) for name in ("waited", "seconds"))
        assert row["exposed"] == pytest.approx(waited / seconds)
