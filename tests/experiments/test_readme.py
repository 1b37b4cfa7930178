"""The claims tables of docs/claims.md and the README: every number of ours, in its place and with its sign, how many
seeds it is of, and every verdict, against the results of the study that its row names."""

import itertools
import json
import pathlib
import re

import pytest

from experiments.studies.dense.kinds import LONG, STEPS, TOKENS
from experiments.studies.framework.results import paired
from experiments.studies.larger.attention import CACHE as LARGER_CACHE
from experiments.studies.mla.study import CACHE
from experiments.studies.optimizers.arms import RATES, TAU

ROOT = pathlib.Path(__file__).resolve().parents[2]
# A number, and the word behind it that is its sign: "0.014 lower" is -0.014. The 32 of float32 is no number.
NUMBER = re.compile(r"(?<![\w.])([-+]?)(\d+(?:,\d{3})*(?:\.\d+)?(?:e-\d+)?)(?=((?: nats)? lower\b)?)")


def of(metric, arm, times=1):
    """Mean and interval of a metric of an arm."""
    return lambda results: [times * results["arms"][arm]["metrics"][metric][x] for x in ("mean", "low", "high")]


def each(metric, arm):
    """Of every seed, in per cent."""
    return lambda results: [100 * x for x in results["arms"][arm]["metrics"][metric]["seeds"].values()]


def claim(results, metric, arm, against):
    return next(c for c in results["claims"] if (c["metric"], c["arm"], c["against"]) == (metric, arm, against))


def change(*names, times=1):
    """Of a paired difference: `arm` less `against`."""
    return lambda results: [times * claim(results, *names)["difference"][x] for x in ("mean", "low", "high")]


def fall(*names, times=1):
    """The same the other way round: by how much `arm` is lower."""
    return lambda results: [-times * claim(results, *names)["difference"][x] for x in ("mean", "high", "low")]


def fp8_losses(results):
    found = results["settings"]["small_calm"]["compared"]["fp8"]
    return [100 * x for x in (*found["largest"].values(), *(found["largest_mean"][y] for y in ("mean", "low", "high")))]


def fp8_sum(name):
    return lambda results: [100 * results["accumulation"]["cut every 4"][name][x] for x in ("mean", "low", "high")]


def schedules(results):
    mine = {row["schedule"]: row for row in results["rows"]["no overlap gains"] if row["microbatches"] == 32}
    times = [mine[name][part] for name in ("dualpipe", "zb1p", "1f1b") for part in ("idle", "makespan")]
    return [*times, mine["dualpipe"]["ranks"], 32]


