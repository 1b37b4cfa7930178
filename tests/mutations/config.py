"""Mutations of config: each breaks one operation, and the tests named must fail."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="an old run's latents get another eps",
        file="deepseek_jax/config/load.py",
        old='"norm_eps" in model and "latent_norm_eps" not in model:',
        new="False:",
        tests="config/test_config.py::test_a_run_from_before_the_latents_had_an_eps_of_their_own_keeps_its_numbers",
    ),
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
    Mutation(
        name="softmax scores with a bias pass unsaid",
        file="deepseek_jax/config/advice.py",
        old='model.score == "softmax"',
        new='model.score == "sqrt"',
        tests="config/test_advice.py::test_softmax_scores_with_a_bias_are_noted",
    ),
    Mutation(
        name="a bias that never moves counts as a second balancer",
        file="deepseek_jax/config/advice.py",
        old="and balance.bias_speed > 0",
        new="and balance.bias_speed >= 0",
        tests="config/test_advice.py::test_two_balancers_are_noted",
    ),
    Mutation(
        name="a source named twice is taken twice",
        file="deepseek_jax/config/training.py",
        old="if paths.count(path) > 1]",
        new="if paths.count(path) > 2]",
        tests="config/test_config.py",
    ),
    Mutation(
        name="compiled programs are kept elsewhere than the user says",
        file="deepseek_jax/runtime.py",
        old='if "JAX_COMPILATION_CACHE_DIR" in os.environ:',
        new='if False:',
        tests="test_runtime.py::test_a_cache_of_the_user_s_wins",
    ),
    Mutation(
        name="a ~ in an option stays",
        file="deepseek_jax/cli.py",
        old="setattr(found, name, usable_path(said, value, name in ON_DISK))",
        new="pass",
        tests="test_cli.py::test_a_tilde_in_a_path_is_the_users_folder_and_no_folder_of_that_name",
    ),
    Mutation(
        name="a ~ in init.from stays",
        file="deepseek_jax/config/training.py",
        old='object.__setattr__(self, "from_", usable_path("init.from", self.from_))',
        new="pass",
        tests="test_cli.py::test_a_tilde_in_a_path_is_the_users_folder_and_no_folder_of_that_name",
    ),
    Mutation(
        name="help says no defaults",
        file="deepseek_jax/cli.py",
        old='return said if not known or "default" in said else',
        new="return said if True else",
        tests="test_cli.py::test_help_says_each_default_once",
    ),
    Mutation(
        name="a bucket is a folder of its name",
        file="deepseek_jax/config/schema.py",
        old='if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):',
        new="if True:",
        tests="test_cli.py::test_an_address_is_refused_before_a_folder_of_its_name_is_made",
    ),
]
