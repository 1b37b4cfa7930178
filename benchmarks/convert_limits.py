"""Peak resident memory of a conversion at the sizes of published checkpoints, against a limit.

    python -m benchmarks.convert_limits moonlight kimi_int4 --json benchmarks/results/convert_limits.json

`moonlight`: all tensors of Moonlight-16B-A3B in BF16. `kimi_int4`: the matrices of Kimi-K2-Thinking, routed experts in
four bits, with fewer layers, experts and words. Names, shapes and dtypes are those of the published files; the weights
are zeros, stored as holes in sparse files, so the disk needs room only for the result. The reader copies any bytes, so
memory does not depend on them.
"""

import argparse
import datetime
import os
import pathlib
import sys
import tempfile
from typing import NamedTuple

import numpy as np

from benchmarks.convert_memory import convert, size
from benchmarks.machine import hardware, write_results
from deepseek_jax import io
from deepseek_jax.config import ModelConfig, model_config
from deepseek_jax.interop import hf_config, int4, safetensors_io, tensor_map
from deepseek_jax.interop.safetensors_io import DTYPES, Item


class Case(NamedTuple):
    """limit: gigabytes of resident memory. shard: bytes of a file at most."""

    cfg: ModelConfig
    int4: bool
    limit: float
    shard: float


CASES = {
    "moonlight": Case(model_config("moonlight_16b"), False, 2.0, 1.25e9),
    "kimi_int4": Case(model_config("kimi_k2_1t", num_layers=2, num_experts=96, vocab_size=16384), True, 1.5, 0.45e9),
}
QUANTIZATION = {"quant_method": "compressed-tensors", "format": "pack-quantized",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": hf_config.INT4}}}


def items_of(case: Case) -> tuple[list[Item], dict[str, np.ndarray]]:
    """The tensors of a checkpoint, and the subset that is not all zeros."""
    items, given = [], {}
    for entry in tensor_map.entries(case.cfg).values():
        if not (case.int4 and ".mlp.experts." in entry.name):
            items.append(Item(entry.name, DTYPES["BF16"], entry.shape))
            continue
        rows, columns = entry.shape
        items += [Item(f"{entry.name}_packed", DTYPES["I32"], (rows, columns // 8)),
                  Item(f"{entry.name}_scale", DTYPES["BF16"], (rows, columns // int4.GROUP)),
                  Item(f"{entry.name}_shape", DTYPES["I32"], (2,))]
        given[f"{entry.name}_shape"] = np.array(entry.shape, np.int32)
    return items, given


def make(folder: pathlib.Path, case: Case) -> tuple[int, int]:
    """Writes the checkpoint. Returns (bytes, files)."""
    items, given = items_of(case)
    files = safetensors_io.pack(items, int(case.shard))
    folder.mkdir(parents=True)
    for name, held in files.items():
        text = safetensors_io.header(held, {"format": "pt"})
        with open(folder / name, "wb") as f:
            f.write(text)
            f.truncate(len(text) + sum(item.nbytes for item in held))
            for item in held:
                if item.name in given:
                    f.write(given[item.name].tobytes())
                else:
                    f.seek(item.nbytes, os.SEEK_CUR)
    safetensors_io.write_index(str(folder), files)
    raw = hf_config.write(case.cfg, "bfloat16")
    io.write_json(folder / "config.json", raw | ({"quantization_config": QUANTIZATION} if case.int4 else {}))
    return sum(item.nbytes for item in items), len(files)


def measure(name: str, where: str | None) -> dict[str, float]:
    """Converts one case in a separate process, and deletes the files afterwards."""
    with tempfile.TemporaryDirectory(prefix="convert-", dir=where) as folder:
        total, files = make(pathlib.Path(folder, "src"), CASES[name])
        found = convert("from-hf", f"{folder}/src", f"{folder}/run")
        return {"checkpoint_gb": total / 1e9, "files": files, "written_gb": size(pathlib.Path(folder, "run")) / 1e9,
                "limit_gb": CASES[name].limit, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    parser.add_argument("--dir", help="where to convert (needs 33 GB for moonlight; default: the temporary directory)")
    parser.add_argument("--json", metavar="FILE", help="write the result there")
    args = parser.parse_args()
    found = {name: measure(name, args.dir) for name in args.cases}
    for name, row in found.items():
        print(f"{name}: {row['checkpoint_gb']:.2f} GB in {row['files']:.0f} files, {row['written_gb']:.2f} GB written "
              f"in {row['seconds']:.0f} s, {row['peak_gb']:.2f} GB resident (limit {row['limit_gb']})", flush=True)
    if args.json:
        write_results(args.json, {"command": f"python -m benchmarks.convert_limits {' '.join(args.cases)}",
                                  "date": datetime.date.today().isoformat(), "hardware": hardware(), "cases": found})
    sys.exit(any(row["peak_gb"] > row["limit_gb"] for row in found.values()))


if __name__ == "__main__":
    main()
