"""Compiles every Hopper kernel for sm_90a, without a GPU, and reports registers, spills and instructions.

    python -m kernels_pallas.tools.compile_report --json FILE [--shapes v3-train v3-decode]

Requires jax's CUDA plugin and ptxas (`pip install 'deepseek-jax[aot]'`), but no driver. A kernel fails if it spills,
if ptxas serializes its WGMMAs, if an FP8 product has no `wgmma ... e4m3.e4m3`, if one in pairs has no load for both SMs
(multicast::cluster) or tells its own SM alone what it has read (no mbarrier.arrive on shared::cluster), if a
quantizer's maxima would skip a NaN (max.f32 instead of max.NaN.f32), if one with scales of powers of two divides (the
chip's division is within 2 ulp), or if it does not compile, which takes no other row with it: exit code 1. What is
known and allowed is a note of its row: `mla_decode` spills with a jax older than 0.12. The file also names the versions
of jax and ptxas. If nvdisasm is installed next to ptxas, as by the extra, the tensor core's instructions are counted in
the machine code too: QGMMA multiplies FP8, HGMMA bfloat16.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from typing import Any

FIELDS = ("registers", "spill_bytes", "shared_bytes", "stages", "wgmma_e4m3", "qgmma", "hgmma", "serialized",
          "nan_skipped", "divisions")
SPILLS_BEFORE = {"mla_decode": (0, 12)}  # operation -> the jax since which Mosaic's code of it does not spill
INSTRUCTION = r"/\*[0-9a-f]{4,}\*/ +\S"  # a line of machine code: address and instruction
# XLA's description of the chip. An H800 is the same chip with a slower NVLink.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class NoCompiler(RuntimeError):
    """There is no compiler for GPUs; the message says what to install."""


def described(topology: str = "1x1x1") -> list[Any]:
    """Descriptions of H100s; `topology` is "1 x hosts x GPUs per host".

    Must be called before jax first compiles anything, because jax reads the environment then.

    Raises:
      NoCompiler: jax has no CUDA plugin.
    """
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver here, and the compiler needs none
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology=topology).devices
    except NotImplementedError as error:  # no plugin provides "cuda"
        raise NoCompiler("compiling for GPUs needs jax's CUDA plugin and ptxas; pip install 'deepseek-jax[aot]' brings "
                         "both.") from error


def read(ptx: str, ptxas: str, resources: str, sass: str | None = None) -> dict:
    """A kernel's resources, from its PTX, the output of ptxas, Mosaic's list of resources and, if known, its SASS."""
    around, inside = loops(sass) if sass else (None, None)
    count = lambda name: None if sass is None else len(re.findall(rf"\b{name}\.", sass))
    numbers = lambda pattern, text: [int(n) for n in re.findall(pattern, text)]
    return {"registers": sum(numbers(r"Used (\d+) registers", ptxas)),
            # Only from the line of facts: a warning repeats the numbers.
            "spill_bytes": sum(int(n) for pair in re.findall(r"frame, (\d+) bytes spill stores, (\d+) bytes", ptxas)
                               for n in pair),
            "shared_bytes": max(numbers(r"smem_scratch_bytes=(\d+)", resources), default=0),
            "stages": max(numbers(r"num_barriers=(\d+)", resources), default=0),
            "wgmma_e4m3": len(re.findall(r"wgmma\.mma_async\S*\.e4m3\.e4m3", ptx)),
            "qgmma": count("QGMMA"), "hgmma": count("HGMMA"), "serialized": "serializ" in ptxas,
            "nan_skipped": len(re.findall(r"\bmax\.f32", ptx)), "divisions": len(re.findall(r"\bdiv\.\w+\.f32", ptx)),
            "multicasts": len(re.findall(r"cp\.async\.bulk\.tensor\S*multicast::cluster", ptx)),
            "remote_arrives": len(re.findall(r"mbarrier\.arrive\S*shared::cluster", ptx)),
            "instructions": sass and len(re.findall(INSTRUCTION, sass)), "loop_instructions": around,
            "inner_instructions": inside}


def loops(sass: str) -> tuple[int, int]:
    """Instructions of a round of the innermost loop with the tensor core's, and of the longest loop in it; 0: none.

    A round is the shortest way around: what a condition skips is not counted, a loop inside counts one round. A jump
    back is a loop only if there is no other way to where it starts: waiting for a barrier, which ptxas moves behind
    the last instruction, comes back to the middle of what waits.
    """
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif re.search(INSTRUCTION, line):
            code.append(line)
    following, before = ([[] for _ in (*code, None)] for _ in range(2))  # a label may be the end
    for n, line in enumerate(code):
        to = re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)
        goes_on = "@" in line or not re.search(r"\bBRA `|\bEXIT\b", line)
        for m in ([labels[to[1]]] if to else []) + [n + 1] * goes_on:
            following[n].append(m)
            before[m].append(n)
    found = []  # (what belongs to it, instructions of a round)
    for end, first in ((n, m) for n in range(len(code)) for m in following[n] if m <= n):
        body = {first, *_ways(before, end, without=first)}
        if 0 not in body:  # the kernel's start does not lead into its middle
            found.append((body, _ways(following, first)[end]))
    products = [one for one in found if any("GMMA." in code[n] for n in one[0])]
    if not products:
        return 0, 0
    body, around = min(products, key=lambda one: len(one[0]))
    return around, max((inside for part, inside in found if part < body), default=0)


def _ways(following: list[list[int]], start: int, without: int | None = None) -> dict[int, int]:
    """Instructions of the shortest way from `start` to each that it leads to, both included, past `without`."""
    ways = {} if start == without else {start: 1}
    queue = list(ways)
    for n in queue:  # which grows
        for m in following[n]:
            if m not in ways and m != without:
                ways[m] = ways[n] + 1
                queue.append(m)
    return ways


def dumped(files: Collection[pathlib.Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name, row) of every kernel among the files that Mosaic dumped.

    Mosaic numbers lists of resources in the order of tracing and the other files in the order of compilation. So files
    are matched by name without the number, and if there are several lists the largest numbers count.
    """
    name = lambda file: re.sub(r"_\d+$", "", file.name.partition(".")[0])
    for ptx in sorted(file for file in files if file.suffix == ".ptx"):
        resources = [f.read_text() for f in files if f.name.endswith(".resources.txt") and name(f) == name(ptx)]
        sass = [f.read_text() for f in files if f.name.startswith(f"{ptx.stem}.sass")]
        yield name(ptx), read(ptx.read_text(), ptx.with_suffix(".ptxas").read_text(), "".join(resources), *sass[:1])


