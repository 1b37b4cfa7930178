"""The savings of two-hop dispatch across nodes, measured on 64 virtual devices (report section 3.2.2).

Random tokens are routed as in DeepSeek-V3 (256 experts, the best 4 of 8 groups, top 8) on a mesh of 8 nodes with 8
devices, each with four experts. The copies that each device sends to each other one are read from the dispatch itself.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import ConfigError, MeshConfig, model_config
from deepseek_jax.model.experts import FP8_WIRE
from deepseek_jax.model.router import select
from deepseek_jax.parallel.dispatch import ExpertLayout, route_hops, to_experts, traffic_per_token
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import spec
from deepseek_jax.plots.training import plot_dispatch
from experiments.studies.framework.results import origin, seconds
from experiments.studies.framework.runner import ROOT
from experiments.studies.framework.study import Job, Measure, Study

MODEL = model_config("v3_671b")
DEVICES = 64
AXES = {"two_hop": ("node", "local"), "flat": (("node", "local"),)}  # of each hop
TOKENS, QUICK_TOKENS = 256, 16  # a device
NOTE = ("Hop 1 sends only between devices that have the same place in their nodes (diagonals),\n"
        "one copy a node; hop 2 sends it on inside the node (blocks). Flat sends straight to each device.")


class Traffic(Measure):
    """The training metrics of a dispatch, and the copies between each pair of devices."""

    resumes, alone, devices = False, True, DEVICES

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        form: Any = job.study.arms[job.arm]
        mesh = MeshConfig(node=8, local=8, **form)
        for seed in job.seeds:
            chosen_NK = choices(seed, DEVICES * (QUICK_TOKENS if job.study.quick else TOKENS))
            yield {"seed": seed, "tokens": len(chosen_NK), "bytes per token": counters(mesh, chosen_NK),
                   "hops": [sent_DD.tolist() for sent_DD in sent(mesh, chosen_NK)], "fp8_error": fp8_error(seed + 1)}
            job.tell(1)

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        found = {run["arm"]: run["bytes per token"] for run in runs}
        ratio = found["two_hop"]["cross_node_bytes"] / found["flat"]["cross_node_bytes"]
        return {"tokens": runs[0]["tokens"], "bytes per token": found, "two hops / flat, across nodes": ratio,
                "relative error of FP8 dispatch": runs[0]["fp8_error"], "seconds": seconds(runs), **origin(runs)}

    def lines(self, results: dict[str, Any]) -> list[str]:
        return [json.dumps(results, indent=2)]


def choices(seed: int, tokens: int) -> jax.Array:
    """int32 [tokens, 8]: the experts of random tokens."""
    scores_NE = jax.nn.sigmoid(np.random.default_rng(seed).standard_normal((tokens, MODEL.num_experts), np.float32))
    return select(MODEL, scores_NE, jnp.zeros(MODEL.num_experts))


def sent(mesh: MeshConfig, chosen_NK: jax.Array) -> list[np.ndarray]:
    """For each hop, [64, 64]: the copies that each device sends to each other one."""
    def inside(chosen_NK):
        placement = ExpertLayout(mesh, MODEL.num_experts, MODEL.groups_kept)
        return [hop.sent_P[None] for hop in route_hops(placement, chosen_NK)[0]]

    tokens = spec("tokens")
    with jax.set_mesh(make_mesh(mesh)):
        hops = jax.jit(jax.shard_map(inside, in_specs=tokens, out_specs=tokens, check_vma=False))(chosen_NK)
    return [between_devices(axis, np.asarray(sent_DP)) for axis, sent_DP in zip(AXES[mesh.dispatch], hops)]


def between_devices(axis: str | tuple[str, ...], sent_DP: np.ndarray) -> np.ndarray:
    """[devices, places of a hop] -> [devices, devices]: hop 1 keeps the local index, hop 2 the node."""
    node_D, local_D = np.divmod(np.arange(DEVICES), 8)
    if axis == "node":
        return sent_DP[:, node_D] * (local_D[:, None] == local_D[None])
    if axis == "local":
        return sent_DP[:, local_D] * (node_D[:, None] == node_D[None])
    return sent_DP


def counters(mesh: MeshConfig, chosen_NK: jax.Array) -> dict[str, float]:
    """The values that a training run writes to its metrics."""
    experts = lambda x_RD, id_RK, gates_RK, weights: (x_RD, (id_RK > 0).sum())
    gates_NK = jnp.ones(chosen_NK.shape)
    with jax.set_mesh(make_mesh(mesh)):
        placement = ExpertLayout(mesh, MODEL.num_experts, MODEL.groups_kept)
        run = lambda x_ND: to_experts(placement, experts, x_ND, chosen_NK, gates_NK, ())[1]
        traffic = jax.jit(run)(jnp.ones((len(chosen_NK), 1)))
    return traffic_per_token(mesh, MODEL, jax.device_get(traffic))


def fp8_error(seed: int) -> float:
    """Relative error (RMS) of a token of normally distributed values that was sent in FP8."""
    x_ND = np.random.default_rng(seed).standard_normal((64, MODEL.d_model), np.float32)
    arrived_ND = np.asarray(FP8_WIRE.decode(FP8_WIRE.encode(jnp.asarray(x_ND)), jnp.float32))
    return float(np.linalg.norm(arrived_ND - x_ND) / np.linalg.norm(x_ND))


def draw(results: dict, runs: list[dict], folder: pathlib.Path) -> None:
    """docs/dispatch.png, or for a short run a picture in its work directory."""
    if not runs:
        raise ConfigError("two_hop: results.json does not hold the copies between devices; leave --draw out, measuring "
                          "takes a minute.")
    hops = [np.array(sent_DD) for run in runs for sent_DD in run["hops"]]
    names = ("Hop 1: across nodes", "Hop 2: inside a node", "Flat: one hop")
    complete = folder == pathlib.Path(__file__).resolve().parent
    plot_dispatch(dict(zip(names, hops)), 8, (ROOT / "docs" if complete else folder) / "dispatch.png", NOTE)


STUDY = Study(
    name="two_hop",
    arms={form: {"dispatch": form} for form in AXES},
    measure=Traffic(),
    draw=draw,
    quick_arms=tuple(AXES),
    seeds=(0,),
    quick_seeds=(0,),
    json_indent=2)
