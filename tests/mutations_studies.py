"""Mutations of the studies' runner; `tests/mutations.py` joins them."""

STATISTICS, STUDY, RUNNER, TRAINING = (f"experiments/studies/common/{name}.py"
                                       for name in ("statistics", "study", "runner", "training"))
FAR, FP8_STUDY = "experiments/studies/long_context/measure.py", "experiments/studies/fp8/run.py"
T_STATISTICS, T_STUDIES = "experiments/test_statistics.py", "experiments/test_studies.py"

MUTATIONS = [
    ("studies: a normal quantile for three seeds", STATISTICS, "student.ppf(0.975, len(values) - 1)", "1.96",
     T_STATISTICS),
    ("studies: the spread of the sample, not of the population", STATISTICS, "values.std(ddof=1)", "values.std()",
     T_STATISTICS),
    ("studies: a mean is as uncertain as a seed", STATISTICS, " / math.sqrt(len(values))", "", T_STATISTICS),
    ("studies: one seed is certain", STATISTICS, "Estimate(mean, -math.inf, math.inf)", "Estimate(mean, mean, mean)",
     T_STATISTICS),
    ("studies: seeds are compared in any order", STATISTICS, "ours[seed] - theirs[seed] for seed in sorted(ours.keys() "
     "& theirs.keys())", "a - b for a, b in zip(ours.values(), theirs.values())", T_STATISTICS),
    ("studies: an interval that touches zero decides", STATISTICS, "found.high < 0, found.low > 0",
     "found.high <= 0, found.low >= 0", T_STATISTICS),
    ("studies: the mean alone decides", STATISTICS, "found.high < 0, found.low > 0", "found.mean < 0, found.mean > 0",
     T_STATISTICS),
    ("studies: any clear difference is a success", STATISTICS, 'if below == (expected == "lower") else CONTRADICTED',
     "", T_STATISTICS),
    ("studies: the hash forgets the config", STUDY, "parts = [config, self.probe",
     "parts = [arm, self.probe", T_STUDIES),
    ("studies: all seeds are the first", TRAINING, "self.start(jax.random.key(seed), ",
     "self.start(jax.random.key(0), ",
     T_STUDIES),
    ("studies: arms of a seed start apart", TRAINING, "self.start(jax.random.key(seed), ",
     "self.start(jax.random.key(seed + 100 * [*self.study.arms].index(self.arm)), ", T_STUDIES),
    ("studies: finished runs are run again", RUNNER,
     "[s for s in seeds if not result_path(study, arm, s, quick, folder).exists()]", "list(seeds)", T_STUDIES),
    ("studies: a phase begins anew", TRAINING, "first and load(self._weights(first, seed))", "None", T_STUDIES),
    ("studies: a phase does not know where it comes from", STUDY, "if arm in self.after:\n            parts",
     "if False:\n            parts", T_STUDIES),
    ("studies: all phases at once", STUDY, "1 + depth(self.after[arm]) if arm in self.after else 0", "0", T_STUDIES),
    ("long context: the needle is always at the beginning", FAR, "at = int(depth * room)", "at = 0", T_STUDIES),
    ("long context: any secret will do", FAR, "(np.concatenate(best) == answer_N)", "(np.concatenate(best) > 0)",
     T_STUDIES),
    ("fp8 study: the warm-up counts", FP8_STUDY, "x[min(int(study.WARM_UP * steps), len(x) - 1):]", "x", T_STUDIES),
    ("fp8 study: any seed of bfloat16", FP8_STUDY, 'smoothed(curves["bf16"][seed]) - 1, len(curve))',
     'smoothed(curves["bf16"][0]) - 1, len(curve))', T_STUDIES),
]
