"""Kernels of DeepSeek-V3 on jax alone: plain-jnp twins, Pallas for Hopper, Pallas for TPU. `api` is the way in."""
