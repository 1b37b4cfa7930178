"""Checkpoint folders for the tests of interop: the golden ones, and changed copies of them."""

import json
import pathlib

import numpy as np

from deepseek_jax.interop import safetensors_io

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "golden"
CASES = sorted(p.name.removeprefix("hf_") for p in GOLDEN.glob("hf_*"))


def golden(case) -> str:
    return str(GOLDEN / f"hf_{case}")


def tensors(folder) -> dict[str, np.ndarray]:
    reader = safetensors_io.Reader(str(folder))
    try:
        return {name: reader.rows(tensor) for name, tensor in reader.tensors.items()}
    finally:
        reader.close()


def config(folder) -> dict:
    return json.loads(pathlib.Path(folder, "config.json").read_text())


def write(folder, arrays, raw, files=1) -> str:
    """Writes arrays as a checkpoint of the given number of files, distributed in turn."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    items = [safetensors_io.Item(name, np.dtype(a.dtype), a.shape) for name, a in arrays.items()]
    named = {f"model-{n:05d}-of-{files:05d}.safetensors": items[n - 1::files] for n in range(1, files + 1)}
    safetensors_io.write(str(folder), named if files > 1 else {safetensors_io.SINGLE: items},
                         lambda item: [arrays[item.name]])
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    return str(folder)


def changed(folder, case, change=lambda arrays: None, files=1, **fields) -> str:
    """A copy of a golden checkpoint with other config fields, and `change` made to its arrays."""
    arrays, raw = tensors(golden(case)), config(golden(case)) | fields
    change(arrays)
    return write(folder, arrays, raw, files)


def as_stored(arrays, dtype):
    """The arrays as a checkpoint in `dtype` stores them: everything in `dtype` except the routing bias."""
    return {n: a if n.endswith("e_score_correction_bias") else a.astype(dtype) for n, a in arrays.items()}
