"""Compiling a step for machines that are not here, and reading the result."""
