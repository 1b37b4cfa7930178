"""The public operations. `implementation` is a word: "reference" (plain jnp, anywhere), "hopper", "tpu", or "auto".

"auto" takes what the device can run that the program is made for: hopper on an H100, H200 or H800, tpu where the
operation has such a kernel, reference elsewhere; it says once, in the log, what it took. A kernel that is asked for by
name and cannot run there raises ValueError.
"""

import functools
import importlib
import logging

import jax
import jax.numpy as jnp

from kernels_pallas.formats import E4M3, Accumulator, Quantized
from kernels_pallas.reference.mla_decode import pack_fp8, packed_width, unpack_fp8
from kernels_pallas.reference.quantize import dequantize, quantize_blocks, spread, tile_scales

__all__ = ["E4M3", "OPERATIONS", "Accumulator", "Quantized", "chosen_here", "dequantize", "device_here",
           "fp8_grouped_matmul", "fp8_matmul", "mla_attention", "mla_attention_backward", "mla_attention_forward",
           "mla_decode", "pack_fp8", "packed_width", "quantize", "quantize_blocks", "runs_here", "spread",
           "swiglu_quantize", "tile_scales", "unpack_fp8"]

log = logging.getLogger(__name__)

# operation -> (the module that holds it in each folder, the folders that have it)
OPERATIONS = {
    "quantize": ("quantize", ("reference", "hopper")),
    "swiglu_quantize": ("quantize", ("reference", "hopper")),
    "fp8_matmul": ("fp8_matmul", ("reference", "hopper", "tpu")),
    "fp8_grouped_matmul": ("fp8_grouped_matmul", ("reference", "hopper", "tpu")),
    "mla_attention": ("mla_attention", ("reference", "hopper")),
    "mla_decode": ("mla_decode", ("reference", "hopper")),
}
NEEDS = {"hopper": "a Hopper GPU (H100, H200, H800)", "tpu": "a TPU"}


HOPPER = ("H100", "H200", "H800", "GH200")


def device_here():
    """What a program is made for: a device of the mesh in use, which may be absent; without a mesh the first one here.

    It has `platform` and `device_kind`.
    """
    absent = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.devices()[0] if absent is None else absent


def runs_here() -> str:
    """The folder whose kernels `device_here` can run: "hopper", "tpu" or "reference"."""
    device = device_here()
    if device.platform == "tpu":
        return "tpu"
    if device.platform == "gpu" and any(name in device.device_kind for name in HOPPER):
        return "hopper"
    return "reference"


def chosen_here(operation) -> str:
    """What "auto" takes of an operation here: for a caller that has something better than the reference."""
    here = runs_here()
    return here if here in OPERATIONS[operation][1] else "reference"


@functools.cache
def _log_once(operation, implementation):
    log.info("%s: implementation %s", operation, implementation)


def _find(operation, implementation, part=None):
    """The function of that name, or the `part` of the operation that its module has."""
    module, folders = OPERATIONS[operation]
    here = runs_here()
    if implementation == "auto":
        implementation = chosen_here(operation)
        _log_once(operation, implementation)
    if implementation not in folders:
        raise ValueError(f"{operation} has no implementation {implementation!r}; take one of 'auto', "
                         f"{', '.join(map(repr, folders))}.")
    if implementation not in ("reference", here):
        raise ValueError(f"{operation}: implementation={implementation!r} needs {NEEDS[implementation]}, and this "
                         f"machine has {device_here().device_kind!r}; implementation='reference' computes the same "
                         "in plain jnp.")
    return getattr(importlib.import_module(f"kernels_pallas.{implementation}.{module}"), part or operation)


def _studied(implementation, **models):
    """Options that only the twins have, to study what the recipe is for. Raises ValueError for a kernel."""
    asked = {name: value for name, value in models.items() if value is not None}
    if asked and (runs_here() if implementation == "auto" else implementation) != "reference":
        raise ValueError(f"{', '.join(asked)} is a study, not what the kernels do; say implementation='reference'.")
    return asked


def quantize(x, *, scale="float32", dtype=E4M3, transposed=False, share="tile", implementation="auto"):
    """E4M3 in 1 x 128 tiles, optionally with the transposed copy: see reference/quantize.py."""
    return _find("quantize", implementation)(x, scale=scale, dtype=dtype, transposed=transposed,
                                             **_studied(implementation, share=None if share == "tile" else share))


def swiglu_quantize(gate, up, *, scale="float32", dtype=E4M3, implementation="auto") -> Quantized:
    """quantize(silu(gate) * up) without a round trip through memory: see reference/quantize.py."""
    return _find("swiglu_quantize", implementation)(gate, up, scale=scale, dtype=dtype)


def fp8_matmul(a, b, *, out_dtype=jnp.bfloat16, accumulator=None, implementation="auto"):
    """a [M, K] @ b [N, K].T, scales along K, accumulated in float32: see reference/fp8_matmul.py."""
    return _find("fp8_matmul", implementation)(a, b, out_dtype=out_dtype,
                                               **_studied(implementation, accumulator=accumulator))


def fp8_grouped_matmul(a, b, sizes_E, *, out_dtype=jnp.bfloat16, accumulator=None, implementation="auto"):
    """The experts' products, contiguous or K-grouped: see reference/fp8_grouped_matmul.py."""
    return _find("fp8_grouped_matmul", implementation)(a, b, sizes_E, out_dtype=out_dtype,
                                                       **_studied(implementation, accumulator=accumulator))


def mla_attention(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT=None, *, scale, implementation="auto"):
    """Causal attention with wide queries and narrow values, differentiable: see reference/mla_attention.py."""
    return _find("mla_attention", implementation)(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale=scale)


def mla_attention_forward(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT=None, *, scale, implementation="auto"):
    """The same with what its gradient needs, for a caller who decides how that is kept: (o_BTHV, lse_BHT)."""
    return _find("mla_attention", implementation, "forward")(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale=scale)


def mla_attention_backward(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, o_BTHV, lse_BHT, do_BTHV, *, scale,
                           implementation="auto"):
    """(dq_BTHA, dk_BTHA, dv_BTHV) from what `mla_attention_forward` gave: see reference/mla_attention.py."""
    return _find("mla_attention", implementation, "backward")(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, o_BTHV, lse_BHT,
                                                              do_BTHV, scale=scale)


def mla_decode(q_BHX, cache, page_table_BP, lengths_B, *, scale, implementation="auto"):
    """One absorbed query per sequence over a paged latent cache: see reference/mla_decode.py."""
    return _find("mla_decode", implementation)(q_BHX, cache, page_table_BP, lengths_B, scale=scale)
