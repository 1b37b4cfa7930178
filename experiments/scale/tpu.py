"""Memory accesses and FLOPs of a training step on a TPU by XLA's analysis, with and without the device's kernels.

    python -m experiments.scale.tpu --json experiments/scale/tpu.json [--chips v5p v6e 7x] [--models v3_671b]

No TPU is needed. The parts of a MoE layer on one device, forward and gradients: attention of a sequence of 4,096
tokens, and its experts, 8 of V2-Lite's 64 (one of 8 devices) or 4 of V3's 256 (one of 64), with the rows of an even
load. "xla" is `model.implementation=xla`, attention in blocks of 512 and `lax.ragged_dot`; "auto" is splash attention
and megablox.

XLA's analysis counts the body of a loop once; here all iterations count (`measure`). For megablox it counts everything
that the grid reads; for splash attention only one read of operands and results, and no FLOPs: repeated reads, such as
keys for every block of queries, are "read_again", computed from its blocks.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax import io
from deepseek_jax.config import MeshConfig, ModelConfig, model_config
from deepseek_jax.model.blockwise import attend, causal_pairs
from deepseek_jax.model.grouped_matmul import grouped_matmul, implementation_here
from deepseek_jax.model.layers import swiglu
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.scale.compile import aot, targets
from kernels_pallas.tpu.mla_attention import BLOCK

SLICES = {"v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "7x:2x2x1"}  # the smallest
EXPERTS_HERE = {"v2_lite_16b": 8, "v3_671b": 4}
KEYS = ("chip", "model", "part", "implementation")  # of a row
TOKENS, WIDTH = 4096, 2  # of a sequence; bytes of bfloat16
PAIRS = len(causal_pairs(TOKENS // ModelConfig.attention_block))  # iterations of attention's loops
IMPLEMENTATIONS = ("xla", "auto")


def unrolled(function: Callable, rounds: int | None = None) -> Callable:
    """The function with its loops of known length unrolled, or those of PAIRS iterations in groups of `rounds`."""
    def run(*arguments):
        traced, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        results = jax.extend.core.jaxpr_as_fun(_without_loops(traced, rounds))(*jax.tree.leaves(arguments))
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return run


def _without_loops(program: Any, rounds: int | None) -> Any:
    """A jaxpr, closed or not, with every `scan` unrolled; other values are returned unchanged."""
    if type(program) in (tuple, list):
        return type(program)(_without_loops(one, rounds) for one in program)
    if not hasattr(program, "eqns"):
        return program
    if getattr(program, "jaxpr", program) is not program:  # closed over constants
        return program.replace(jaxpr=_without_loops(program.jaxpr, rounds))
    lines = []
    for line in program.eqns:
        params = {name: _without_loops(value, rounds) for name, value in line.params.items()}
        if line.primitive.name == "scan":
            length = max(params["length"], 1)
            params["unroll"] = rounds if rounds and length == PAIRS else length
        lines.append(line.replace(params=params))
    return program.replace(eqns=lines)


def attention(c: ModelConfig) -> tuple[Callable, tuple]:
    """Attention and its gradients, and the shapes of its arguments."""
    wide, narrow = (jax.ShapeDtypeStruct((1, TOKENS, c.num_heads, n), jnp.bfloat16)
                    for n in (c.qk_head_dim, c.v_head_dim))

    def run(q, k, v, do):
        o, pull_back = jax.vjp(lambda q, k, v: attend(q, k, v, None, c.qk_head_dim**-0.5, c.attention_block,
                                                      implementation=c.implementation), q, k, v)
        return o, *pull_back(do)

    return run, (wide, wide, narrow, narrow)


def experts(c: ModelConfig, here: int) -> tuple[Callable, tuple]:
    """The experts' networks and their gradients, for sorted rows, and the shapes of the arguments."""
    D, F = c.d_model, c.expert_ffn_dim
    rows = TOKENS * c.experts_per_token
    weights = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((here, D, F), (here, D, F), (here, F, D))]
    row = jax.ShapeDtypeStruct((rows, D), jnp.bfloat16)

    def run(x, gate, up, down, sizes, dy):
        product = functools.partial(grouped_matmul, sizes_E=sizes, align=1,
                                    implementation=implementation_here(c.implementation))
        y, pull_back = jax.vjp(lambda x, gate, up, down: product(swiglu(product(x, gate), product(x, up)), down),
                               x, gate, up, down)
        return y, *pull_back(dy)

    return run, (row, *weights, jax.ShapeDtypeStruct((here,), jnp.int32), row)


