"""Mutations of studies: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="the room that a capacity leaves counts as work",
        file="experiments/studies/pipeline/overlap.py",
        old="flops / CAPACITY if one <= flops",
        new="flops if one <= flops",
        tests="experiments/test_overlap.py",
    ),
    Mutation(
        name="studies: a normal quantile for three seeds",
        file="experiments/studies/framework/statistics.py",
        old="student.ppf(0.975, len(values) - 1)",
        new="1.96",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: the spread of the sample, not of the population",
        file="experiments/studies/framework/statistics.py",
        old="values.std(ddof=1)",
        new="values.std()",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: a mean is as uncertain as a seed",
        file="experiments/studies/framework/statistics.py",
        old=" / math.sqrt(len(values))",
        new="",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: one seed is certain",
        file="experiments/studies/framework/statistics.py",
        old="Estimate(mean, -math.inf, math.inf)",
        new="Estimate(mean, mean, mean)",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: seeds are compared in any order",
        file="experiments/studies/framework/statistics.py",
        old="ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())",
        new="a - b for a, b in zip(ours.values(), theirs.values())",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: an interval that touches zero decides",
        file="experiments/studies/framework/statistics.py",
        old="found.high < 0, found.low > 0",
        new="found.high <= 0, found.low >= 0",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: the mean alone decides",
        file="experiments/studies/framework/statistics.py",
        old="found.high < 0, found.low > 0",
        new="found.mean < 0, found.mean > 0",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: any clear difference is a success",
        file="experiments/studies/framework/statistics.py",
        old='if below == (expected == "lower") else CONTRADICTED',
        new="",
        tests="experiments/test_statistics.py",
    ),
    Mutation(
        name="studies: the hash forgets the config",
        file="experiments/studies/framework/training.py",
        old="parts = [config, _name(self.probe)",
        new="parts = [arm, _name(self.probe)",
        tests="experiments/test_studies.py::test_the_hash_of_an_arm_follows_its_config_and_not_its_seed",
    ),
    Mutation(
        name="studies: all seeds are the first",
        file="experiments/studies/framework/training.py",
        old="self.start(jax.random.key(seed), ",
        new="self.start(jax.random.key(0), ",
        tests=(
            "experiments/test_studies.py::test_a_seed_begins_every_arm_with_the_same_weights_and_another_seed_with_others"),
    ),
    Mutation(
        name="studies: arms of a seed start apart",
        file="experiments/studies/framework/training.py",
        old="self.start(jax.random.key(seed), ",
        new="self.start(jax.random.key(seed + 100 * [*study.arms].index(arm)), ",
        tests=(
            "experiments/test_studies.py::test_a_seed_begins_every_arm_with_the_same_weights_and_another_seed_with_others"),
    ),
    Mutation(
        name="studies: runs of another source are taken",
        file="experiments/studies/framework/runner.py",
        old='if found.get("code") == code]',
        new="]",
        tests="experiments/test_studies.py::test_runs_of_another_source_are_measured_again",
    ),
    Mutation(
        name="studies: comments are source",
        file="experiments/studies/framework/source.py",
        old="node.body = node.body[1:]",
        new="pass",
        tests="experiments/test_studies.py::test_the_source_of_a_run_is_all_that_it_imports_and_no_comment_of_it",
    ),
    Mutation(
        name="studies: finished runs are run again",
        file="experiments/studies/framework/runner.py",
        old="[seed for seed in seeds if (arm, seed) not in taken]",
        new="list(seeds)",
        tests="experiments/test_studies.py::test_what_is_finished_is_not_run_again",
    ),
    Mutation(
        name="studies: a phase begins anew",
        file="experiments/studies/framework/training.py",
        old="load(self._weights(after[arm], seed)) if arm in after else None",
        new="None",
        tests="experiments/test_studies.py::test_an_arm_begins_with_the_weights_of_the_one_it_comes_after",
    ),
    Mutation(
        name="studies: a phase does not know where it comes from",
        file="experiments/studies/framework/training.py",
        old=(
            "if arm in self.after:\n"
            "            parts"),
        new=(
            "if False:\n"
            "            parts"),
        tests="experiments/test_studies.py::test_arms_run_in_waves_and_know_what_they_come_after",
    ),
    Mutation(
        name="studies: all phases at once",
        file="experiments/studies/framework/study.py",
        old="1 + depth(after[arm]) if arm in after else 0",
        new="0",
        tests="experiments/test_studies.py::test_arms_run_in_waves_and_know_what_they_come_after",
    ),
    Mutation(
        name="long context: the needle is always at the beginning",
        file="experiments/studies/long_context/measure.py",
        old="at = int(depth * room)",
        new="at = 0",
        tests="experiments/test_studies.py::test_a_needle_is_told_once_at_its_depth_and_asked_for_at_the_end",
    ),
    Mutation(
        name="long context: any secret will do",
        file="experiments/studies/long_context/measure.py",
        old="(np.concatenate(best) == answer_N)",
        new="(np.concatenate(best) > 0)",
        tests=(
            "experiments/test_studies.py::test_a_model_that_looks_back_finds_every_needle_and_one_that_does_not_finds_few"),
    ),
    Mutation(
        name="fp8 study: the warm-up counts",
        file="experiments/studies/fp8/study.py",
        old="x[min(int(WARM_UP * steps), len(x) - 1):]",
        new="x",
        tests="experiments/test_studies.py::test_fp8_is_compared_with_bfloat16_of_the_same_seed_after_warm_up",
    ),
    Mutation(
        name="fp8 study: any seed of bfloat16",
        file="experiments/studies/fp8/study.py",
        old="smoothed(baseline[seed]) - 1, len(curve))",
        new="smoothed(baseline[0]) - 1, len(curve))",
        tests="experiments/test_studies.py::test_fp8_is_compared_with_bfloat16_of_the_same_seed_after_warm_up",
    ),
    Mutation(
        name="a shared axis is inverted twice",
        file="experiments/studies/framework/plots.py",
        old="axis.set_ylim(max(len(labels), 1) - 0.4, -0.6)",
        new="axis.invert_yaxis()",
        tests="experiments/test_pictures.py",
    ),
    Mutation(
        name="the MTP module is one more MoE layer",
        file="deepseek_jax/plots/training.py",
        old="range(L - modules)]",
        new="range(L)]",
        tests="plots/test_training.py",
    ),
    Mutation(
        name="an evaluation of a part is drawn like one of all",
        file="deepseek_jax/plots/training.py",
        old="(row.get(\"eval_share\") or 1) < 1",
        new="False",
        tests="plots/test_training.py",
    ),
    Mutation(
        name="wrong answers of a teacher are lessons",
        file="experiments/studies/post_training/measure.py",
        old="for row in answered if row.answer is not None))",
        new="for row in answered))",
        tests="experiments/test_post_training.py::test_a_student_reads_what_its_teacher_had_right_and_begins_small",
    ),
    Mutation(
        name="half a run of post_training counts as one",
        file="experiments/studies/post_training/measure.py",
        old="if not finished:",
        new="if False:",
        tests="experiments/test_post_training.py::test_a_run_that_a_signal_ended_is_no_run_of_the_study",
    ),
]
