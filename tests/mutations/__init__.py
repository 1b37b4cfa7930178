"""Breaks the source on purpose, one operation at a time, and checks that a test fails.

    python tests/mutations                    all of them, one after the other
    python tests/mutations yarn tile          those whose name contains one of the words
    python tests/mutations --list

Each mutation is applied to a copy of the tree, in which only the test files that should fail are run. Prints a table of
mutations and failed tests; exits with 1 if a mutation survives, or if its text is no longer in the source.
`results.json` has the last verdict on every row. To add a row, add a `Mutation` to the module of its package.
"""

import importlib

from tests.mutations.row import Mutation

ROOMS = ("model", "attention", "context", "config", "data", "fp8", "kernels", "parallel", "pipeline", "training",
         "checkpoint", "interop", "serving", "openai", "posttraining", "preferences", "scale", "studies", "explore")
MUTATIONS: list[Mutation] = [row for room in ROOMS
                             for row in importlib.import_module(f"tests.mutations.{room}").MUTATIONS]
