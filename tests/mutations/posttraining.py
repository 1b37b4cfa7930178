"""Mutations of what comes after pre-training: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

GRPO, UPDATE, ROLLOUT = (f"deepseek_jax/posttraining/{name}.py" for name in ("grpo", "update", "rollout"))
ORACLE = "posttraining/test_grpo.py"

MUTATIONS = [
    Mutation(
        name="advantages keep the mean of their group",
        file=GRPO,
        old="rewards_PG - rewards_PG.mean(axis=1, keepdims=True)",
        new="rewards_PG - 0 * rewards_PG.mean(axis=1, keepdims=True)",
        tests=ORACLE,
    ),
    Mutation(
        name="advantages are taken over the batch",
        file=GRPO,
        old="rewards_PG.std(axis=1, keepdims=True)",
        new="rewards_PG.std(keepdims=True)",
        tests=ORACLE,
    ),
    Mutation(
        name="a clip cuts off the better of the two",
        file=GRPO,
        old="jnp.minimum(ratio_BT * advantage_BT,",
        new="jnp.maximum(ratio_BT * advantage_BT,",
        tests=ORACLE,
    ),
    Mutation(
        name="both clips are the low one",
        file=GRPO,
        old="1 + cfg.clip_high)",
        new="1 + cfg.clip_low)",
        tests=ORACLE,
    ),
    Mutation(
        name="the KL estimate is that of the other direction",
        file=GRPO,
        old="jnp.expm1(log_ratio) - log_ratio",
        new="jnp.expm1(-log_ratio) + log_ratio",
        tests=ORACLE,
    ),
    Mutation(
        name="padding overflows into the loss",
        file=GRPO,
        old="jnp.where(counts_BT, a_BT - b_BT, 0)",
        new="a_BT - b_BT",
        tests=ORACLE,
    ),
    Mutation(
        name="long answers weigh more in the mean over sequences",
        file=GRPO,
        old="return counted_BT / jnp.maximum(counted_BT.sum(axis=1, keepdims=True), 1)",
        new="return counted_BT",
        tests=ORACLE,
    ),
    Mutation(
        name="log-probabilities are those of logits",
        file="deepseek_jax/training/losses.py",
        old="targets_M] - jax.nn.logsumexp(logits_MW, axis=-1)",
        new="targets_M]",
        tests=ORACLE,
    ),
    Mutation(
        name="replay is ignored",
        file="deepseek_jax/model/router.py",
        old="if context.chosen_NK is not None:",
        new="if False:",
        tests="posttraining/test_update.py::test_others_routes_are_taken_exactly_and_gates_are_of_its_own_scores",
    ),
    Mutation(
        name="experts that were not recorded are replayed",
        file="deepseek_jax/model/router.py",
        old="jnp.where(context.chosen_NK >= 0, context.chosen_NK, chosen_NK)",
        new="jnp.maximum(context.chosen_NK, 0)",
        tests="posttraining/test_update.py::test_others_routes_are_taken_exactly_and_gates_are_of_its_own_scores",
    ),
    Mutation(
        name="every layer replays the routes of the first",
        file="deepseek_jax/model/transformer.py",
        old="layers(x_BTD, bias_LE, context, chosen)",
        new="layers(x_BTD, bias_LE, context, None if chosen is None else 0 * chosen + chosen[:1])",
        tests="posttraining/test_update.py::test_others_routes_are_taken_exactly_and_gates_are_of_its_own_scores",
    ),
    Mutation(
        name="routes are replayed a token late",
        file=UPDATE,
        old='micro["routes"][..., :-1]',
        new='micro["routes"][..., 1:]',
        tests="posttraining/test_update.py::test_routes_are_handed_over_in_the_layout_of_the_model",
    ),
    Mutation(
        name="the policy loss ignores its weights",
        file=UPDATE,
        old='inputs.micro["weights"][:, 1:]',
        new='1 + 0 * inputs.micro["weights"][:, 1:]',
        tests="posttraining/test_update.py::test_prompts_and_padding_have_no_loss",
    ),
    Mutation(
        name="routes of tokens that were not kept are recorded",
        file="deepseek_jax/serving/engine.py",
        old="made.chosen_NBTLK[n, b, :count]",
        new="made.chosen_NBTLK[n, b]",
        tests="serving/test_engine.py::test_routes_are_those_of_every_token_that_was_fed",
    ),
    Mutation(
        name="pages of a prompt are shared though their routes are asked for",
        file="deepseek_jax/serving/engine.py",
        old="sequence.request.prompt_logprobs or self.geometry.routes:",
        new="sequence.request.prompt_logprobs:",
        tests="serving/test_engine.py::test_routes_are_those_of_every_token_that_was_fed",
    ),
    Mutation(
        name="a token that ends an answer is not learned",
        file=ROLLOUT,
        old="return sequence.made + ([sequence.end] if sequence.end is not None else [])",
        new="return sequence.made",
        tests="posttraining/test_rollout.py::test_a_batch_holds_prompt_answer_and_the_token_that_ended_it",
    ),
    Mutation(
        name="a resumed run draws the answers of its first step again",
        file="deepseek_jax/posttraining/loop.py",
        old="batch = self._rollout(first)",
        new="batch = self._rollout(first - self.step)",
        tests="posttraining/test_loop.py::test_a_run_that_was_stopped_continues_to_the_bit",
    ),
    Mutation(
        name="a reward that is no number counts",
        file="deepseek_jax/posttraining/rewards.py",
        old="if not math.isfinite(reward):",
        new="if False:",
        tests="posttraining/test_rewards.py::test_a_reward_that_misbehaves_costs_its_own_answer_and_is_counted",
    ),
    Mutation(
        name="code that ends before its tests has passed them",
        file="deepseek_jax/posttraining/sandbox.py",
        old="return said == word",
        new="return process.returncode == 0",
        tests="posttraining/test_rewards.py::test_code_is_rewarded_for_passing_its_tests",
    ),
]