VIO, LOSS, FAR = "max_vio_global", "loss", "loss_512_2048"
# claim -> (study, what is ours with # for the numbers, the numbers, the study's claims that its verdict is of)
TABLE = {
    "the bias balances the experts": (
        "load_balance", "# [#, #] against # [#, #]; without either # [#, #]",
        [of(VIO, "loss-free"), of(VIO, "aux 1e-3"), of(VIO, "none")],
        [(VIO, "loss-free", "aux 1e-3"), (VIO, "loss-free", "none")]),
    "... at a lower loss than the auxiliary loss": (
        "load_balance", "# higher [# lower, # higher]", [change(LOSS, "loss-free", "aux 1e-3")],
        [(LOSS, "loss-free", "aux 1e-3")]),
    "MLA learns as well as MHA or better, from a smaller cache": (
        "mla", "# nats [#, #] lower than MHA's, # numbers against #, equal parameters",
        [fall(LOSS, "MLA", "MHA"), CACHE["MLA"], CACHE["MHA"]], [(LOSS, "MLA", "MHA")]),
    "... better than GQA and MQA": (
        "mla", "# [#, #] and # [#, #] lower", [fall(LOSS, "MLA", "GQA"), fall(LOSS, "MLA", "MQA")],
        [(LOSS, "MLA", "GQA"), (LOSS, "MLA", "MQA")]),
    "a mixture learns better than a dense model of as many active parameters": (
        "dense", "# nats [#, #] higher from #M tokens, # [#, #] higher from #M",
        [change(LOSS, "mixture", "active"), STEPS * TOKENS / 1e6, change(LOSS, "mixture, long", "active, long"),
         LONG * STEPS * TOKENS / 1e6], [(LOSS, "mixture", "active"), (LOSS, "mixture, long", "active, long")]),
    "... in as much time as that dense model": (
        "dense", "# nats [#, #] higher: on two cores the dense model makes # steps in the time of its #",
        [change(LOSS, "mixture", "active, equal time"), *(lambda r, arm=arm: [r["arms"][arm]["steps"]]
                                                          for arm in ("active, equal time", "mixture"))],
        [(LOSS, "mixture", "active, equal time")]),
    "a dense model of as many parameters in total learns better than a mixture from as many tokens": (
        "dense", "the mixture # nats [#, #] higher from #M tokens, # [#, #] higher from #M",
        [change(LOSS, "mixture", "total"), STEPS * TOKENS / 1e6, change(LOSS, "mixture, long", "total, long"),
         LONG * STEPS * TOKENS / 1e6], [(LOSS, "mixture", "total"), (LOSS, "mixture, long", "total, long")]),
    "... but worse with as much compute or time": (
        "dense", "the mixture # nats [#, #] and # [#, #] lower",
        [fall(LOSS, "mixture", "total, equal compute"), fall(LOSS, "mixture", "total, equal time")],
        [(LOSS, "mixture", "total, equal compute"), (LOSS, "mixture", "total, equal time")]),
    "MTP drafts a usable second token": (
        "mtp", "# % [#, #] while decoding; on held-out text # % [#, #], a table of bigrams # % [#, #]",
        [of(f"acceptance_{name}", "MTP", 100) for name in ("decoding", "greedy", "bigrams")],
        [("acceptance_over_bigrams", "MTP", 0.0), ("acceptance_decoding", "MTP", 0.85)]),
    "... and makes the main head better": (
        "mtp", "# nats [#, #] lower", [fall(LOSS, "MTP", "none")], [(LOSS, "MTP", "none")]),
    "too slow a bias does not balance in time": (
        "bias_rule", "MaxVio_global at # # [#, #], at # # [#, #]",
        [1e-3, of(VIO, "sign 1e-3"), 5e-3, of(VIO, "sign 5e-3")], [(VIO, "sign 1e-3", "sign 5e-3")]),
    "proportional steps balance better, at a higher loss": (
        "bias_rule", "MaxVio_global # lower [# lower, # higher]; loss # nats higher [# lower, # higher]",
        [change(VIO, "proportional 2e-2", "sign 5e-3"), change(LOSS, "proportional 2e-2", "sign 5e-3")],
        [(VIO, "proportional 2e-2", "sign 5e-3"), (LOSS, "proportional 2e-2", "sign 5e-3")]),
    "many small experts and a shared one beat few large ones": (
        "experts", "# nats [#, #] lower at equal active parameters", [fall(LOSS, "finer, shared", "few large")],
        [(LOSS, "finer, shared", "few large")]),
    "... a shared expert by itself": (
        "experts", "# nats lower [# lower, # higher]", [change(LOSS, "fine, shared", "fine")],
        [(LOSS, "fine, shared", "fine")]),
    "balance inside every sequence keeps experts from specialising": (
        "balance_scope", "specialisation # [#, #] against the bias's # [#, #]",
        [of("specialisation", "sequence-wise"), of("specialisation", "loss-free")],
        [("specialisation", "sequence-wise", "loss-free")]),
    "... and costs loss": (
        "balance_scope", "# nats [#, #] higher than with the bias, # [#, #] higher than over a batch",
        [fall(LOSS, "loss-free", "sequence-wise"), fall(LOSS, "batch-wise", "sequence-wise")],
        [(LOSS, "loss-free", "sequence-wise"), (LOSS, "batch-wise", "sequence-wise")]),
    "limiting nodes saves copies": (
        "routing_limit", "# nodes instead of #: # [#, #] fewer copies a token, of #",
        [2, 8, fall("nodes_per_token", "2 of 8", "8 of 8"), lambda r: of("nodes_per_token", "8 of 8")(r)[:1]],
        [("nodes_per_token", "2 of 8", "8 of 8")]),
    "... and half of the nodes as the limit costs loss": (
        "routing_limit", "# nodes instead of #: # nats lower [# lower, # higher]",
        [4, 8, change(LOSS, "4 of 8", "8 of 8")], [(LOSS, "4 of 8", "8 of 8")]),
    "... one node costs loss": (
        "routing_limit", "# node instead of #: # nats [#, #] higher", [1, 8, change(LOSS, "1 of 8", "8 of 8")],
        [(LOSS, "1 of 8", "8 of 8")]),
    "with 22M parameters the bias balances better than the auxiliary loss": (
        "larger", "# [#, #] against # [#, #]", [of(VIO, "recipe"), of(VIO, "aux 1e-3")],
        [(VIO, "recipe", "aux 1e-3")]),
    "... at a lower loss, with 22M parameters": (
        "larger", "# nats [#, #] higher", [change(LOSS, "recipe", "aux 1e-3")], [(LOSS, "recipe", "aux 1e-3")]),
    "... and MTP makes the main head better": (
        "larger", "# nats [#, #] lower", [fall(LOSS, "MTP", "recipe")], [(LOSS, "MTP", "recipe")]),
    "... and small experts and a shared one beat few large ones": (
        "larger", "# nats [#, #] lower at equal active parameters", [fall(LOSS, "recipe", "few large")],
        [(LOSS, "recipe", "few large")]),
    "... and MLA learns as well as MHA or better": (
        "larger", "# nats [#, #] lower, # numbers against #, equal parameters",
        [fall(LOSS, "recipe", "MHA"), LARGER_CACHE["recipe"], LARGER_CACHE["MHA"]], [(LOSS, "recipe", "MHA")]),
    "past its training length a model loses more than inside it": (
        "long_context",
        "at positions # to #, less # to #, # nats [#, #] more than the same model trained on at # tokens",
        [64, 511, 32, 63, change("past_inside", "64", "512, plain"), 512], [("past_inside", "64", "512, plain")]),
    "YaRN in two phases carries a model to 32 times its length": (
        "long_context", "in # tokens # % [#, #], before # % [#, #]; the same training without YaRN # % [#, #]",
        [2048, *(of("needle_2048", arm, 100) for arm in ("2048, YaRN", "64", "2048, plain"))],
        [("needle_2048", "2048, YaRN", "64"), ("needle_2048", "2048, YaRN", "2048, plain")]),
    "... and lowers the loss of what is far away": (
        "long_context", "# nats [#, #] lower; without YaRN # nats [#, #] lower still",
        [fall(FAR, "2048, YaRN", "64"), change(FAR, "2048, YaRN", "2048, plain")],
        [(FAR, "2048, YaRN", "64"), (FAR, "2048, YaRN", "2048, plain")]),
    "attending to few chosen tokens costs loss far into a text (V3.2)": (
        "sparse_attention", "#, # and # of # tokens: # nats [#, #], # [#, #] and # [#, #]",
        [256, 128, 64, 2048, *(change(FAR, f"k = {k}", "dense") for k in (256, 128, 64))],
        [(FAR, f"k = {k}", "dense") for k in (256, 128, 64)]),
    "... and needles": (
        "sparse_attention", "# tokens find # % [#, #] in #, dense attention # % [#, #]",
        [64, of("needle_2048", "k = 64", 100), 2048, of("needle_2048", "dense", 100)],
        [("needle_2048", "k = 64", "dense")]),
    "... which training with the choice in force lowers": (
        "sparse_attention", "# tokens: # nats lower [# lower, # higher] after # steps",
        [64, change(FAR, "k = 64", "warm-up"), 40], [(FAR, "k = 64", "warm-up")]),
    "the indexer finds what dense attention looks at": (
        "sparse_attention", "its # of # tokens hold # % [#, #] of it, at random # of #",
        [64, 2048, of("recall", "k = 64", 100), 1, 32], [("recall", "k = 64", 1 / 32)]),
    "experts specialise by kind of text while a model trains": (
        "specialization",
        "the choice of an expert carries # bits [#, #] more about the kind of text than a twelfth into the run",
        [change("text_bits_gained", "5e-3, long", 0.0)], [("text_bits_gained", "5e-3, long", 0.0)]),
    "the longer the run, the larger the biases": (
        "specialization", "after # steps instead of # a layer's mean bias, which changes no choice, is # [#, #] "
        "higher, and the biases' spread # [#, #] smaller",
        [900, 300, change("bias_offset", "5e-3, long", "5e-3"), fall("bias_spread", "5e-3, long", "5e-3")],
        [("bias_offset", "5e-3, long", "5e-3"), ("bias_spread", "5e-3, long", "5e-3")]),
    "a fast bias in the first steps balances better in the end": (
        "specialization", "MaxVio_global # lower [# lower, # higher]", [change(VIO, "1e-3, fast start", "1e-3")],
        [(VIO, "1e-3, fast start", "1e-3")]),
    "Muon learns better than AdamW from as many tokens": (
        "optimizers", "# nats [#, #] lower, at #, against AdamW at its best rate",
        [fall(LOSS, "Muon, twice the rate", "AdamW"), RATES["twice"]], [(LOSS, "Muon, twice the rate", "AdamW")]),
    "... and in as much time": (
        "optimizers", "on two cores # nats [#, #] higher, at #",
        [change(LOSS, "Muon, twice the rate, equal time", "AdamW"), RATES["twice"]],
        [(LOSS, "Muon, twice the rate, equal time", "AdamW")]),
    "Muon's attention logits grow larger": (
        "optimizers", "largest at the same rate, #, # [#, #] against AdamW's # [#, #]; at Muon's best, #, # [#, #]",
        [RATES[""], of("max_logit", "Muon"), of("max_logit", "AdamW"), RATES["twice"],
         of("max_logit", "Muon, twice the rate")],
        [("max_logit", "Muon", "AdamW"), ("max_logit", "Muon, twice the rate", "AdamW")]),
    "... and clipping them (QK-clip) costs loss": (
        "optimizers", "at #, clipped at #, half of the largest logit: # nats [#, #] higher",
        [RATES[""], TAU, change(LOSS, "Muon, QK-clip", "Muon")],
        [(LOSS, "Muon, QK-clip", "Muon")]),
    "FP8 trains as bfloat16 does": (
        "fp8", "`small` at the report's learning rate: #, # and # % apart at most, mean # % [#, #]", [fp8_losses],
        None),
    "a tensor core's 14 bits lose much of a sum of 4,096": (
        "fp8", "# % [#, #]; moved to float32 every #: # % [#, #]",
        [fp8_sum("never promoted"), 128, fp8_sum("promoted every 128")], None),
    "GRPO with rewards of rules improves a model that was pre-trained or fine-tuned (5.2)": (
        "post_training",
        "right answers # % [#, #] to # % [#, #] after # steps; fine-tuned # % [#, #] to # % [#, #]",
        [of("reward", "pre-trained", 100), of("reward", "GRPO", 100), 30, of("reward", "fine-tuned", 100),
         of("reward", "fine-tuned, GRPO", 100)],
        [("reward", "GRPO", "pre-trained"), ("reward", "fine-tuned, GRPO", "fine-tuned")]),
    "a small model learns more from a large one's answers than by reinforcement learning (R1)": (
        "post_training", "#, # and # % right against #, # and # %: # points [#, #] more",
        [each("reward", "small, distilled"), each("reward", "small, GRPO"),
         change("reward", "small, distilled", "small, GRPO", times=100)],
        [("reward", "small, distilled", "small, GRPO")]),
    "GRPO learns faster in groups of 16 answers than of 4, from 128 answers a step": (
        "post_training", "right answers, averaged over the # steps: # points [#, #] fewer",
        [30, fall("mean_reward", "groups of 16", "groups of 4", times=100)],
        [("mean_reward", "groups of 16", "groups of 4")]),
    "DualPipe idles less than ZB1P and 1F1B, at PP + 1 activations": (
        "pipeline", "idle # of #, # of # and # of # units of time at # ranks, # micro-batches; exact, computed",
        [schedules], None),
}


