"""Kernels of DeepSeek-V3, which need only jax: jnp twins, and Pallas for Hopper and TPU. `api` has the operations."""
