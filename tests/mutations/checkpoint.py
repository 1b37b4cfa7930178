"""Mutations of checkpoint: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="a flipped bit is restored",
        file="deepseek_jax/checkpoint/manifest.py",
        old="if found[1] != crc:",
        new="if False:",
        tests="checkpoint/test_manager.py",
    ),
    Mutation(
        name="all rows take the scales of the first block",
        file="deepseek_jax/checkpoint/arrays.py",
        old="strip *= scales[block]",
        new="strip *= scales[0]",
        tests="interop/test_tensor_map.py",
    ),
    Mutation(
        name="a part of a matrix takes the scales of its corner",
        file="deepseek_jax/checkpoint/arrays.py",
        old="(first_column + np.arange(values.shape[1]))",
        new="np.arange(values.shape[1])",
        tests="interop/test_tensor_map.py",
    ),
]
