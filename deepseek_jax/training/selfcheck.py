"""A check of a few seconds at the start of a run on an accelerator: does it compute the same as a CPU?

Compilers and drivers have silently corrupted exactly these operations. The experts' grouped product, forward and
backward, and the dispatch with ragged buffers are run on small random data and compared with their twins, plain
products and static buffers. On a CPU, which runs the twins, nothing is checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import fp8
from deepseek_jax.config import Config, ConfigError, MeshConfig
from deepseek_jax.model.grouped_matmul import grouped_matmul, implementation_here, row_alignment
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.dispatch import ExpertLayout, to_experts
from kernels_pallas import api

LARGEST = 0.02  # difference relative to the largest magnitude: bfloat16 rounds to 2^-8
SCHEDULER = "--xla_gpu_enable_latency_hiding_scheduler=false"


def check_device(config: Config, mesh: jax.sharding.Mesh | None) -> None:
    """Raises ConfigError, which names what to change, if the accelerators of a run compute different results, or do not
    have the requested FP8 kernels."""
    fp8.check_here(config.model.fp8)
    if jax.default_backend() == "cpu":
        return
    if config.model.num_moe_layers:
        name = config.model.implementation
        _refuse(grouped_difference(name), f"the experts' grouped product (model.implementation={name!r})",
                "take --config.model.implementation=xla" if name == "auto" and api.chosen_here("grouped_matmul") !=
                "reference" else "take another version of jax or of the driver")
    if config.model.num_moe_layers and config.model.fp8.enabled:
        name = config.model.fp8.implementation
        _refuse(fp8_grouped_difference(name), f"the experts' FP8 product (fp8.implementation={name!r})",
                "take --config.fp8.implementation=reference")
    if mesh is not None and config.mesh.buffers == "ragged":
        with jax.set_mesh(mesh):
            _refuse(dispatch_difference(config.mesh), "what ragged_all_to_all carries",
                    f"add {SCHEDULER} to XLA_FLAGS, or take --config.mesh.buffers=static")


def _refuse(difference, what, instead):
    if not difference <= LARGEST:  # nor NaN
        raise ConfigError(f"{what} is not its twin on {jax.devices()[0].device_kind!r} (off by {difference:.1e} of the "
                          f"largest number): no run on this device would be right; {instead}.")


def grouped_difference(implementation: str = "auto") -> float:
    """Difference of the grouped product and its gradients from the reference's; one expert has no rows, and some rows
    have no expert."""
    E, R, D, F = 4, 512, 128, 256
    sizes_E = jnp.array([128, 0, 256, 64], jnp.int32)
    align = row_alignment(implementation_here(), R, E)
    there_R1 = jnp.arange(R)[:, None] < sizes_E.sum()

    def run(name: str) -> Any:
        x, w, dy = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((R, D), (E, D, F), (R, F))))
        x, dy = (jnp.where(there_R1, a, 0).astype(jnp.bfloat16) for a in (x, dy))
        y, pull_back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes_E, align, name), x, w)
        return y, *pull_back(dy)

    return _difference(lambda: run(implementation), lambda: run("reference"))


def fp8_grouped_difference(implementation: str) -> float:
    """Difference of the FP8 grouped product from the reference's: wide enough that SMs share rows, and with more slices
    of 128 along K than a kernel has in flight at once."""
    sizes_E, N, K = jnp.array([128, 0, 256, 128], jnp.int32), 256, 1024

    def run(name: str) -> Any:
        a, b = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((512, K), (4, N, K))))
        return api.fp8_grouped_matmul(api.quantize(a, implementation="reference"), api.quantize_blocks(b), sizes_E,
                                      implementation=name)

    return _difference(lambda: run(implementation), lambda: run("reference"))


def dispatch_difference(cfg: MeshConfig) -> float:
    """Difference of the dispatch with ragged buffers and its gradients from that with static ones, on the mesh in
    use."""
    E, N, K, D = 2 * cfg.nodes * cfg.local, 8 * cfg.devices, 2, 128

    def experts(x_RD, id_RK, gates_RK, weights):
        w_ED = jnp.concatenate([jnp.zeros((1, D)), weights[0]])
        return (gates_RK[:, :, None] * jnp.tanh(x_RD[:, None] * w_ED[id_RK])).sum(axis=1), (id_RK > 0).sum()

    def run(buffers: Any) -> Any:
        layout = ExpertLayout(dataclasses.replace(cfg, buffers=buffers, capacity=None), E, cfg.nodes)
        keys = jax.random.split(jax.random.key(0), 5)
        x_ND, gates_NK, w_ED, dy_ND = (jax.random.normal(k, s) for k, s in zip(keys, ((N, D), (N, K), (E, D), (N, D))))
        chosen_NK = (jax.random.randint(keys[4], (N, 1), 0, E) + jnp.arange(K)[None]) % E
        y_ND, pull_back, _ = jax.vjp(lambda x, g, w: to_experts(layout, experts, x, chosen_NK, g, (w,)), x_ND, gates_NK,
                                     w_ED, has_aux=True)
        return y_ND, *pull_back(dy_ND)

    return _difference(lambda: run("ragged"), lambda: run("static"))


def _difference(ours: Callable[[], Any], theirs: Callable[[], Any]) -> float:
    """The largest difference over the results, each relative to its largest magnitude."""
    def off(x, y):
        apart = jnp.abs(x - y)
        # Checked separately, since a maximum may lose a NaN.
        return jnp.where(jnp.isfinite(apart).all(), apart.max() / jnp.maximum(jnp.abs(y).max(), 1e-30), jnp.inf)

    def worst():
        pairs = zip(jax.tree.leaves(ours()), jax.tree.leaves(theirs()), strict=True)
        return jnp.stack([off(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in pairs]).max()

    # With the scheduler options of a training step, which have corrupted exchanges.
    return float(jax.jit(worst, compiler_options=compiler_options(jax.default_backend(), jax.__version_info__))())
