"""Mutations of config: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="groups may straddle nodes",
        file="deepseek_jax/config/mesh.py",
        old="groups = c.num_groups if c.num_groups > 1 else c.num_experts",
        new="groups = c.num_experts",
        tests="parallel/test_mesh.py",
    ),
]
