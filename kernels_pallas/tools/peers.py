"""Times of other implementations of the same operation on the same GPU: XLA's products, and torch's if installed.

An XLA product is named after the library that the compiled program actually calls. If a time is missing, a word says
why.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas.formats import E4M3
from kernels_pallas.tools.timing import FLUSHED, time_calls

TORCH_CALLS = 20


def peers(case: Any, key: jax.Array, calls: int) -> dict[str, float | str]:
    """{name: seconds per call, or why there are none}."""
    return _xla(case, key, calls) | _torch(case)


def library(text: str) -> str:
    """The library that a compiled product calls: "cublaslt_fp8", "cublaslt", "cublas", "triton" or "xla"."""
    for mark, name in (("$lt$matmul$f8", "cublaslt_fp8"), ("$lt$matmul", "cublaslt"), ("__cublas$gemm", "cublas"),
                       ("triton", "triton")):
        if mark in text:
            return name
    return "xla"


def _xla(case, key, calls):
    if case.operation == "grouped_matmul":  # the twin is XLA's own ragged product
        try:
            arguments = jax.jit(case.random)(key)
            return {"xla_ragged_dot": time_calls(jax.jit(case.call("reference")), arguments, calls).seconds}
        except Exception as error:  # E times the rows may not fit
            return {"xla_ragged_dot": f"refused: {first_line(error)}"}
    if case.operation != "fp8_matmul":
        return {}
    a, b = (jax.random.normal(k, shape, jnp.bfloat16)
            for k, shape in zip(jax.random.split(key), ((case.M, case.K), (case.N, case.K))))

    def dot(a, b, scale):
        y = jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        return (y * scale).astype(jnp.bfloat16)

    found = {}
    for kind, dtype in (("bf16", jnp.bfloat16), ("fp8_one_scale", E4M3)):
        arguments = a.astype(dtype), b.astype(dtype), jnp.float32(1)
        try:
            run = jax.jit(dot)
            name = library(run.lower(*arguments).compile().as_text() or "")
            found[f"xla_{kind}_by_{name}"] = time_calls(run, arguments, calls).seconds
        except Exception as error:
            found[f"xla_{kind}"] = f"refused: {first_line(error)}"
    return found


def first_line(error: BaseException) -> str:
    """An exception in one short line."""
    return f"{type(error).__name__}: {((str(error).strip() or 'no message').splitlines()[0])[:160]}"


def _torch(case) -> dict[str, float | str]:
    runs = {"fp8_matmul": _scaled_mm, "grouped_matmul": _grouped_mm, "mla_attention": _sdpa}.get(case.operation)
    if runs is None:
        return {}
    try:
        import torch  # pyright: ignore[reportMissingImports] (optional)
    except ImportError:
        return {"torch": "missing: torch is not installed"}
    except Exception as error:  # its libraries may conflict with those of jax
        return {"torch": f"missing: {first_line(error)}"}
    if not torch.cuda.is_available():
        return {"torch": "missing: torch has no CUDA here"}
    found = {}
    for name, run in runs(torch, case).items():
        try:
            found[name] = _torch_seconds(torch, run)
        except (RuntimeError, ValueError, TypeError) as error:
            found[name] = f"refused: {first_line(error)}"
    return found


def _torch_seconds(torch, run: Callable[[], Any]) -> float:
    """Median of events around single calls, each after the L2 cache was overwritten, which also hides the launch."""
    scratch = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    run()
    times = []
    for _ in range(TORCH_CALLS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scratch.zero_()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def _scaled_mm(torch, case):
    fp8 = lambda rows: torch.randn(rows, case.K, device="cuda").to(torch.float8_e4m3fn)
    ones = lambda *shape: torch.ones(*shape, device="cuda")
    a, b, deep = fp8(case.M), fp8(case.N), -(-case.K // 128)
    tiles = lambda rows: ones(deep, rows).t()  # 1 x 128, column-major
    # 128 x 128: scale_b.t() is [N / 128, K / 128], row-major.
    recipe = tiles(case.N).t() if case.form == "tiles" else ones(-(-case.N // 128), deep).t()
    scales = {"torch_scaled_mm_" + ("1x128" if case.form == "tiles" else "128x128"): (tiles(case.M), recipe, False),
              "torch_scaled_mm_rows": (ones(case.M, 1), ones(1, case.N), True),
              "torch_scaled_mm_one_scale": (ones(()), ones(()), True)}
    return {name: lambda sa=sa, sb=sb, fast=fast: torch._scaled_mm(
        a, b.t(), sa, sb, out_dtype=torch.bfloat16, use_fast_accum=fast) for name, (sa, sb, fast) in scales.items()}


def _grouped_mm(torch, case):
    made = [torch.randn(x.shape, device="cuda", dtype=torch.bfloat16) for x in case.arguments()[:2]]
    ends = (torch.arange(case.groups, device="cuda", dtype=torch.int32) + 1) * (case.R // case.groups)
    a, b = (made[0].t() if case.form == "weights" else made[0],
            made[1].transpose(1, 2) if case.form == "transposed" else made[1])
    return {"torch_grouped_mm": lambda: torch._grouped_mm(a, b, offs=ends, out_dtype=torch.bfloat16)}


def _sdpa(torch, case):
    make = lambda width: torch.randn(case.B, case.H, case.T, width, device="cuda", dtype=torch.bfloat16,
                                     requires_grad=case.backward)

    def attend(v_width):
        q, k, v = make(case.A), make(case.A), make(v_width)

        def run():
            o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return torch.autograd.grad(o, (q, k, v), o) if case.backward else o

        return run

    if case.segments:
        return {}
    # Not every backend supports values narrower than keys: with padding it does more work than needed.
    return {"torch_sdpa": attend(case.V), "torch_sdpa_padded_values": attend(case.A)}
