"""The traffic of a sequence split over devices, and whether XLA hides it: one layer of attention, compiled.

    python -m experiments.studies.long_context.ring        (needs the extra `aot`; no GPU)

V3's attention with its gradients, in bfloat16, 128K tokens over 8 H100s with mesh.context=8. For every
collective-permute of the program: its bytes, its executions, and the products that XLA scheduled between its start and
its done.
"""

import argparse
import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from deepseek_jax import cli, io
from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.model.attention import MLA
from deepseek_jax.model.rope import rope_table
from deepseek_jax.parallel.context import in_parts
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import spec
from deepseek_jax.scale.compile import aot, hlo, targets
from experiments.studies.framework.results import provenance

MESH, TOKENS, TARGET = MeshConfig(context=8), 128 * 1024, "h100:8"
MODEL = model_config("v3_671b")
OUT = pathlib.Path(__file__).parent / "ring.json"


def hop_bytes(gradients: bool) -> int:
    """Bytes that a device sends in a hop: latents in bfloat16 with segment ids, or their gradients in float32."""
    numbers = MODEL.kv_rank + MODEL.rope_head_dim
    return TOKENS // MESH.context * (4 * numbers if gradients else 2 * numbers + 4)


def layer(params: Any, x_BTD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """The sum of attention's outputs. x_BTD: parts; ids_BT: of complete sequences."""
    positions_BT = in_parts(jnp.broadcast_to(jnp.arange(TOKENS), ids_BT.shape))
    y_BTD = MLA(MODEL).apply(params, x_BTD, rope_table(MODEL, positions_BT, jnp.float32), in_parts(ids_BT))
    return y_BTD.astype(jnp.float32).sum()  # pyright: ignore[reportAttributeAccessIssue]: no tuple without `mutable`


def measured() -> dict[str, Any]:
    """The permutations of the compiled layer, and bytes of temporaries, as JSON data."""
    devices = targets.devices_of(TARGET)
    mesh = make_mesh(MESH, devices)
    one = jnp.zeros((1, 8), jnp.int32)
    params = jax.eval_shape(lambda: MLA(MODEL).init(
        jax.random.key(0), jnp.zeros((1, 8, MODEL.d_model), jnp.bfloat16), rope_table(MODEL, one, jnp.float32), None))
    shaped = lambda shape, dtype, *names: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*names)))
    x_BTD = shaped((MESH.context, TOKENS // MESH.context, MODEL.d_model), jnp.bfloat16, "batch", None, None)
    ids_BT = shaped((1, TOKENS), jnp.int32, "sequences", None)
    with jax.set_mesh(mesh):
        lower = functools.partial(jax.jit(jax.grad(layer, argnums=(0, 1))).lower, params, x_BTD, ids_BT)
        compiled, _ = aot.compiled_program(lower, devices[0].platform)
    hops = [dataclasses.asdict(one) for one in hlo.collectives(compiled.as_text() or "", MESH.sizes)
            if one.kind == "collective-permute"]
    return {"tokens": TOKENS, "context": MESH.context, "target": TARGET, "hops": hops,
            "temporaries": aot.bytes_of(compiled)["temporaries"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.studies.long_context.ring", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    result = measured()
    print(f"{'MB':>8}{'times':>7}{'products between start and done':>34}")
    for hop in result["hops"]:
        print(f"{hop['bytes'] / 1e6:8.1f}{hop['times']:7}{hop['products']!s:>34}")
    print(f"temporaries: {result['temporaries'] / 1e9:.1f} GB a device")
    io.write_json(OUT, {"command": "python -m experiments.studies.long_context.ring", **result, **provenance()})


if __name__ == "__main__":
    cli.run(main)
