"""The public operations. `implementation` is "reference" (plain jnp, anywhere), "hopper", "tpu" or "auto".

"auto" chooses by the device that the program is traced for: hopper on an H100, H200 or H800, tpu if the operation has
such a kernel, reference elsewhere; it logs its choice once. An implementation that is requested by name and cannot run
on that device raises ValueError.
"""

import functools
import importlib
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas.formats import E4M3, Accumulator, Quantized
from kernels_pallas.reference.mla_decode import pack_fp8, packed_width, unpack_fp8
from kernels_pallas.reference.quantize import dequantize, quantize_blocks, spread, tile_scales

__all__ = ["E4M3", "OPERATIONS", "Accumulator", "Quantized", "check_here", "chosen_here", "dequantize", "device_here",
           "fp8_grouped_matmul", "fp8_matmul", "grouped_matmul", "grouped_matmul_weights", "mla_attention",
           "mla_attention_backward", "mla_attention_forward", "mla_decode", "pack_fp8", "packed_width", "quantize",
           "quantize_blocks", "runs_here", "spread", "swiglu_quantize", "tile_scales", "unpack_fp8"]

log = logging.getLogger(__name__)

# operation -> (its module in each folder, the folders that have it)
OPERATIONS = {
    "quantize": ("quantize", ("reference", "hopper")),
    "swiglu_quantize": ("quantize", ("reference", "hopper")),
    "fp8_matmul": ("fp8_matmul", ("reference", "hopper", "tpu")),
    "fp8_grouped_matmul": ("fp8_grouped_matmul", ("reference", "hopper", "tpu")),
    "grouped_matmul": ("grouped_matmul", ("reference", "hopper", "tpu")),
    "mla_attention": ("mla_attention", ("reference", "hopper", "tpu")),
    "mla_decode": ("mla_decode", ("reference", "hopper")),
}
NEEDS = {"hopper": "a Hopper GPU (H100, H200, H800)", "tpu": "a TPU"}
NEEDS_JAX = (0, 11, 2)  # only for the kernels; everything else runs on older versions
HOPPER = ("H100", "H200", "H800", "GH200")


def device_here() -> Any:
    """The device that a program is traced for: one of the mesh in use, which may be abstract, or the first local one.

    It has `platform` and `device_kind`.
    """
    absent = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    # jax 0.7 describes a device without its platform, and supports no kernels.
    return absent if hasattr(absent, "platform") else jax.devices()[0]


def runs_here() -> str:
    """The folder whose kernels `device_here` can run: "hopper", "tpu" or "reference"."""
    if jax.__version_info__ < NEEDS_JAX:
        return "reference"
    device = device_here()
    if device.platform == "tpu":
        return "tpu"
    if device.platform == "gpu" and any(name in device.device_kind for name in HOPPER):
        return "hopper"
    return "reference"


def chosen_here(operation: str) -> str:
    """The choice of "auto" for an operation here, for a caller that has an alternative to the reference."""
    here = runs_here()
    return here if here in OPERATIONS[operation][1] else "reference"


@functools.cache
def _log_once(operation, implementation):
    log.info("%s: implementation %s", operation, implementation)


def check_here(operation: str, implementation: str, key: str | None = None) -> None:
    """Raises ValueError, which says what is needed, for an implementation that cannot run here.

    key: the config key that selected it, which the message names instead of the operation.
    """
    folders, here = OPERATIONS[operation][1], runs_here()
    asked = f"{key or f'{operation}: implementation'}={implementation!r}"
    instead = f"{key or 'implementation'}='reference' computes the same in plain jnp."
    if implementation == "auto":
        return
    if implementation not in folders:
        raise ValueError(f"{operation} has no implementation {implementation!r}; take one of 'auto', "
                         f"{', '.join(map(repr, folders))}.")
    if implementation != "reference" and jax.__version_info__ < NEEDS_JAX:
        raise ValueError(f"{asked} needs jax {'.'.join(map(str, NEEDS_JAX))} or newer, and this is {jax.__version__}; "
                         f"{instead}")
    if implementation not in ("reference", here):
        raise ValueError(f"{asked} needs {NEEDS[implementation]}, and this machine has "
                         f"{device_here().device_kind!r}; {instead}")


def _find(operation, implementation, part=None):
    """The function of that name, or another function, `part`, of its module."""
    check_here(operation, implementation)
    if implementation == "auto":
        implementation = chosen_here(operation)
        _log_once(operation, implementation)
    module = OPERATIONS[operation][0]
    found = importlib.import_module(f"kernels_pallas.{implementation}.{module}")
    if not hasattr(found, part or operation):
        raise ValueError(f"{operation}: implementation={implementation!r} has no {part} of its own; "
                         "it is differentiable as a whole.")
    return getattr(found, part or operation)


def _studied(implementation, **models):
    """Checks options that only the twins have, for studies of the recipe.

    Raises:
      ValueError: a kernel was chosen.
    """
    asked = {name: value for name, value in models.items() if value is not None}
    if asked and (runs_here() if implementation == "auto" else implementation) != "reference":
        raise ValueError(f"{', '.join(asked)} is a study, not what the kernels do; say implementation='reference'.")
    return asked