def rows():
    """{claim: (study, what is ours, seeds, verdict)} of docs/claims.md."""
    text = (ROOT / "docs" / "claims.md").read_text().split("| claim | report | ours", 1)[1]
    study, found = None, {}
    for line in itertools.takewhile(lambda line: line.startswith("|"), text.splitlines()[2:]):
        says, _, ours, seeds, verdict, command, _ = (cell.strip() for cell in line.strip("|").split("|"))
        named = re.search(r"experiments\.studies\.(\w+)\.run", command)
        study = named.group(1) if named else study  # "the same"
        found[says] = study, ours, seeds, verdict
    return found


ROWS = rows()


def results_of(study):
    return json.loads((ROOT / "experiments" / "studies" / study / "results.json").read_text())


def printed(value, sign, digits):
    """`value` as the table prints it where it prints so many digits."""
    if "e" in digits:
        return f"{value:.0e}".replace("e-0", "e-")
    text = f"{value:{'+' if sign == '+' else ''},.{len(digits.partition('.')[2])}f}"
    return text if "," in digits else text.replace(",", "")


def wrong(ours, wording, figures, results):
    """What is ours, against the results: one line for each thing that differs."""
    if NUMBER.sub("#", ours) != wording:
        return [f"the words are not those of the table in {pathlib.Path(__file__).name}: {NUMBER.sub('#', ours)!r}"]
    values = [x for figure in figures for x in (figure(results) if callable(figure) else [figure])]
    found = NUMBER.findall(ours)
    assert len(values) == len(found)
    should = [printed(-value if lower else value, sign, digits) for value, (sign, digits, lower) in zip(values, found)]
    return [f"{sign}{digits}{lower} should be {right}{lower}" for right, (sign, digits, lower) in zip(should, found)
            if right != sign + digits]


