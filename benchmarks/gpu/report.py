"""The rows of all stages as a page of tables, report.md: written at the end of a run, also of one that was resumed."""

import pathlib
from typing import Any

from benchmarks.gpu.stage import read
from benchmarks.gpu.stages import COMPILE, MACHINE, STAGES, TRAINING_COMPILE
from deepseek_jax import io

COLUMNS = (("tflops", "TFLOP/s", 1), ("of_published", "of published", 2), ("gb_per_second", "GB/s", 0),
           ("of_copy", "of copy", 2), ("tokens_per_second", "tokens/s", 0), ("seconds_per_step", "s/step", 5))


def write(out: pathlib.Path) -> None:
    """Writes out/report.md."""
    machine = read(str(out / f"{MACHINE.name}.json")).get("machine", {})
    packages = {name: version for name, version in (machine.get("packages") or {}).items() if version}
    head = [f"# {machine.get('device')}", "", f"{', '.join(f'{n} {v}' for n, v in packages.items())}; driver, clock, "
            f"power, memory: {machine.get('driver')}. Peers: their time in units of ours.", ""]
    parts = [table(stage.name, read(str(out / f"{stage.name}.json"))) for stage in (*STAGES, TRAINING_COMPILE, COMPILE)]
    io.write_text(out / "report.md", "\n".join(head + [line for part in parts for line in part]) + "\n")


def table(title: str, rows: dict[str, Any]) -> list[str]:
    """Lines of Markdown; a column for every key that a row has."""
    if not rows:
        return []
    columns = [c for c in COLUMNS if any(row.get(c[0]) is not None for row in rows.values())]
    lines = [f"## {title}", "", "| case | state | " + "".join(f"{c[1]} | " for c in columns) + "peers, or why |",
             "|---|---|" + "---|" * len(columns) + "---|"]
    for name, row in rows.items():
        numbers = [f"{row[key]:,.{digits}f}" if row.get(key) is not None else "" for key, _, digits in columns]
        lines.append(f"| {name} | {row['state']} | " + "".join(f"{n} | " for n in numbers) + f"{_words(row)} |")
    return [*lines, ""]


def _words(row):
    peers = [f"{name} {value / row['seconds']:.2f}x" if isinstance(value, float) else f"{name} {value}"
             for name, value in row.get("peers", {}).items()]
    clock = ["by the host's clock"] if row.get("clock") == "host" else []
    return ", ".join([*filter(None, [row.get("why"), row.get("summary")]), *clock, *peers]).replace("|", "/")
