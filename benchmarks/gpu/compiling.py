"""Only in a rehearsal: compiles the kernels at the shapes of other stages with the GPU's compiler."""

import functools
from typing import Any

from benchmarks.gpu.stages import Cases

SETS = ("v3-train", "v3-decode")


def cases(rehearse: bool) -> Cases:
    from benchmarks.gpu.kernels import name
    from kernels_pallas.tools import compile_report

    try:
        compiler = compile_report.Compiler()
    except compile_report.NoCompiler as error:
        why = str(error)
        yield "all", lambda: {"summary": f"missing: {why}"}
        return
    for case in compile_report.cases(SETS):
        yield name(case), functools.partial(measure, compiler, case)


def measure(compiler: Any, case: Any) -> dict[str, Any]:
    """Registers and spills of a case's kernels. `right`: all were compiled, with no problems except known ones."""
    rows = compiler.rows(case)
    faults, notes = ([word for row in rows for word in row[kind]] for kind in ("faults", "notes"))
    return {"right": bool(rows) and not faults, "summary": "; ".join(faults + notes),
            "kernels": [{"kernel": row["kernel"]} | {key: row[key] for key in ("registers", "spill_bytes")
                                                     if key in row} for row in rows]}
