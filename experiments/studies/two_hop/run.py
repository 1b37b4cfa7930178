"""How much the two hops of dispatch save across nodes, measured on 64 virtual devices; draws docs/dispatch.png.

    python experiments/studies/two_hop/run.py

Random tokens are routed as DeepSeek-V3 routes (256 experts, the best 4 of 8 groups, top 8) on a mesh of 8 nodes of 8
devices, each with four experts. What each device sends to each other one is read off the dispatch itself.
"""

import json
import os
import pathlib

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=64"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax import io
from deepseek_jax.config import MeshConfig, model_config
from deepseek_jax.model.experts import FP8_WIRE
from deepseek_jax.model.router import select
from deepseek_jax.parallel.dispatch import Placement, plan_hops, to_experts, traffic_per_token
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import spec
from deepseek_jax.plots.training import plot_dispatch

HERE = pathlib.Path(__file__).parent
MODEL = model_config("v3_671b")
FORMS = {form: MeshConfig(node=8, local=8, dispatch=form) for form in ("two_hop", "flat")}
AXES = {"two_hop": ("node", "local"), "flat": (("node", "local"),)}
TOKENS = 256  # a device


def choices():
    scores_NE = jax.nn.sigmoid(np.random.default_rng(0).standard_normal((64 * TOKENS, MODEL.num_experts), np.float32))
    return select(MODEL, scores_NE, jnp.zeros(MODEL.num_experts))


def sent(form, chosen_NK):
    """For each hop, [64, 64]: the copies that each device sends to each."""
    def inside(chosen_NK):
        return [hop.sent_P[None] for hop in plan_hops(placement(form), chosen_NK)[0]]

    tokens = spec("tokens")
    with jax.set_mesh(make_mesh(FORMS[form])):
        hops = jax.jit(jax.shard_map(inside, in_specs=tokens, out_specs=tokens, check_vma=False))(chosen_NK)
    return [between_devices(axis, np.asarray(sent_DP)) for axis, sent_DP in zip(AXES[form], hops)]


def placement(form):
    return Placement(FORMS[form], MODEL.num_experts, MODEL.groups_kept)


def between_devices(axis, sent_DP):
    """[devices, places of a hop] -> [devices, devices]: hop 1 keeps the local index, hop 2 the node."""
    node_D, local_D = np.divmod(np.arange(64), 8)
    if axis == "node":
        return sent_DP[:, node_D] * (local_D[:, None] == local_D[None])
    if axis == "local":
        return sent_DP[:, local_D] * (node_D[:, None] == node_D[None])
    return sent_DP


def counters(form, chosen_NK):
    """What a training run writes into its metrics."""
    experts = lambda x_RD, id_RK, gates_RK, weights: (x_RD, (id_RK > 0).sum())
    gates_NK = jnp.ones(chosen_NK.shape)
    with jax.set_mesh(make_mesh(FORMS[form])):
        run = lambda x_ND: to_experts(placement(form), experts, x_ND, chosen_NK, gates_NK, ())[1]
        traffic = jax.jit(run)(jnp.ones((len(chosen_NK), 1)))
    return traffic_per_token(FORMS[form], MODEL, jax.device_get(traffic))


def fp8_error():
    """Relative error (RMS) of a token of normal values that was sent in FP8."""
    x_ND = np.random.default_rng(1).standard_normal((64, MODEL.d_model), np.float32)
    arrived_ND = np.asarray(FP8_WIRE.decode(FP8_WIRE.encode(jnp.asarray(x_ND)), jnp.float32))
    return float(np.linalg.norm(arrived_ND - x_ND) / np.linalg.norm(x_ND))


def main():
    chosen_NK = choices()
    found = {form: counters(form, chosen_NK) for form in FORMS}
    ratio = found["two_hop"]["cross_node_bytes"] / found["flat"]["cross_node_bytes"]
    result = {"tokens": 64 * TOKENS, "bytes per token": found, "two hops / flat, across nodes": ratio,
              "relative error of FP8 dispatch": fp8_error()}
    io.write_json(HERE / "results.json", result)
    matrices = dict(zip(("hop 1: across nodes", "hop 2: inside a node", "flat: one hop"),
                        [*sent("two_hop", chosen_NK), *sent("flat", chosen_NK)]))
    plot_dispatch(matrices, 8, HERE.parents[2] / "docs" / "dispatch.png")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
