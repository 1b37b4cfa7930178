"""Compiling a step for machines that are not available, and reading the result."""
