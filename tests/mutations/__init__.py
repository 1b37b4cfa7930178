"""Breaks the source on purpose, one operation at a time, and looks whether a test notices.

    python tests/mutations                    all of them, one after the other
    python tests/mutations yarn tile          those whose name contains one of the words
    python tests/mutations --list

Each mutation is applied to a copy of the tree, where only the test files that should notice run. Prints a table of
mutation and red test; exits with 1 if a mutation survives, or if its text is no longer in the source. `results.json`
has the last verdict on every row. To add a row, add a `Mutation` to the module of its room.
"""

import importlib

from tests.mutations.row import Mutation

ROOMS = ("model", "attention", "context", "config", "data", "fp8", "kernels", "parallel", "pipeline", "training",
         "checkpoint", "interop", "serving", "openai", "posttraining", "preferences", "scale", "studies", "explore")
MUTATIONS: list[Mutation] = [row for room in ROOMS
                             for row in importlib.import_module(f"tests.mutations.{room}").MUTATIONS]