def verdicts(text):
    """The words that decide, each once while it does not change."""
    return [word for word, _ in itertools.groupby(re.findall("reproduced|not visible|contradicted", text))]


def test_every_claim_is_checked_here():
    assert list(ROWS) == list(TABLE) and [row[0] for row in ROWS.values()] == [row[0] for row in TABLE.values()]


def test_the_rows_of_the_readme_are_rows_of_the_claims():
    text = (ROOT / "README.md").read_text().split("| claim | report | ours", 1)[1]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), text.splitlines()[2:]))
    assert len(lines) == 7
    for line in lines:
        says, _, *ours = (cell.strip() for cell in line.strip("|").split("|"))
        assert tuple(ours) == ROWS[says][1:]


@pytest.mark.parametrize("says", TABLE)
def test_every_number_is_that_of_the_results(says):
    study, wording, figures, _ = TABLE[says]
    assert wrong(ROWS[says][1], wording, figures, results_of(study)) == []


@pytest.mark.parametrize("says", [says for says, row in TABLE.items() if row[3]])
def test_every_verdict_is_that_of_the_results(says):
    study, _, _, claims = TABLE[says]
    results = results_of(study)
    assert verdicts(ROWS[says][3]) == verdicts("; ".join(claim(results, *names)["verdict"] for names in claims))


