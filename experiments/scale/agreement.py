"""Planned bytes of a device next to the compiler's, for every compiled training step with a report in this folder.

    python -m experiments.scale.agreement            # prints the table and writes agreement.json

Nothing is compiled: the reports have the bytes that XLA counted, and the planner runs again. Its present prediction
replaces the earlier one in the reports.
"""

import argparse
import json
import pathlib

from deepseek_jax.config import FP8Config, MeshConfig, ModelConfig, model_config
from deepseek_jax.io import write_json
from deepseek_jax.scale import memory
from deepseek_jax.scale.compile import targets
from deepseek_jax.scale.layout import Layout

HERE = pathlib.Path(__file__).parent


def reports() -> dict[str, dict]:
    """{name of the file: report} of the training steps."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}
    return {name: one for name, one in found.items() if "planned_over_compiled" in one}


def described(report: dict) -> tuple[ModelConfig, Layout]:
    """The model and the layout of a report."""
    c = model_config(report["model"], num_layers=report["layers"], remat=report["remat"],
                     fp8=FP8Config(enabled=report["fp8"]))
    return c, Layout(MeshConfig(**report["mesh"]), report["schedule"] or "dualpipe", report["micro_batches"],
                     report["rows"], report["sequence_length"], deferred=report["deferred"])


def row(name: str, report: dict) -> dict:
    """One line of the table, as JSON data."""
    c, layout = described(report)
    planned = memory.bytes_per_device(c, layout, targets.kernels_of(report["target"]))
    total, compiled = sum(planned.values()), report["bytes_per_device"]
    return {"report": name, "model": report["model"], "layers": report["layers"], "target": report["target"],
            "layout": report["layout"], "fp8": report["fp8"], "remat": report["remat"], "planned": total,
            "compiled": compiled, "planned_over_compiled": total / compiled, "fits": report["fits"], "groups": planned}


def main() -> None:
    argparse.ArgumentParser(prog="python -m experiments.scale.agreement", description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for name, report in reports().items():
        rows.append(one := row(name, report))
        again = {"planned": one["groups"], "planned_bytes_per_device": one["planned"],
                 "planned_over_compiled": one["planned_over_compiled"]}
        write_json(str(HERE / f"{name}.json"), report | again)
    rows.sort(key=lambda one: one["compiled"])
    print(f"{'model':12} {'layers':>6} {'target':14} {'':5} {'remat':7} {'layout':82} {'planned':>9} {'XLA':>9}")
    for one in rows:
        print(f"{one['model']:12} {one['layers']:6} {one['target']:14} {'FP8' if one['fp8'] else 'bf16':5} "
              f"{one['remat']:7} {one['layout']:82} {one['planned'] / 1e9:6.2f} GB {one['compiled'] / 1e9:6.2f} GB "
              f"{one['planned_over_compiled'] - 1:+.1%}")
    write_json(str(HERE / "agreement.json"), {"command": "python -m experiments.scale.agreement", "rows": rows})


if __name__ == "__main__":
    main()
