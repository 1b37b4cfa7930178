"""Kernels of DeepSeek-V3, on jax alone: jnp twins, and Pallas for Hopper and TPU. `api` has the operations."""
