"""Named shapes for compiling and timing kernels: those of DeepSeek-V3, and tiny ones for a CPU."""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kernels_pallas import api
from kernels_pallas.formats import BLOCK, E4M3, Quantized, blocks


class _Case(abc.ABC):
    """An operation at one shape: its operands, as shapes or random, and a function of them.

    published: a rate that others reach, in units of published_in.
    """

    operation: str
    flops: Any
    published: float | None = None
    published_in: str = "TFLOP/s"

    @property
    def part(self) -> str | None:
        """Another function of the operation's module, if the case is for that."""
        return None

    @abc.abstractmethod
    def arguments(self) -> tuple:
        """jax.ShapeDtypeStructs of the operands."""

    @abc.abstractmethod
    def call(self, implementation: str, **options: Any) -> Callable:
        """The operation as a function of `arguments()`; options: `config`, for tunable kernels."""

    @abc.abstractmethod
    def random(self, key: jax.Array) -> tuple:
        """Random operands."""

    def compared(self) -> _Case:
        """The case for comparing a kernel with its twin."""
        return self

    def bytes(self) -> int:
        """Bytes that cross memory at least once: operands with their scales, and results."""
        size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
        return size(self.arguments()) + size(jax.eval_shape(self.call("reference"), *self.arguments()))

    def function(self, implementation: str) -> Callable:
        """The operation, from the module of the implementation, on any machine.

        "interpreter": hopper's kernels on Mosaic's interpreter, which runs on a CPU; products on 2 SMs.
        """
        folder = "hopper" if implementation == "interpreter" else implementation
        module = importlib.import_module(f"kernels_pallas.{folder}.{api.OPERATIONS[self.operation][0]}")
        function = getattr(module, self.part or self.operation)
        if implementation != "interpreter":
            return function
        from jax.experimental.pallas import mosaic_gpu

        few = {"num_sms": 2} if "matmul" in self.operation else {}
        return functools.partial(function, interpret=mosaic_gpu.InterpretGPUParams(), **few)


