"""Mutations of preference pairs and reward models: each breaks one operation, and the tests named must fail."""

from tests.mutations.row import Mutation

DPO, PAIRS, PREFERENCES, REWARD_MODEL = (f"deepseek_jax/posttraining/{name}.py" for name in
                                         ("dpo", "pairs", "preferences", "reward_model"))

MUTATIONS = [
    Mutation(
        name="DPO and reward models learn what was rejected",
        file=DPO,
        old="margin_P = chosen_P - rejected_P",
        new="margin_P = rejected_P - chosen_P",
        tests="posttraining/test_dpo.py",
    ),
    Mutation(
        name="DPO forgets its reference",
        file=DPO,
        old="beta * (policy_P2 - reference_P2)",
        new="beta * policy_P2",
        tests="posttraining/test_dpo.py",
    ),
    Mutation(
        name="the log-probability of an answer has that of its prompt",
        file=DPO,
        old="jnp.where(counted_BT != 0, logprob_BT, 0)",
        new="logprob_BT",
        tests="posttraining/test_dpo.py",
    ),
    Mutation(
        name="half a pair is another pair's",
        file=DPO,
        old=".sum(axis=1).reshape(-1, 2)",
        new=".sum(axis=1).reshape(2, -1).T",
        tests="posttraining/test_dpo.py",
    ),
    Mutation(
        name="filling of held-out batches counts as pairs",
        file=PREFERENCES,
        old="jnp.where(counted_P, x_P, 0).sum()",
        new="x_P.sum()",
        tests="posttraining/test_preferences.py::test_what_stands_behind_an_answer_or_in_rows_without_a_pair_has_no_"
              "loss",
    ),
    Mutation(
        name="pairs weigh as much as their answers have tokens",
        file=PREFERENCES,
        old="normalizers = inputs.normalizers._replace(weight=len(loss_P) / inputs.normalizers.share)",
        new="normalizers = inputs.normalizers",
        tests="posttraining/test_preferences.py::test_a_loss_is_the_mean_over_the_pairs_of_a_step",
    ),
    Mutation(
        name="held-out pairs are trained on",
        file=PAIRS,
        old="if not out],",
        new="],",
        tests="posttraining/test_pairs.py::test_every_epoch_has_each_pair_once_in_another_order_and_no_held_out_one",
    ),
    Mutation(
        name="prompts of pairs are learned",
        file=PAIRS,
        old="weights_BT[b, turn.start:turn.stop] = 1",
        new="weights_BT[b, :turn.stop] = 1",
        tests="posttraining/test_pairs.py::test_a_batch_has_each_pair_in_two_rows_and_counts_the_answers_alone",
    ),
    Mutation(
        name="hosts read the same pairs",
        file=PAIRS,
        old="self.pair(first + (m * self.hosts + self.host) * self.pairs + i)",
        new="self.pair(first + m * self.hosts * self.pairs + i)",
        tests="posttraining/test_pairs.py::test_two_hosts_share_what_one_reads",
    ),
    Mutation(
        name="an answer's reward is read at its first token",
        file=REWARD_MODEL,
        old="jnp.cumsum(counted_BT[:, ::-1], axis=1)[:, ::-1]",
        new="jnp.cumsum(counted_BT, axis=1)",
        tests="posttraining/test_reward_model.py::test_loss_and_gradient_are_those_of_the_oracle",
    ),
    Mutation(
        name="a reward is read from the complete row",
        file=REWARD_MODEL,
        old="jnp.where(last_BT[..., None], hidden_BTD, 0)",
        new="hidden_BTD",
        tests="posttraining/test_reward_model.py::test_a_reward_is_read_at_the_end_of_an_answer_whatever_the_rest_holds",
    ),
    Mutation(
        name="the longest answers are read before they end",
        file=PREFERENCES,
        old="        return config.train.sequence_length\n",
        new="        return config.train.sequence_length + 1\n",
        tests="posttraining/test_reward_model.py::test_a_reward_model_reads_the_last_token_of_the_longest_answer",
    ),
    Mutation(
        name="a policy's answers are scored without their last token",
        file=REWARD_MODEL,
        old="weights_BT[b, first:first + len(made)] = 1",
        new="weights_BT[b, first:first + len(made) - 1] = 1",
        tests="posttraining/test_reward_model.py::test_answers_that_were_drawn_get_the_rewards_that_were_trained",
    ),
    Mutation(
        name="a reward model writes text",
        file="deepseek_jax/workdir.py",
        old='if config.preference.objective == "reward":',
        new="if False:",
        tests="posttraining/test_reward_model.py::test_what_is_no_reward_model_and_what_a_reward_model_is_not_is_one_line",
    ),
    Mutation(
        name="answers that the template opens unlike are a pair",
        file=PAIRS,
        old="if chosen.ids[:chosen.start] != rejected.ids[:rejected.start]:",
        new="if False:",
        tests="posttraining/test_pairs.py::test_answers_that_the_template_opens_unlike_are_refused",
    ),
]