def quantize(x: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3, transposed: bool | str = False,
             share: str = "tile", implementation: str = "auto") -> Any:
    """[..., M, K] in 1 x 128 tiles, E4M3 and float32 scales; with `transposed` a pair with the transposed copy.

    As [the twin][kernels_pallas.reference.quantize.quantize]; a kernel takes bfloat16 [M, K].

    Raises:
      ValueError: `implementation` cannot run here, or `share`, which only the twin has, with a kernel.
    """
    return _find("quantize", implementation)(x, scale=scale, dtype=dtype, transposed=transposed,
                                             **_studied(implementation, share=None if share == "tile" else share))


def swiglu_quantize(gate: jax.Array, up: jax.Array, *, scale: str = "float32", dtype: DTypeLike = E4M3,
                    implementation: str = "auto") -> Quantized:
    """quantize(silu(gate) * up) of two [M, F], without a round trip through memory.

    As [the twin][kernels_pallas.reference.quantize.swiglu_quantize]. Raises ValueError as `quantize`.
    """
    return _find("swiglu_quantize", implementation)(gate, up, scale=scale, dtype=dtype)


def fp8_matmul(a: Quantized, b: Quantized, *, out_dtype: DTypeLike = jnp.bfloat16,
               accumulator: Accumulator | None = None, implementation: str = "auto") -> jax.Array:
    """a [M, K] by the transpose of b [N, K] -> [M, N] in `out_dtype`, scales along K, accumulated in float32.

    As [the twin][kernels_pallas.reference.fp8_matmul.fp8_matmul]. Raises ValueError if the operands do not fit, or if
    `accumulator`, which only the twin has, is used with a kernel.
    """
    return _find("fp8_matmul", implementation)(a, b, out_dtype=out_dtype,
                                               **_studied(implementation, accumulator=accumulator))


def fp8_grouped_matmul(a: Quantized, b: Quantized, sizes_E: jax.Array, *, out_dtype: DTypeLike = jnp.bfloat16,
                       accumulator: Accumulator | None = None, implementation: str = "auto") -> jax.Array:
    """The experts' products, contiguous or K-grouped.

    As [the twin][kernels_pallas.reference.fp8_grouped_matmul.fp8_grouped_matmul]. Raises ValueError as `fp8_matmul`.
    """
    return _find("fp8_grouped_matmul", implementation)(a, b, sizes_E, out_dtype=out_dtype,
                                                       **_studied(implementation, accumulator=accumulator))


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, *, transposed: bool = False,
                   implementation: str = "auto") -> jax.Array:
    """The experts' products [R, F] in the dtype of the operands, rows sorted by expert.

    As [the twin][kernels_pallas.reference.grouped_matmul.grouped_matmul]; Hopper's kernel takes bfloat16.
    """
    implementation = _that_takes(x_RD, implementation)
    return _find("grouped_matmul", implementation)(x_RD, w_EDF, sizes_E, transposed=transposed)


def grouped_matmul_weights(x_RD: jax.Array, dy_RF: jax.Array, sizes_E: jax.Array, *,
                           implementation: str = "auto") -> jax.Array:
    """The gradient of their weights, float32 [E, D, F]: [the twin][kernels_pallas.reference.grouped_matmul.weights]."""
    return _find("grouped_matmul", _that_takes(x_RD, implementation), "weights")(x_RD, dy_RF, sizes_E)


def _that_takes(x, implementation):
    """"auto", or "reference" if the device's experts kernel does not support this dtype."""
    only_bfloat16 = implementation == "auto" and chosen_here("grouped_matmul") == "hopper"
    return "reference" if only_bfloat16 and x.dtype != jnp.bfloat16 else implementation


def mla_attention(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None = None, *,
                  scale: float, implementation: str = "auto") -> jax.Array:
    """Causal attention with wide queries and narrow values, differentiable: [B, T, H, V] in the dtype of q.

    As [the twin][kernels_pallas.reference.mla_attention.mla_attention]; a kernel takes bfloat16.
    """
    return _find("mla_attention", implementation)(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale=scale)


def mla_attention_forward(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array,
                          segment_ids_BT: jax.Array | None = None, *, scale: float,
                          implementation: str = "auto") -> tuple[jax.Array, jax.Array]:
    """The same with the residuals for its gradient, for a caller that saves them itself: (o_BTHV, float32 lse_BHT)."""
    return _find("mla_attention", implementation, "forward")(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, scale=scale)


# The operands of one attention kernel.
def mla_attention_backward(q_BTHA: jax.Array, k_BTHA: jax.Array, v_BTHV: jax.Array, segment_ids_BT: jax.Array | None,
                           o_BTHV: jax.Array, lse_BHT: jax.Array, do_BTHV: jax.Array, *, scale: float,
                           implementation: str = "auto") -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq_BTHA, dk_BTHA, dv_BTHV) from the results of `mla_attention_forward`, in the dtypes of q, k and v.

    As [the twin][kernels_pallas.reference.mla_attention.backward].
    """
    return _find("mla_attention", implementation, "backward")(q_BTHA, k_BTHA, v_BTHV, segment_ids_BT, o_BTHV, lse_BHT,
                                                              do_BTHV, scale=scale)


def mla_decode(q_BHX: jax.Array, cache: jax.Array, page_table_BP: jax.Array, lengths_B: jax.Array, *, scale: float,
               implementation: str = "auto") -> jax.Array:
    """One absorbed query per sequence over a paged latent cache: [B, H, C] in the dtype of q.

    As [the twin][kernels_pallas.reference.mla_decode.mla_decode]. Raises ValueError if queries and cache do not fit.
    """
    return _find("mla_decode", implementation)(q_BHX, cache, page_table_BP, lengths_B, scale=scale)
