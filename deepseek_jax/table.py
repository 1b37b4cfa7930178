"""Formats rows of text as a table for a terminal."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """One line per row; the first column is aligned left, the others right."""
    first, *others = (max(map(len, column)) for column in zip(*rows))
    return "\n".join("  ".join([row[0].ljust(first), *(cell.rjust(width) for cell, width in zip(row[1:], others))])
                     for row in rows)
