"""Mutations of config: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="an earlier key is forgotten",
        file="deepseek_jax/config/load.py",
        old="config[section][new_name] = value",
        new="pass",
        tests="config/test_config.py",
    ),
    Mutation(
        name="an override of an earlier key loses to the file",
        file="deepseek_jax/config/load.py",
        old="    config = _with_new_names(config)  # first, so that an override wins\n",
        new="",
        tests="config/test_config.py",
    ),
    Mutation(
        name="groups may straddle nodes",
        file="deepseek_jax/config/mesh.py",
        old="groups = c.num_groups if c.num_groups > 1 else c.num_experts",
        new="groups = c.num_experts",
        tests="parallel/test_mesh.py",
    ),
]
