"""jit and device_put for a run: on one device, or on the mesh of the config (see `parallel.sharding`)."""

from __future__ import annotations

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from deepseek_jax.config import Config, ConfigError
from deepseek_jax.parallel.compiler import compiler_options
from deepseek_jax.parallel.mesh import DATA, make_mesh
from deepseek_jax.parallel.processes import wait_for_all
from deepseek_jax.parallel.sharding import compute_shardings, spec, storage_shardings


class Runner:
    """Runs functions on the mesh of a run; with one device, none of this has an effect."""

    def __init__(self, config: Config):
        """Raises ConfigError when the mesh does not fit the devices."""
        if config.mesh.buffers == "ragged" and jax.default_backend() == "cpu":
            raise ConfigError("mesh.buffers='ragged' is not for a CPU, where XLA has no ragged all-to-all; take "
                              "'static'.")
        if config.mesh.devices == 1 and jax.process_count() > 1:
            raise ConfigError(f"{jax.process_count()} processes with {jax.device_count()} devices need a mesh of as "
                              f"many, and the config's has one; take --config.mesh.local={jax.device_count()}.")
        self.compiling: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext  # around it
        self.mesh = make_mesh(config.mesh) if config.mesh.devices > 1 else None
        self.rows = config.train.batch_size // config.train.accumulation_steps

    def share(self) -> tuple[int, int]:
        """(i, n): this process reads the i-th of n equal parts of every micro-batch.

        Raises:
          ConfigError: two processes share some of their rows of the batch, but not all.
        """
        if self.mesh is None:
            return 0, 1
        held, parts = self._pieces, sorted(set(self._pieces.values()))
        if len({len(part) for part in parts}) > 1 or len({n for part in parts for n in part}) < sum(map(len, parts)):
            raise ConfigError("two processes must hold the same rows of the batch or none in common; give every "
                              "process the same number of devices, and make mesh.tensor a divisor of it.")
        return parts.index(held[jax.process_index()]), len(parts)

    def places(self) -> list[int] | None:
        """The positions of this process's rows in a micro-batch, in the order of `shard_batch`; None: it has all
        rows."""
        if self.mesh is None:
            return None
        size = self.rows // math.prod(self.mesh.shape[axis] for axis in DATA)
        return [piece * size + row for piece in self._pieces[jax.process_index()] for row in range(size)]

    @functools.cached_property
    def _pieces(self):
        """{process: numbers of the pieces, out of data_shards, that its devices hold of a batch}. On a torus those of
        one process need not be adjacent."""
        assert self.mesh is not None
        count = math.prod(self.mesh.shape[axis] for axis in DATA)
        pieces = collections.defaultdict(set)
        for device, index in NamedSharding(self.mesh, spec("sequences")).devices_indices_map((count,)).items():
            pieces[device.process_index].add(index[0].indices(count)[0])
        return {process: tuple(sorted(found)) for process, found in pieces.items()}

    def shard_batch(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """This process's rows [..., rows, T + 1] as global arrays, each piece on the devices that hold it."""
        if self.mesh is None:
            return batch
        return {name: self._placed(np.asarray(x)) for name, x in batch.items()}

    def _placed(self, x):
        assert self.mesh is not None
        where = self._split(np.ndim(x))
        if not np.ndim(x):
            return jax.make_array_from_process_local_data(where, x)
        own = self._pieces[jax.process_index()]
        size = x.shape[-2] // len(own)
        rows = size * math.prod(self.mesh.shape[axis] for axis in DATA)

        def piece(index):
            first = own.index(index[-2].indices(rows)[0] // size) * size
            return x[..., first:first + size, :]

        return jax.make_array_from_callback((*x.shape[:-2], rows, x.shape[-1]), where, piece)

    def _split(self, rank):
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec(*[None] * (rank - 2), "sequences") if rank else PartitionSpec())

    def shardings(self, state: Any) -> Any:
        """The shardings of a state, or of a part of one; None on one device."""
        return None if self.mesh is None else storage_shardings(state, self.mesh)

    def with_shardings(self, abstract: Any, frozen: bool = False) -> Any:
        """Shapes of a state, or of a part of one, with their shardings; for a frozen one the shardings of a step's
        computation."""
        if self.mesh is None:
            return abstract
        where = compute_shardings(abstract, self.mesh) if frozen else self.shardings(abstract)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), abstract, where)

    def jit(self, f: Callable[..., Any], state: Any = None, told: Callable[[Any, float], None] | None = None,
            **options: Any) -> Callable[..., Any]:
        """jax.jit on the mesh, for one shape. Outputs are replicated, but a first one is split as `state`.

        told: called with the jax.stages.Compiled, and the seconds that compiling took.
        """
        if self.mesh is not None:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            options["out_shardings"] = replicated if state is None else (self.shardings(state), replicated)
        elif told is None:
            return jax.jit(f, **options)
        jitted, compiled = jax.jit(f, **options), []

        @functools.wraps(f)
        def run(*arguments):
            with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
                if not compiled:
                    with self.compiling():
                        began = time.perf_counter()
                        compiled.append(jitted.lower(*arguments).compile(compiler_options=self._compiler_options()))
                        if told is not None:
                            told(compiled[0], time.perf_counter() - began)
                        wait_for_all("compiled")  # otherwise the first would wait for the others, for 30 s only
                return compiled[0](*arguments)

        return run

    def _compiler_options(self):
        if self.mesh is None:
            return None
        return compiler_options(self.mesh.devices.flat[0].platform, jax.__version_info__)

    def fetch(self, tree: Any) -> Any:
        """Host copies, leaf by leaf, in every process."""
        if self.mesh is None:
            return tree
        return jax.tree.map(lambda x: np.asarray(x) if x.is_fully_addressable else
                            multihost_utils.process_allgather(x, tiled=True), tree)

