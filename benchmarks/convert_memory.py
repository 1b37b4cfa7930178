"""Peak memory and time of conversion, compared with copying the files and with writing as many bytes.

    python -m benchmarks.convert_memory --dir /some/disk --json benchmarks/results/convert.json

Makes an FP8 checkpoint with the matrices of DeepSeek-V3 (two layers, 64 experts) of more than 4 GB in ten files,
converts it in child processes, reads their peak resident memory from the kernel, and deletes the files afterwards.
Every side flushes its files to the disk, and the sides take turns.
"""

import argparse
import datetime
import filecmp
import math
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.machine import ROOT, hardware, write_results
from deepseek_jax import io
from deepseek_jax.checkpoint.arrays import FP8
from deepseek_jax.config import model_config
from deepseek_jax.interop import hf_config, safetensors_io, save, tensor_map
from kernels_pallas.constants import BLOCK

SHARD = 450 * 10**6


def make(folder: pathlib.Path, experts: int) -> tuple[int, int]:
    """Writes the checkpoint in pieces of a random buffer. Returns (bytes, files)."""
    cfg = model_config("v3_671b", num_layers=2, num_dense_layers=1, mtp_depth=0, num_experts=experts,
                       vocab_size=16384)
    rng = np.random.default_rng(0)
    random = rng.integers(0, 0x7f, 2**24, np.uint8)  # positive FP8 numbers, none of them NaN; small bfloat16 ones
    items = []
    for entry in tensor_map.entries(cfg).values():
        bias = entry.name.endswith("bias")
        dtype = FP8 if entry.fp8 else safetensors_io.DTYPES["F32" if bias else "BF16"]
        items.append(safetensors_io.Item(entry.name, dtype, entry.shape))
        if entry.fp8:
            blocks = tuple(-(-n // BLOCK) for n in entry.shape)
            items.append(safetensors_io.Item(entry.name + save.SCALE, safetensors_io.DTYPES["F32"], blocks))

    def pieces(item):
        if item.dtype == safetensors_io.DTYPES["F32"]:
            return [rng.uniform(1e-4, 1e-3, item.shape).astype(np.float32)]
        whole, rest = divmod(item.nbytes, random.nbytes)
        return [random] * whole + [random[:rest]]

    files = safetensors_io.pack(items, SHARD)
    folder.mkdir(parents=True)
    safetensors_io.write(str(folder), files, pieces)
    io.write_json(folder / "config.json", hf_config.write(cfg, "bfloat16", fp8=True))
    return sum(item.nbytes for item in items), len(files)


def size(folder: pathlib.Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def convert(*words: str | pathlib.Path) -> dict[str, float]:
    """Runs deepseek_jax.convert. -> {"seconds", "peak_gb"}."""
    command = [sys.executable, "-m", "deepseek_jax.convert", *map(str, words)]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_gb": usage.ru_maxrss * 1024 / 1e9}


def copy(source: pathlib.Path, target: pathlib.Path) -> dict[str, float]:
    start = time.perf_counter()
    target.mkdir()
    for path in sorted(source.iterdir()):
        shutil.copyfile(path, target / path.name)
        flush(target / path.name)
    return {"seconds": time.perf_counter() - start}


def write_bytes(target: pathlib.Path, count: int) -> dict[str, float]:
    """Writes `count` bytes of a buffer into files as large as a shard."""
    start, buffer = time.perf_counter(), np.arange(2**24, dtype=np.uint8).data
    target.mkdir()
    for n in range(math.ceil(count / SHARD)):
        left = min(SHARD, count - n * SHARD)
        with open(target / str(n), "wb") as f:
            while left:
                left -= f.write(buffer[:left])
        flush(target / str(n))
    return {"seconds": time.perf_counter() - start}


def flush(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def measure(root: pathlib.Path, rounds: int, experts: int) -> dict[str, Any]:
    source, out = root / "src", root / "out"
    total, files = make(source, experts)
    rows = {name: [] for name in ("copy", "keep_fp8", "write", "dequantize", "to_hf")}

    def side(name, work):
        rows[name].append(work() | {"gb": size(out) / 1e9, "load": os.getloadavg()[0]})
        print(f"{name:12s} {rows[name][-1]['seconds']:7.1f} s  {rows[name][-1].get('peak_gb', 0):.2f} GB resident",
              flush=True)

    for _ in range(rounds):
        side("copy", lambda: copy(source, out))
        shutil.rmtree(out)
        side("keep_fp8", lambda: convert("from-hf", source, out, "--keep-fp8"))
        os.rename(out, root / "run")
        side("to_hf", lambda: convert("to-hf", root / "run", out))
        exact = all(filecmp.cmp(out / p.name, p, shallow=False) for p in source.glob("*.safetensors"))
        shutil.rmtree(root / "run")
        shutil.rmtree(out)
        side("dequantize", lambda: convert("from-hf", source, out))
        held = size(out)
        shutil.rmtree(out)
        side("write", lambda held=held: write_bytes(out, held))
        shutil.rmtree(out)
    median = {name: statistics.median(r["seconds"] for r in done) for name, done in rows.items()}
    return {"checkpoint_gb": total / 1e9, "files": files, "rounds": rounds, "round_trip_exact": exact,
            "peak_gb": {n: max(r["peak_gb"] for r in done) for n, done in rows.items() if "peak_gb" in done[0]},
            "seconds": median, "keep_fp8_over_copy": median["keep_fp8"] / median["copy"],
            "dequantize_over_write": median["dequantize"] / median["write"], "runs": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", help="where to make the checkpoint (needs 17 GB; default: the temporary directory)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--experts", type=int, default=64, help="44 MB each")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="convert-", dir=args.dir) as folder:
        result = measure(pathlib.Path(folder), args.rounds, args.experts)
    import jax

    result |= {"command": f"python -m benchmarks.convert_memory --rounds {args.rounds}",
               "date": datetime.date.today().isoformat(), "hardware": hardware(),
               "versions": {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}}
    print(f"| {result['checkpoint_gb']:.2f} GB in {result['files']} files | peak resident | time |\n|---|---|---|")
    print(f"| kept in FP8 | {result['peak_gb']['keep_fp8']:.2f} GB | {result['keep_fp8_over_copy']:.2f} x copying |")
    print(f"| dequantized to bfloat16 | {result['peak_gb']['dequantize']:.2f} GB | "
          f"{result['dequantize_over_write']:.2f} x writing as many bytes |")
    exact = "byte for byte" if result["round_trip_exact"] else "NOT the same bytes"
    print(f"| back to Hugging Face | {result['peak_gb']['to_hf']:.2f} GB | {exact} |")
    if args.json:
        write_results(args.json, result)


if __name__ == "__main__":
    main()