def notes(operation: str, row: dict, jax_version: tuple[int, ...]) -> list[str]:
    """Known and allowed problems of a kernel with this version of jax."""
    if row["spill_bytes"] and jax_version < SPILLS_BEFORE.get(operation, ()):
        return [f"spills {row['spill_bytes']} bytes, as it does before jax 0.12"]
    return []


def faults(operation: str, row: dict, scale: str = "float32", pair: bool = False) -> list[str]:
    """A kernel's faults; scale: of a quantizer; pair: whether the SMs of an FP8 product share rows."""
    found = [f"spills {row['spill_bytes']} bytes"] if row["spill_bytes"] else []
    found += ["its WGMMAs are serialized"] if row["serialized"] else []
    if operation.startswith("fp8") and not row["wgmma_e4m3"]:
        found.append("has no wgmma e4m3.e4m3")
    if pair and not row["multicasts"]:
        found.append("is of two SMs and loads nothing for both (multicast::cluster)")
    if pair and not row["remote_arrives"]:
        found.append("is of two SMs and does not tell the other what it has read (mbarrier.arrive, shared::cluster)")
    if "matmul" in operation and row["qgmma" if operation.startswith("fp8") else "hgmma"] == 0:
        found.append(f"has no {'QGMMA' if operation.startswith('fp8') else 'HGMMA'} in its machine code")
    if "quantize" in operation and row["nan_skipped"]:
        found.append("takes maxima that skip NaN")
    if operation == "quantize" and scale == "power_of_two" and row["divisions"]:
        found.append("divides where scales are powers of two")
    return found


def _disassembler() -> bool:
    """Whether nvdisasm is where Mosaic looks for it: among the wheels of CUDA's tools."""
    spec = importlib.util.find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec else ()
    return any(tool.is_file() for root in roots for tool in pathlib.Path(root).glob("*/bin/nvdisasm"))