@pytest.mark.parametrize("says", TABLE)
def test_as_many_seeds_are_said_as_there_are(says):
    study, _, _, claims = TABLE[says]
    results = results_of(study)
    seeds = [len(paired(results, claim(results, *names))) for names in claims or ()]
    if study == "fp8":
        largest = results["settings"]["small_calm"]["compared"]["fp8"]["largest"]
        seeds = [len(largest if "bfloat16" in says else results["config"]["seeds"])]
    assert ROWS[says][2] == " and ".join(map(str, sorted(set(seeds))))


@pytest.mark.parametrize("says", TABLE)
def test_another_digit_anywhere_would_be_noticed(says):
    study, wording, figures, _ = TABLE[says]
    ours, results = ROWS[says][1], results_of(study)
    for found in NUMBER.finditer(ours):
        end = found.end(2)
        other = f"{ours[:end - 1]}{(int(ours[end - 1]) + 1) % 10}{ours[end:]}"
        assert len(wrong(other, wording, figures, results)) == 1, other


def test_another_sign_or_direction_would_be_noticed():
    ours = "0.007 nats lower [0.014 lower, 0.0004 higher]"
    wording = "# nats lower [# lower, # higher]"
    for figures, right in (([-0.0066, -0.0138, 0.0004], True), ([0.0066, -0.0138, 0.0004], False),
                           ([-0.0066, 0.0138, 0.0004], False), ([-0.0066, -0.0138, -0.0004], False)):
        assert (wrong(ours, wording, figures, {}) == []) == right, figures
    assert wrong(ours.replace("nats lower", "nats higher"), wording, [-0.0066, -0.0138, 0.0004], {})
    assert wrong("+0.008 [-0.020, +0.036]", "# [#, #]", [0.008, -0.020, 0.036], {}) == []
    assert len(wrong("+0.008 [-0.020, +0.036]", "# [#, #]", [-0.008, 0.020, -0.036], {})) == 3
