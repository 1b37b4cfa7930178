"""Mosaic's interpreter, which runs Hopper kernels on a CPU: importing this skips where jax has none (before 0.11)."""

import pytest

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("this jax has no interpreter for GPU kernels", allow_module_level=True)

INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
