"""Command-line tools around the kernels: shapes, benchmark, compile reports. Like the kernels they need jax alone."""
