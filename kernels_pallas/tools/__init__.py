"""Command-line tools for the kernels: shapes, benchmark, compile reports. Like the kernels they need only jax."""
