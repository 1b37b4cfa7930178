"""Kernels of DeepSeek-V3, on jax alone: jnp twins, Pallas for Hopper, Pallas for TPU. `api` has the public operations."""