@dataclasses.dataclass(frozen=True)
class Case(_Case):
    """One operation at one shape.

    M, N, K: of the product [M, K] @ [N, K].T; quantizers take [M, K]. With `groups` the rows M (or, with form="tiles",
    K) are split evenly over that many experts. form: of b's scales; "tiles" is Wgrad, in float32; of quantizers, which
    copies: "both", "only" the transposed one, or else the one in rows. scale: of quantizers.
    published: TFLOP/s of DeepGEMM on an H800 (March 2025), where there is such a number.
    """

    operation: str
    M: int
    K: int
    N: int = 0
    groups: int = 0
    form: str = "blocks"
    published: float | None = None
    scale: str = "float32"

    def __str__(self):
        sizes = "x".join(str(n) for n in (self.M, self.N, self.K) if n)
        groups = f" in {self.groups} groups" if self.groups else ""
        form = {"tiles": " wgrad", "both": " both copies", "only": " transposed"}.get(self.form, "")
        return f"{sizes}{groups}{form}{'' if self.scale == 'float32' else ' 2^n'}"

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K

    def compared(self) -> Case:
        """With fewer rows, or rows a group: the twin copies a matrix for every 128 of them, 30 GB at V3's sizes.

        Where rows are summed, more slices of 128 remain of a group than a kernel has on the way at once.
        """
        each = 8 * BLOCK if self.form == "tiles" else 2 * BLOCK
        few = min(self.K if self.form == "tiles" else self.M, each * max(self.groups, 1))
        return dataclasses.replace(self, **{"K" if self.form == "tiles" else "M": few}) if self.N else self

    def tuning(self) -> Any:
        """The TuningConfig of Hopper's kernel for an FP8 product."""
        from kernels_pallas.hopper.fp8_matmul import TuningConfig

        return TuningConfig.of_groups(self.N) if self.groups else TuningConfig.of_shape(self.M, self.N)

    @property
    def out_dtype(self) -> DTypeLike:
        return jnp.float32 if self.form == "tiles" else jnp.bfloat16

    def arguments(self) -> tuple:
        tiles = lambda rows, K: Quantized(_array((rows, K), E4M3), _array((rows, blocks(K)), jnp.float32))
        if self.operation in ("quantize", "swiglu_quantize"):
            return (_array((self.M, self.K), jnp.bfloat16),) * (1 if self.operation == "quantize" else 2)
        if self.form == "tiles":
            b = tiles(self.N, self.K)
        else:
            stack = (self.groups,) if self.groups else ()
            b = Quantized(_array((*stack, self.N, self.K), E4M3),
                          _array((*stack, blocks(self.N), blocks(self.K)), jnp.float32))
        sizes = (_array((self.groups,), jnp.int32),) if self.groups else ()
        return (tiles(self.M, self.K), b, *sizes)

    def call(self, implementation: str, **options: Any) -> Callable:
        function = functools.partial(self.function(implementation), **options)
        if self.operation == "quantize":
            transposed = {"both": True, "only": "only"}.get(self.form, False)
            return functools.partial(function, scale=self.scale, transposed=transposed)
        if self.operation == "swiglu_quantize":
            return functools.partial(function, scale=self.scale)
        return lambda *args: function(*args, out_dtype=self.out_dtype)

    def random(self, key: jax.Array) -> tuple:
        """Operands of normal numbers, quantized as training would; groups of equal size."""
        keys = iter(jax.random.split(key, 8))
        normal = lambda shape: jax.random.normal(next(keys), shape, jnp.bfloat16)
        made = []
        for argument in self.arguments():
            if not isinstance(argument, Quantized):
                rows = self.K if self.form == "tiles" else self.M
                made.append(jnp.full(argument.shape, rows // self.groups // BLOCK * BLOCK, jnp.int32)
                            if argument.dtype == jnp.int32 else normal(argument.shape))
            elif argument.scales.shape[-2] == argument.values.shape[-2]:
                made.append(api.quantize(normal(argument.values.shape), implementation="reference"))
            else:
                made.append(api.quantize_blocks(normal(argument.values.shape)))
        return tuple(made)


@dataclasses.dataclass(frozen=True)
class Grouped(_Case):
    """grouped_matmul of R rows, [R, D] by [groups, D, F], in bfloat16; groups are equal, and end anywhere.

    form: "transposed", the matrices are [groups, F, D]; "weights", the gradient of the matrices.
    """

    R: int
    D: int
    F: int
    groups: int
    form: str = ""
    operation: str = "grouped_matmul"

    @property
    def flops(self) -> int:
        return 2 * self.R * self.D * self.F

    def __str__(self):
        return f"{self.R}x{self.D}x{self.F} in {self.groups} groups{f' {self.form}' if self.form else ''}"

    @property
    def part(self) -> str | None:
        return "weights" if self.form == "weights" else None

    def compared(self) -> Grouped:
        """With fewer rows per group: the twin multiplies a copy of all rows by every matrix."""
        return dataclasses.replace(self, R=min(self.R, 300 * self.groups))

    def arguments(self) -> tuple:
        right = {"": (self.groups, self.D, self.F), "transposed": (self.groups, self.F, self.D),
                 "weights": (self.R, self.F)}[self.form]
        return _array((self.R, self.D), jnp.bfloat16), _array(right, jnp.bfloat16), _array((self.groups,), jnp.int32)

    def call(self, implementation: str, **options: Any) -> Callable:
        how = {"transposed": True} if self.form == "transposed" else {}
        return functools.partial(self.function(implementation), **how, **options)

    def random(self, key: jax.Array) -> tuple:
        rows, matrices, _ = (jax.random.normal(k, x.shape, jnp.bfloat16)
                             for k, x in zip(jax.random.split(key, 3), self.arguments()))
        return rows, matrices, jnp.full(self.groups, self.R // self.groups, jnp.int32)


@dataclasses.dataclass(frozen=True)
class Attention(_Case):
    """mla_attention of B sequences of T tokens and H heads, or, with backward=True, its gradients as well.

    published: about what FlashAttention-3 reaches on an H100 at causal heads of 128, 600 TFLOP/s, backward 500.
    """

    B: int
    T: int
    H: int
    backward: bool = False
    segments: bool = False
    A: int = 192
    V: int = 128
    published: float | None = None
    operation: str = "mla_attention"

    def __str__(self):
        kind = f"{' segments' if self.segments else ''}{' and gradients' if self.backward else ''}"
        return f"{self.B}x{self.T} H={self.H} {self.A}/{self.V}{kind}"

    @property
    def flops(self) -> int:
        products = self.A + self.V + self.backward * (3 * self.A + 2 * self.V)
        return self.B * self.H * self.T**2 * products  # the causal half

    def compared(self) -> Attention:
        """With fewer tokens and heads: the twin has all scores at once."""
        return dataclasses.replace(self, T=min(self.T, 1024), H=min(self.H, 8))

    def arguments(self) -> tuple:
        wide, narrow = (_array((self.B, self.T, self.H, n), jnp.bfloat16) for n in (self.A, self.V))
        ids = (_array((self.B, self.T), jnp.int32),) if self.segments else ()
        return (wide, wide, narrow, *((narrow,) if self.backward else ()), *ids)

    def call(self, implementation: str, **options: Any) -> Callable:
        def attend(q, k, v, ids):
            return self.function(implementation)(q, k, v, ids, scale=self.A**-0.5, **options)

        def gradients(q, k, v, do, ids):
            o, pull_back = jax.vjp(lambda *qkv: attend(*qkv, ids), q, k, v)  # pyright: ignore[reportCallIssue] (lengths)
            return o, *pull_back(do)

        run: Callable = gradients if self.backward else attend
        return run if self.segments else lambda *args: run(*args, None)

    def random(self, key: jax.Array) -> tuple:
        ids = jnp.arange(self.T) // max(self.T // 3, 1)
        return tuple(jnp.broadcast_to(ids, x.shape).astype(x.dtype) if x.dtype == jnp.int32
                     else jax.random.normal(k, x.shape, x.dtype)
                     for k, x in zip(jax.random.split(key, 5), self.arguments()))


@dataclasses.dataclass(frozen=True)
class Decode(_Case):
    """mla_decode of B sequences of T tokens in pages of `page`; with `packed` a token is 656 bytes.

    published: what FlashMLA says of an H800 in bfloat16: 660 TFLOP/s where products bind, 3,000 GB/s where memory does.
    """

    B: int
    T: int
    H: int
    page: int = 64
    C: int = 512
    packed: bool = False
    operation: str = "mla_decode"

    @property
    def published(self) -> float | None:
        return None if self.packed or self.C != 512 else 660 if self.H >= 128 else 3000

    @property
    def published_in(self) -> str:
        return "TFLOP/s" if self.H >= 128 else "GB/s"

    @property
    def flops(self) -> int:
        return 2 * self.B * self.H * self.T * (2 * self.C + 64)

    def compared(self) -> Decode:
        """With fewer sequences: the twin copies their pages."""
        return dataclasses.replace(self, B=min(self.B, 8))

    def __str__(self):
        return f"{self.B}x{self.T} H={self.H} pages of {self.page}{' in FP8' if self.packed else ''}"

    def arguments(self) -> tuple:
        X, pages = self.C + 64, -(-self.T // self.page)
        token = (api.packed_width(self.C, 64), jnp.uint8) if self.packed else (X, jnp.bfloat16)
        return (_array((self.B, self.H, X), jnp.bfloat16), _array((self.B * pages, self.page, token[0]), token[1]),
                _array((self.B, pages), jnp.int32), _array((self.B,), jnp.int32))

    def call(self, implementation: str, **options: Any) -> Callable:
        return lambda *args: self.function(implementation)(*args, scale=(self.C // 4 + 64) ** -0.5, **options)

    def random(self, key: jax.Array) -> tuple:
        q, cache, table, lengths = self.arguments()
        keys = jax.random.split(key, 3)
        tokens = jax.random.normal(keys[1], (*cache.shape[:2], q.shape[-1]), jnp.bfloat16)
        return (jax.random.normal(keys[0], q.shape, q.dtype), api.pack_fp8(tokens, 64) if self.packed else tokens,
                jax.random.permutation(keys[2], table.size).reshape(table.shape).astype(jnp.int32),
                jnp.full(lengths.shape, self.T, jnp.int32))


def _array(shape, dtype) -> Any:  # a shape, where the annotations have jax.Array
    return jax.ShapeDtypeStruct(shape, dtype)


# N x K of V3's products -> DeepGEMM's TFLOP/s at M = 64, 128, 4096
_MATMULS = {(2112, 7168): (206, 352, 1009), (24576, 1536): (289, 535, 1125), (32768, 512): (219, 358, 751),
            (7168, 16384): (336, 645, 1426), (4096, 7168): (287, 533, 1265), (7168, 2048): (295, 510, 1168)}

SHAPES = {
    "tiny": (
        Case("quantize", 256, 256), Case("quantize", 256, 256, form="only", scale="power_of_two"),
        Case("swiglu_quantize", 256, 256), Case("fp8_matmul", 256, 256, 128),
        Case("fp8_matmul", 256, 256, 128, form="tiles"),
        # In these, tiles are paired, and there are more slices of K, even in a group, than are in flight at once.
        Case("fp8_grouped_matmul", 512, 1024, 256, groups=2),
        Case("fp8_grouped_matmul", 128, 2048, 256, groups=2, form="tiles"),
        *(Grouped(100, 64, 128, groups=3, form=form) for form in ("", "transposed", "weights")),
        Attention(1, 128, 1, backward=True), Decode(1, 128, 2, page=32, C=128),
        Decode(1, 128, 2, page=32, packed=True)),
    "v3-train": (
        Case("quantize", 4096, 7168), Case("quantize", 4096, 7168, form="both"),
        Case("quantize", 4096, 7168, form="only", scale="power_of_two"),
        Case("swiglu_quantize", 32768, 2048), Case("swiglu_quantize", 32768, 2048, scale="power_of_two"),
        *(Case("fp8_matmul", 4096, K, N, published=speed[2]) for (N, K), speed in _MATMULS.items()),
        Case("fp8_matmul", 7168, 4096, 2112, form="tiles", published=920),
        Case("fp8_matmul", 16384, 4096, 7168, form="tiles", published=994),
        *(Case("fp8_grouped_matmul", 32768, K, N, groups=g, published=speed)
          for g in (4, 8) for N, K, speed in ((4096, 7168, 1346), (7168, 2048, 1214))),
        Case("fp8_grouped_matmul", 4096, 32768, 7168, groups=8, form="tiles"),
        Grouped(32768, 7168, 2048, groups=8), Grouped(32768, 2048, 7168, groups=8),
        *(Grouped(32768, 2048, 7168, groups=8, form=form) for form in ("transposed", "weights")),
        *(Grouped(98304, 2048, 1408, groups=64, form=form) for form in ("", "weights")),  # V2-Lite's experts
        Attention(1, 4096, 128, published=600),
        # Of 1,152 products a pair of tokens, 320 at 600 and 832 at 500.
        Attention(1, 4096, 128, backward=True, published=524),
        Attention(1, 4096, 128, backward=True, segments=True)),
    "v3-decode": (
        *(Case("fp8_matmul", M, K, N, published=speed[n])
          for (N, K), speed in _MATMULS.items() for n, M in enumerate((64, 128))),
        *(Decode(*shape, packed=packed) for packed in (False, True)
          for shape in ((128, 4096, 128), (128, 4096, 16), (4, 32768, 128, 32)))),
}
