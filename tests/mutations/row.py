"""One row of a mutation table."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """Breaks one operation on purpose.

    name: the error that the change makes. file: path from the root of the checkout. old: text that occurs in the file
    exactly once; new: its replacement. tests: files or test ids below tests/, separated by spaces, of which one must
    fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
