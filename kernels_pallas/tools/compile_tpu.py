"""Compiles every TPU kernel with the real compiler, for chips that this machine does not have.

    python -m kernels_pallas.tools.compile_tpu --json FILE [--chips v5p v6e tpu7x] [--shapes v3-train]

Requires the libtpu of this version of jax (`pip install 'jax[tpu]'`), but no TPU.
Exit code 1 if a kernel does not compile.
"""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

CHIPS = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "TPU7x:2x2x1"}  # the smallest slices


def compiled(case: Any, device: Any) -> Any:
    """{"compiles", "temporary_bytes" or "error"} of one case on one device."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    here = NamedSharding(Mesh(np.array([device]), ("x",)), PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), case.arguments())
    try:
        made = jax.jit(case.call("tpu"), out_shardings=here).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        return {"compiles": False, "error": str(error)[:300]}
    memory = made.memory_analysis()
    return {"compiles": True, "temporary_bytes": memory.temp_size_in_bytes if memory else 0}


def compile_kernels(chips: Iterable[str], names: Iterable[str]) -> list[dict]:
    """A row for every chip and every case of these shapes that has a TPU kernel."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no real machine
    try:
        import libtpu  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        print("compiling for TPU needs libtpu; pip install 'jax[tpu]' brings the one that fits.", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("TPU_LIBRARY_PATH", libtpu.get_library_path())
    from jax.experimental import topologies

    from kernels_pallas.api import OPERATIONS
    from kernels_pallas.tools.shapes import SHAPES

    cases = [case for name in names for case in SHAPES[name] if "tpu" in OPERATIONS[case.operation][1]]
    rows = []
    for chip in chips:
        device = topologies.get_topology_desc(CHIPS[chip], platform="tpu").devices[0]
        for case in cases:
            rows.append({"chip": device.device_kind, "operation": case.operation, "shape": str(case),
                         **compiled(case, device)})
            row = rows[-1]
            print(f"{row['chip']:12} {row['operation']:20} {row['shape']:34}",
                  f"temporary {row['temporary_bytes']:>12,} bytes" if row["compiles"] else row["error"], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.compile_tpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--shapes", nargs="+", default=["v3-train"], choices=["tiny", "v3-train", "v3-decode"])
    args = parser.parse_args()
    rows = compile_kernels(args.chips, args.shapes)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if not row["compiles"]]
    print(f"{len(rows)} kernels compiled for {', '.join(args.chips)}, {len(bad)} failed")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