class Part(NamedTuple):
    """build: config -> (function, shapes of its arguments). attends: whether it contains attention's loops."""

    build: Callable[[ModelConfig], tuple[Callable, tuple]]
    attends: bool = True


def parts(name: str) -> dict[str, Part]:
    """The compiled parts of a model, by name."""
    return {"attention": Part(attention), "experts": Part(functools.partial(experts, here=EXPERTS_HERE[name]), False)}


def read_again(name: str, part: str) -> float:
    """Bytes of attention's operands that its kernels read repeatedly; 0 for experts."""
    if part == "experts":
        return 0.0
    # Forward, dq, and dk with dv: each streams two operands past the blocks of the other two.
    c, n = model_config(name), TOKENS // BLOCK
    return 3 * n * (n - 1) / 2 * BLOCK * c.num_heads * (c.qk_head_dim + c.v_head_dim) * WIDTH


def measure(chip: str, part: Part, c: ModelConfig) -> dict[str, float]:
    """The figures of XLA's analysis for a part on one device of a chip, with all rounds of its loops.

    Attention's loops, whose rounds are alike, are compiled with one and with two rounds in their bodies; the difference
    is the cost of one round. (Compiling all rounds unrolled takes an hour.)
    """
    once = compiled(chip, part, c, 1)
    if c.implementation == "auto" or not part.attends:
        return once
    found = compiled(chip, part, c, 2)
    return {name: once[name] + (PAIRS - 1) * (found[name] - once[name]) for name in ("bytes_accessed", "flops")} | {
        "temporaries": once["temporaries"], "seconds": once["seconds"] + found["seconds"]}


def compiled(chip: str, part: Part, c: ModelConfig, rounds: int | None = None) -> dict[str, float]:
    """Compiles a part and returns XLA's analysis. rounds: as in `unrolled`."""
    mesh = make_mesh(MeshConfig(), targets.devices_of(SLICES[chip])[:1])
    here = NamedSharding(mesh, PartitionSpec())
    start = time.time()
    with jax.set_mesh(mesh):
        run, shapes = part.build(c)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        made = jax.jit(unrolled(run, rounds), out_shardings=here).lower(*shapes).compile()
    cost = made.cost_analysis() or {}
    return {"bytes_accessed": cost.get("bytes accessed", 0.0), "flops": cost.get("flops", 0.0),
            "temporaries": aot.bytes_of(made)["temporaries"], "seconds": round(time.time() - start, 1)}


def shown(row: dict[str, Any]) -> str:
    """A row as a line; one with an "error" did not compile."""
    head = "{chip:4} {model:12} {part:18} {implementation:5} ".format(**row)
    if "error" in row:
        return head + repr(row["error"])
    return head + (f"{row['bytes_accessed'] / 1e9:9.2f} GB, {row['read_again'] / 1e9:6.2f} again, "
                   f"{row['flops'] / 1e9:9.0f} GFLOP {row['temporaries'] / 1e6:9.0f} MB of temporaries "
                   f"{row['seconds']:6.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.scale.tpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there, one by one, of a program that does "
                        "not compile with its error; those there are kept")
    parser.add_argument("--chips", nargs="+", default=list(SLICES), choices=SLICES)
    parser.add_argument("--models", nargs="+", default=list(EXPERTS_HERE), choices=EXPERTS_HERE)
    args = parser.parse_args()
    rows = io.read_json(args.json)["rows"] if args.json and os.path.exists(args.json) else []
    had = {tuple(row[key] for key in KEYS) for row in rows}
    for chip in args.chips:
        for name in args.models:
            for words, part in parts(name).items():
                for implementation in IMPLEMENTATIONS:
                    if (chip, name, words, implementation) in had:
                        continue
                    c = model_config(name, implementation=implementation, mtp_depth=0)
                    try:
                        found = measure(chip, part, c)
                    except jax.errors.JaxRuntimeError as error:  # the compiler's error
                        found = {"error": (str(error).strip() or "no message").splitlines()[0][:200]}
                    else:
                        found = {"read_again": read_again(name, words) if implementation == "auto" else 0.0} | found
                    rows.append(dict(zip(KEYS, (chip, name, words, implementation))) | found)
                    print(shown(rows[-1]), flush=True)
                    if args.json:
                        io.write_json(args.json, {"jax": jax.__version__, "tokens": TOKENS, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