def cases(names: Iterable[str]) -> list[Any]:
    """The cases of these shapes that have a kernel here."""
    from kernels_pallas.api import OPERATIONS
    from kernels_pallas.tools.shapes import SHAPES

    return [case for name in names for case in SHAPES[name] if "hopper" in OPERATIONS[case.operation][1]]


class Compiler:
    """ptxas for a described H100, called through jax. Made before jax first compiles, since it sets the environment.

    Raises:
      NoCompiler: jax has no CUDA plugin.
    """

    def __init__(self) -> None:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        devices = described()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="kernels_"))
        os.environ |= {"MOSAIC_GPU_DUMP_TO": str(self.folder), "MOSAIC_GPU_DUMP_PTX": "1",
                       "MOSAIC_GPU_DUMP_PTXAS": "1"}
        if _disassembler():
            os.environ["MOSAIC_GPU_DUMP_SASS"] = "1"
        import jax
        import numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        jax.config.update("jax_enable_compilation_cache", False)  # a cached kernel would not be dumped
        self.here = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())

    def rows(self, case: Any) -> list[dict[str, Any]]:
        """A row for every kernel of a case, with its faults and notes; one with a fault where it does not compile."""
        import jax

        named = {"operation": case.operation, "shape": str(case)}
        try:
            found = list(dumped(self._compile(case)))
        except Exception as error:  # from tracing, lowering or ptxas: this version cannot compile it
            why = (str(error).strip() or "no message").splitlines()[0][:200]
            return [named | {"kernel": None, "faults": [f"{type(error).__name__}: {why}"], "notes": []}]
        scale, paired = getattr(case, "scale", "float32"), case.operation.startswith("fp8") and case.tuning().pair
        rows = []
        for name, row in found:
            known = notes(case.operation, row, jax.__version_info__)
            judged = row | {"spill_bytes": 0} if known else row
            wrong = faults(case.operation, judged, scale, paired and name == "fp8_products")
            rows.append(named | {"kernel": name} | row | {"faults": wrong, "notes": known})
        return rows

    def _compile(self, case):
        """Compiles a case and returns the dumped files."""
        import jax

        before = set(self.folder.iterdir())
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self.here)
        arguments = jax.tree.map(place, case.arguments())
        jax.jit(case.call("hopper"), out_shardings=self.here).lower(*arguments).compile()
        return set(self.folder.iterdir()) - before


def compile_kernels(names: Iterable[str]) -> list[dict]:
    """A row for every kernel of every case of these shapes, printed as they are made."""
    compiler, rows = Compiler(), []
    for case in cases(names):
        for row in compiler.rows(case):
            rows.append(row)
            if row["kernel"] is None:
                print(f"{row['operation']:20} {row['shape']:34} {row['faults'][0]}", flush=True)
                continue
            print(f"{row['operation']:20} {row['shape']:34} {row['kernel']:18}",
                  *(f"{row[name]!s:>7}" for name in FIELDS), "; ".join(row["faults"] + row["notes"]), flush=True)
    return rows


def versions() -> dict[str, str | None]:
    """The versions of jax and of the wheel with ptxas; None: another ptxas is used, whose version is unknown."""
    import jax

    try:
        return {"jax": jax.__version__, "ptxas": importlib.metadata.version("nvidia-cuda-nvcc")}
    except importlib.metadata.PackageNotFoundError:
        return {"jax": jax.__version__, "ptxas": None}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.tools.compile_report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there, with the versions of jax and ptxas")
    parser.add_argument("--shapes", nargs="+", default=["v3-train"], choices=["tiny", "v3-train", "v3-decode"])
    args = parser.parse_args()
    print(f"{'operation':20} {'shape':34} {'kernel':18}", *(f"{name[:7]:>7}" for name in FIELDS))
    try:
        rows = compile_kernels(args.shapes)
    except NoCompiler as error:
        print(error, file=sys.stderr)
        return 2
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(versions() | {"rows": rows}, indent=1) + "\n")
    bad = [row for row in rows if row["faults"]]
    print(f"{len(rows)} kernels compiled for sm_90a, {len(bad)} with faults")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
