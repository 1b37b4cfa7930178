"""What TPU programs access: a program that does not compile is a row too, and is not compiled again."""

import json
import sys

import jax

from experiments.scale import tpu


def test_a_program_that_does_not_compile_is_a_row_and_counts_as_had(monkeypatch, tmp_path, capsys):
    compiled = []

    def measure(chip, part, c):
        compiled.append((part.attends, c.implementation))
        if not part.attends and c.implementation == "xla":
            raise jax.errors.JaxRuntimeError("wants more VMEM than a core has\nand more")
        return {"bytes_accessed": 1e9, "flops": 1e9, "temporaries": 1e6, "seconds": 1.0}

    out = tmp_path / "rows.json"
    monkeypatch.setattr(tpu, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["tpu", "--json", str(out), "--chips", "v6e", "--models", "v3_671b"])
    for _ in range(2):
        tpu.main()
        assert len(compiled) == 4
    rows = json.loads(out.read_text())["rows"]
    assert [row.get("error") for row in rows] == [None, None, "wants more VMEM than a core has", None]
    assert "wants more VMEM than a core has" in capsys.readouterr().out
