"""Command-line tools around the kernels: shapes, benchmark, compile reports."""
