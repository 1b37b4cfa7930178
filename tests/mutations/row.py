"""One row of a mutation table."""

from typing import NamedTuple


class Mutation(NamedTuple):
    """Breaks one operation on purpose.

    name: what the change does wrong. file: from the root of the checkout. old: text that is there exactly once;
    new: what replaces it. tests: files or test ids below tests/, separated by spaces, of which one must go red.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
