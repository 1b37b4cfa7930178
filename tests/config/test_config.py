"""Configs: an impossible one gives one line that names what would work; others are frozen and are read back unchanged.
"""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_jax import config as configs
from deepseek_jax.config import Config, ConfigError, TrainConfig, Yarn, as_dict, default_config, freeze, model_config

CONFIG_FILE = """
from deepseek_jax.config import default_config

def get_config():
    config = default_config("tiny")
    config.train.steps = 12
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(CONFIG_FILE)
    return str(path)


def assert_one_line(error, *parts):
    message = str(error.value)
    assert "\n" not in message and message, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(experts_per_token=17), "experts_per_token=17 asks for more than the 16 experts that the 2 kept groups"),
        (dict(experts_per_tokens=4), "unknown config key model.experts_per_tokens; did you mean experts_per_token?"),
        (dict(num_groups=5), "num_groups=5 does not divide num_experts=32; take one of [1, 2, 4, 8, 16, 32]"),
        (dict(num_groups=2, groups_kept=3), "groups_kept=3 is more than num_groups=2"),
        (dict(num_groups=32, groups_kept=16), "take at most 16 groups"),
        (dict(num_dense_layers=5), "num_dense_layers=5 is more than num_layers=4"),
        (dict(num_dense_layers=-1), "num_dense_layers=-1 cannot be negative"),
        (dict(rope_head_dim=15), "rope_head_dim=15 must be even"),
        (dict(d_model=0), "d_model=0 must be positive"),
        (dict(d_model=2**20 + 1), "d_model=1048577 is more than 1,048,576, the most there may be"),
        (dict(num_experts=10**9, num_groups=3), "num_experts=1000000000 is more than 16,384"),
        (dict(num_layers=4096, num_experts=16384, num_groups=1, groups_kept=1), "more than 1,048,576"),
        (dict(yarn=Yarn(), rope_theta=1.0), "rope_theta=1 must be more than 1"),
        (dict(route_scale=0.0), "route_scale=0.0 must be positive"),
        (dict(q_rank=0), "q_rank=0 must be positive, or None"),
        (dict(mtp_depth=-1), "mtp_depth=-1 cannot be negative; 0 leaves it out"),
        (dict(remat="latents,norm"), "'norm' is unknown; take none, report or full, or names"),
        (dict(score="tanh"), "score='tanh' is unknown; take one of 'sigmoid', 'softmax'"),
        (dict(router_bias="subtractive"), "router_bias='subtractive' is unknown"),
        (dict(dtype="float16"), "dtype='float16' is unknown"),
        (dict(remat="some"), "remat='some' is unknown"),
        (dict(d_model="64"), "model.d_model='64' should be int, not str"),
        (dict(d_model=64.5), "model.d_model=64.5 should be int, not float"),
        (dict(d_model=True), "model.d_model=True should be int, not bool"),
        (dict(d_model=None), "model.d_model cannot be None"),
        (dict(normalize_gates=1), "model.normalize_gates=1 should be bool, not int"),
        (dict(score=None), "model.score cannot be None"),
        (dict(rope_theta=float("nan")), "model.rope_theta=nan should be a finite number"),
        (dict(yarn=dict(factor=0)), "model.yarn.factor=0.0 must be positive"),
        (dict(yarn=dict(fakter=2)), "unknown config key model.yarn.fakter; did you mean factor?"),
        (dict(yarn="long"), "model.yarn='long' should be a section with keys, not a single value"),
    ],
)
def test_an_impossible_model_says_what_would_work(overrides, message):
    with pytest.raises(ConfigError) as error:
        model_config("tiny", **overrides)
    assert_one_line(error, message)


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", dict(accumulation_steps=3),
         "accumulation_steps=3 does not divide batch_size=8; take one of [1, 2, 4, 8]"),
        ("train", dict(steps=0), "train.steps=0 must be positive"),
        ("train", dict(batch_size=-8), "train.batch_size=-8 must be positive"),
        ("train", dict(accumulation_steps=4, ramp_from=3), "train.ramp_from=3 must be a multiple of the 2 sequences"),
        ("train", dict(accumulation_steps=4, ramp_from=3), "and at most batch_size=8; take train.accumulation_steps=8"),
        ("train", dict(ramp_from=16), "at most batch_size=8"),
        ("train", dict(ema_decay=1.0), "train.ema_decay=1.0 must lie in [0, 1)"),
        ("optimizer", dict(warmup=0.9), "0 <= warmup <= constant_until"),
        ("optimizer", dict(learning_rate=0.0), "must be positive"),
        ("optimizer", dict(moment_dtype="int8"), "optimizer.moment_dtype='int8' is unknown"),
        ("optimizer", dict(kind="lion"), "optimizer.kind='lion' is unknown"),
        ("optimizer", dict(qk_clip=0.0), "optimizer.qk_clip=0.0 must be positive, or None"),
        ("balance", dict(bias_rule="random"), "balance.bias_rule='random' is unknown"),
        ("train", dict(steps="many"), "train.steps='many' should be int, not str"),
        ("train", dict(steps=10.5), "train.steps=10.5 should be int, not float"),
        ("train", dict(steps=True), "train.steps=True should be int, not bool"),
        ("train", dict(sample_prompt=3), "train.sample_prompt=3 should be str, not int"),
        ("train", dict(seed=None), "train.seed cannot be None"),
        ("train", dict(mtp_weights=0.3), "train.mtp_weights=0.3 should be a tuple of pairs, such as ((0.0, 0.3)"),
        ("data", dict(mask_documents="yes"), "data.mask_documents='yes' should be bool, not str"),
        ("data", dict(sources="stdlib"), "data.sources='stdlib' should be a tuple of pairs"),
        ("train", dict(step=3), "unknown config key train.step; did you mean steps?"),
        ("model", dict(yarn=dict(factors=40.0)), "unknown config key model.yarn.factors; did you mean factor?"),
        ("model", dict(yarn=40.0), "model.yarn=40.0 should be a section with keys"),
        ("data", dict(fim_rate=1.5), "data.fim_rate=1.5 must lie in [0, 1]"),
        ("data", dict(split_punctuation_rate=-0.1), "data.split_punctuation_rate=-0.1 must lie in [0, 1]"),
        ("data", dict(validation_fraction=0), "data.validation_fraction=0.0 must lie between 0 and 1"),
        ("data", dict(validation_fraction=1), "data.validation_fraction=1.0 must lie between 0 and 1"),
        ("data", dict(validation_tokens=0), "data.validation_tokens=0 must be positive, or None"),
        ("data", dict(prefetch=-1), "data.prefetch=-1 cannot be negative"),
        ("data", dict(sources=[]), "data.sources is empty"),
        ("data", dict(sources=[("", 1)]), "data.sources: ('', 1.0) must be a path and a positive weight"),
        ("data", dict(sources=[("a", -1)]), "must be a path and a positive weight"),
        ("data", dict(sources=[("a", 1), ("b", 1), ("a", 2)]), "data.sources names 'a' twice; name it once"),
        ("data", dict(sources=[("a", float("inf"))]), "data.sources[0][1]=inf should be a finite number"),
        ("data", dict(sources=[("a", 1, 2)]), "should be a tuple of pairs"),
        ("data", dict(sources=[("a", 1), ("b", 0)]), "data.sources: ('b', 0.0) must be a path and a positive weight"),
        ("data", dict(sources=[("a", 1e308), ("b", 1e308)]), "('a', 1e+308) has no share of a sum of inf"),
        ("data", dict(sources=[("a", 1e200), ("b", 1e-200)]), "('b', 1e-200) has no share of a sum of 1e+200"),
        ("data", dict(sources=[("a", 1), ("b", 1)], stages=[(5, [("a", 1e308), ("b", 1e308)])]), "a sum of inf"),
        ("data", dict(sources=[("a", 0)], stages=[(5, [("a", 1)])]), "data.sources: all weights are 0"),
        ("data", dict(stages=3), "data.stages=3 should be a tuple of pairs."),
        ("data", dict(stages=[(5, "stdlib")]), "data.stages[0][1]='stdlib' should be a tuple of pairs."),
        ("data", dict(stages=[(5, [("stdlib", 1, 2)])]), "data.stages[0][1]=[('stdlib', 1, 2)] should"),
        ("data", dict(stages=[(0.5, [("stdlib", 1)])]), "data.stages[0][0]=0.5 should be int, not float"),
        ("data", dict(stages=[(9, [("stdlib", 1)]), (5, [("stdlib", 1)])]), "data.stages begin at the steps 9, 5"),
        ("data", dict(stages=[(5, [("stdlib", 1)]), (5, [("stdlib", 2)])]), "data.stages begin at the steps 5, 5"),
        ("data", dict(stages=[(0, [("stdlib", 1)])]), "begin at the steps 0; they must ascend, from 1 on"),
        ("data", dict(stages=[(5, [])]), "data.stages: from step 5 on nothing is read; give (path, weight) pairs"),
        ("data", dict(stages=[(5, [("docs", 1)])]), "from step 5 on, 'docs' is none of data.sources; known"),
        ("data", dict(stages=[(5, [("stdlib", 0)])]), "from step 5 on, ('stdlib', 0.0) must have a positive weight"),
        ("data", dict(stages=[(5, [("stdlib", 1), ("stdlib", 1)])]), "from step 5 on, 'stdlib' is named twice"),
        ("optimizer", dict(learning_rate=float("nan")), "optimizer.learning_rate=nan should be a finite number"),
        ("optimizer", dict(learning_rate=10**400), "optimizer.learning_rate has 401 digits, too many"),
        ("optimizer", dict(b1=1.0), "optimizer.b1=1.0 must lie in [0, 1)"),
        ("optimizer", dict(b2=-0.1), "optimizer.b2=-0.1 must lie in [0, 1)"),
        ("optimizer", dict(weight_decay=-1), "optimizer.weight_decay=-1.0 cannot be negative"),
        ("optimizer", dict(clip_norm=0), "optimizer.clip_norm=0.0 must be positive"),
        ("balance", dict(bias_speed=-0.1), "balance.bias_speed=-0.1 cannot be negative"),
        ("balance", dict(bias_until=1.1), "balance.bias_until=1.1 must lie in [0, 1]"),
        ("balance", dict(sequence_loss_weight=-1.0), "balance.sequence_loss_weight=-1.0 cannot be negative"),
        ("balance", dict(aux_loss_weight=-1.0), "balance.aux_loss_weight=-1.0 cannot be negative"),
        ("train", dict(ramp_until=2.0), "train.ramp_until=2.0 must lie in [0, 1]"),
        ("train", dict(ramp_from=0), "train.ramp_from=0 must be positive, or None"),
        ("train", dict(eval_batches=-1), "train.eval_batches=-1 cannot be negative"),
        ("train", dict(sample_tokens=-1), "train.sample_tokens=-1 cannot be negative"),
        ("train", dict(seed=-1), "train.seed=-1 must lie in [0, 2^32)"),
        ("train", dict(mtp_weights=[(0.5, 0.3), (0.2, 0.1)]), "ascending in [0, 1]"),
        ("train", dict(mtp_weights=[(0.0, -0.3)]), "a weight that is not negative"),
        ("train", dict(mtp_weights=[("start", 0.3)]), "train.mtp_weights[0][0]='start' should be float, not str"),
        ("init", {"from": 3}, "init.from=3 should be str, not int"),
    ],
)
def test_an_impossible_run_says_what_would_work(section, changes, message):
    config = as_dict(Config(model=model_config("tiny")))
    config[section] |= changes
    with pytest.raises(ConfigError) as error:
        freeze(config)
    assert_one_line(error, message)


@pytest.mark.parametrize(
    ("optimizer", "others", "unfit"),
    [
        ({"kind": "muon"}, {"lora": {"rank": 4}, "init": {"from": "run"}}, "those of lora.rank=4; take --config.opt"),
        ({"kind": "muon"}, {"model": {"attention": "own:MLA", "router": "own:route"}},
         "those of model.attention='own:MLA'; take --config.optimizer.kind=adamw"),
        ({"qk_clip": 100.0}, {"model": {"attention": "own:MLA"}}, "not with model.attention='own:MLA'; take --config"),
        ({"qk_clip": 100.0}, {"model": {"index_topk": 8}}, "optimizer.qk_clip=100 measures the logits of MLA"),
        ({"qk_clip": 100.0}, {"mesh": {"context": 2}}, "in one stage, not with mesh.context=2; take --config"),
        ({"qk_clip": 100.0}, {"mesh": {"pipe": 2}}, "not with mesh.pipe=2; take --config.optimizer.qk_clip=None"),
        ({"qk_clip": 100.0}, {"preference": {"objective": "dpo"}, "init": {"from": "run"}},
         "the objective of preference.objective=dpo measures no logits; take --config.optimizer.qk_clip=None"),
        ({"qk_clip": 100.0}, {"distill": {"from": "run"}}, "the objective of distill.from=run measures no logits"),
    ])
def test_an_optimizer_that_does_not_know_a_part_is_refused_by_its_name(optimizer, others, unfit):
    config = as_dict(Config(model=model_config("tiny")))
    for section, changes in {"optimizer": optimizer, **others}.items():
        config[section] |= changes
    with pytest.raises(ConfigError) as error:
        freeze(config)
    assert unfit in str(error.value) and "\n" not in str(error.value)


def test_logits_are_clipped_and_muon_trains_whatever_the_routing_rule_is():
    config = as_dict(Config(model=model_config("tiny")))
    config["optimizer"] |= {"qk_clip": 100.0, "kind": "muon"}
    config["model"] |= {"router": "own:route"}
    assert freeze(config).optimizer.qk_clip == 100 and freeze(config).optimizer.kind == "muon"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.stepz=5", "unknown config key train.stepz; did you mean steps?"),
        ("--config.trian.steps=5", "unknown config key trian; did you mean train?"),
        ("--config.train.steps.more=5", "train.steps=12 is a single value, so there is no train.steps.more"),
        ("--config.model.yarn.factor=8", "model.yarn is None in this config; give all of it: "
                                         "--config.model.yarn=\"{'factor': 8}\""),
        ("--config.model.yarn.original.factor=8", "model.yarn is None in this config"),
        ("--config.data.sources={[]: 1}", "data.sources='{[]: 1}' should be a tuple of pairs"),
        ("--config.data.sources=()", "data.sources is empty; give (path, weight) pairs"),
        ("--config.data.sources=[('a', 'b')]", "data.sources[0][1]='b' should be float, not str"),
        ("--config.data.sources=[('a', 0)]", "data.sources: ('a', 0.0) must be a path and a positive weight"),
        ("--config.data.sources=[(1, 1)]", "data.sources[0][0]=1 should be str, not int"),
        ("--config.train.mtp_weights=((0.5,0.3),(0.1,0.1))", "ascending in [0, 1]"),
        ("--config.train.mtp_weights=((0,None),)", "train.mtp_weights[0][1] cannot be None"),
        ("--config.train=None", "train cannot be None"),
        ("--config.=3", "unknown config key ; known are:"),
        ("--config.optimizer.learning_rate=1e999", "optimizer.learning_rate=inf should be a finite number"),
        ("--config.train.steps", "cannot read '--config.train.steps'; overrides look like --config.train.steps=50"),
        ("--train.steps=5", "cannot read '--train.steps=5'"),
        ("--config.train.steps=five", "train.steps='five' should be int, not str"),
        ("--config.model.num_groups=3", "num_groups=3 does not divide num_experts=32"),
        ("--config.model=small", "model='small' should be a section with keys"),
    ],
)
def test_an_override_that_cannot_work_names_the_nearest_that_does(config_file, override, message):
    with pytest.raises(ConfigError) as error:
        configs.load_config(config_file, [override])
    assert_one_line(error, message)


@pytest.mark.parametrize("name", ["tinny", "v3", "671b", ""])
def test_an_unknown_model_is_answered_with_the_known_ones(name):
    with pytest.raises(ConfigError) as error:
        model_config(name)
    assert_one_line(error, f"unknown model {name!r}", "v3_671b" if name in ("v3", "671b", "") else "tiny")


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(ConfigError) as error:
        configs.load_config(str(tmp_path / "absent.py"))
    assert_one_line(error, "absent.py", "take one of", "grpo_reverse", "tiny")
    with pytest.raises(ConfigError) as error:
        configs.load_config("grpo_revers")
    assert_one_line(error, "no config file grpo_revers; did you mean grpo_reverse?")


@pytest.mark.parametrize("config", [None, {}, [], 3, {"train": {}}, {1: 2}])
def test_what_is_no_config_is_refused_in_one_line(config):
    with pytest.raises(ConfigError) as error:
        freeze(config)
    assert_one_line(error)


WRONG_VALUES = (None, True, -1, 0, 1, 3, 2.5, -0.5, float("nan"), float("inf"), 1e300, "", "word", "two\nlines", b"x",
                (), [], {}, [[]], [["a", 1]], [[0.5, 1]], {"factor": 2}, {"a": {}}, object(), [float("nan")])


@pytest.mark.parametrize("section", ["model", "data", "train", "optimizer", "balance", "init"])
def test_any_value_at_any_key_gives_a_config_or_one_line(section):
    plain = as_dict(Config(model=model_config("tiny", yarn={})))
    refused = 0
    for key, value in ((key, value) for key in plain[section] for value in WRONG_VALUES):
        try:
            made = freeze(plain | {section: plain[section] | {key: value}})
        except ConfigError as error:
            refused += 1
            assert f"{section}" in str(error) and len(str(error).splitlines()) == 1, (key, value, str(error))
        else:
            assert freeze(json.loads(json.dumps(as_dict(made)))) == made, (key, value)
    assert refused > len(WRONG_VALUES) * len(plain[section]) / 3


def test_sections_check_themselves_however_they_are_made():
    with pytest.raises(ConfigError) as error:
        TrainConfig(steps="ten")
    assert_one_line(error, "train.steps='ten' should be int, not str")
    assert configs.ModelConfig(yarn={"factor": 8}).yarn == configs.Yarn(factor=8.0)
    assert configs.DataConfig(sources=[["a", 1]]).sources == (("a", 1.0),)


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("def get_config(:", ["experiment.py", "SyntaxError", "line 1"]),
        ("import no_such_module", ["experiment.py, line 1: ModuleNotFoundError", "no_such_module"]),
        (CONFIG_FILE.replace("config.train", "config.tarin"),
         ["experiment.py, line 6: unknown config key tarin; did you mean train?"]),
        (CONFIG_FILE.replace("train.steps", "train.stepz"), ["unknown config key train.stepz; did you mean steps?"]),
        (CONFIG_FILE.replace("train.steps = 12", "model.yarn.factor = 2"), ["experiment.py, line 6", "NoneType"]),
        (CONFIG_FILE.replace('"tiny"', '"tinny"'), ["unknown model 'tinny'; did you mean tiny?"]),
        (CONFIG_FILE.replace("return config", ""), ["experiment.py gave None; it must return"]),
        ("get_config = 3", ["experiment.py: TypeError", "not callable"]),
        ("def get_config(name):\n    return name", ["experiment.py: TypeError", "missing 1 required"]),
        ("raise ValueError('two\\nlines')", ["experiment.py, line 1: ValueError: two lines"]),
        ("raise SystemExit(5)", ["experiment.py, line 1: SystemExit: 5"]),
        (CONFIG_FILE.replace("config.train.steps = 12", "config.train.steps = config.train.micro_batches"),
         ["experiment.py, line 6: train.micro_batches is now train.accumulation_steps"]),
    ],
)
def test_a_config_file_that_fails_is_named_with_its_line(tmp_path, monkeypatch, body, parts):
    (tmp_path / "experiment.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "experiment.py"), "experiment.py"):
        with pytest.raises(ConfigError) as error:
            configs.load_config(path)
        assert_one_line(error, *parts)


def test_a_config_file_that_is_not_python_is_named(tmp_path):
    (tmp_path / "experiment.txt").write_text("{}")
    with pytest.raises(ConfigError) as error:
        configs.load_config(str(tmp_path / "experiment.txt"))
    assert_one_line(error, "experiment.txt is no Python file; a config file ends in .py")


@pytest.mark.parametrize("name", ["tiny", "v3_671b"])
def test_a_config_of_the_package_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = configs.load_config(name, ["--config.train.steps=7"])
    assert config.model == model_config(name) and config.train.steps == 7


def test_the_config_of_a_run_is_a_config(tmp_path):
    config = configs.load_config("tiny", ["--config.train.steps=7", "--config.data.sources=(('x', 2.0),)"])
    (tmp_path / "config.json").write_text(json.dumps(as_dict(config)))
    assert configs.load_config(str(tmp_path / "config.json")) == config
    assert configs.load_config(str(tmp_path / "config.json"), ["--config.train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(("text", "part"), [
    ("{", "is not JSON"), ("[]", "is no config of a run; a work directory's config.json is one"),
    ('{"model_type": "deepseek_v3"}', "it is a Hugging Face checkpoint's: python -m deepseek_jax.convert from-hf"),
])
def test_another_json_file_is_named(tmp_path, text, part):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError) as error:
        configs.load_config(str(tmp_path / "config.json"))
    assert_one_line(error, "config.json", part)


def test_a_config_file_without_get_config_is_named(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ConfigError) as error:
        configs.load_config(str(tmp_path / "empty.py"))
    assert_one_line(error, "does not define get_config()")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("--config.train.steps=50", lambda c: c.train.steps, 50),
        ("--config.optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate, 1e-3),
        ("--config.optimizer.weight_decay=1", lambda c: c.optimizer.weight_decay, 1.0),
        ("--config.init.from=DIR", lambda c: c.init.from_, "DIR"),
        ("--config.model.q_rank=None", lambda c: c.model.q_rank, None),
        ("--config.data.mask_documents=True", lambda c: c.data.mask_documents, True),
        ("--config.train.sample_prompt=a = b", lambda c: c.train.sample_prompt, "a = b"),
        ("--config.data.sources=[('docs/*.txt', 2)]", lambda c: c.data.sources, (("docs/*.txt", 2.0),)),
        ("--config.model.yarn={'factor': 8}", lambda c: c.model.yarn.factor, 8.0),
    ],
)
def test_overrides_reach_the_frozen_config(config_file, override, read, value):
    config = configs.load_config(config_file, [override])
    assert read(config) == value and type(read(config)) is type(value)


@pytest.mark.parametrize("override", ["--config.train.micro_batches=4", "--config.train.accumulation_steps=4"])
def test_a_key_of_an_earlier_version_is_its_present_one(tmp_path, override):
    path = tmp_path / "config.py"
    path.write_text("from deepseek_jax.config import default_config\n\n\ndef get_config():\n"
                    "    c = default_config('tiny')\n    c.train.micro_batches = 2\n    return c\n")
    assert configs.load_config(str(path)).train.accumulation_steps == 2
    assert configs.load_config(str(path), [override]).train.accumulation_steps == 4
    written = {"model": as_dict(model_config("tiny")), "train": {"micro_batches": 2}}
    assert freeze(written).train.accumulation_steps == 2
    assert written["train"] == {"micro_batches": 2}


def test_a_run_from_before_the_latents_had_an_eps_of_their_own_keeps_its_numbers():
    model = as_dict(model_config("tiny", norm_eps=1e-5))
    del model["latent_norm_eps"]

    assert freeze({"model": model}).model.latent_norm_eps == 1e-5
    assert "latent_norm_eps" not in model
    assert model_config("tiny", norm_eps=1e-5).latent_norm_eps == 1e-6


def test_a_key_under_both_of_its_names_is_refused():
    train = {"micro_batches": 2, "accumulation_steps": 4}
    with pytest.raises(ConfigError, match="train.micro_batches is the earlier name of train.accumulation_steps, and"):
        freeze({"model": as_dict(model_config("tiny")), "train": train})


def test_a_config_file_keeps_what_no_override_changes(config_file):
    config = configs.load_config(config_file, ["--config.train.seed=3"])
    assert (config.train.steps, config.train.seed) == (12, 3)
    assert config.model == model_config("tiny")


def test_a_config_without_a_model_takes_that_of_the_run_it_starts_from(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(as_dict(Config(model=model_config("tiny", num_layers=2)))))
    config = configs.load_config("sft", [f"--config.init.from={tmp_path}"])
    assert config.model == model_config("tiny", num_layers=2) and config.balance.bias_speed == 0
    with pytest.raises(ConfigError, match="takes its model from another run; name it: --config.init.from=RUN"):
        configs.load_config("sft")
    with pytest.raises(ConfigError, match="holds no config.json; give the work directory of a run"):
        configs.load_config("sft", ["--config.init.from=nowhere"])


@pytest.mark.parametrize("overrides, error", [
    (dict(packing="whole", fim_rate=0.0), "set data.mask_documents=True"),
    (dict(packing="whole", mask_documents=True), "set data.fim_rate=0"),
    (dict(packing="dense"), "data.packing='dense'")])
def test_whole_documents_ask_for_what_they_need(overrides, error):
    with pytest.raises(ConfigError, match=error):
        freeze({"model": as_dict(model_config("tiny")), "data": overrides})


@pytest.mark.parametrize("name", sorted(configs.PRESETS))
def test_a_config_survives_freezing_and_json(name):
    config = Config(model=model_config(name))
    assert freeze(default_config(name)) == config
    assert freeze(as_dict(config)) == config
    assert freeze(json.loads(json.dumps(as_dict(config)))) == config


def test_a_frozen_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        model_config("tiny").d_model = 1


def test_v3_is_the_model_of_the_report():
    c = model_config("v3_671b")
    assert (c.num_layers, c.num_dense_layers, c.d_model, c.num_heads) == (61, 3, 7168, 128)
    assert (c.q_rank, c.kv_rank, c.nope_head_dim, c.rope_head_dim, c.v_head_dim) == (1536, 512, 128, 64, 128)
    assert (c.num_experts, c.experts_per_token, c.num_shared_experts, c.expert_ffn_dim) == (256, 8, 1, 2048)
    assert (c.num_groups, c.groups_kept, c.route_scale, c.vocab_size, c.mtp_depth) == (8, 4, 2.5, 129280, 1)
    assert (c.num_moe_layers, c.qk_head_dim, c.has_router_bias) == (58, 192, True)


@pytest.mark.parametrize("name", ["v2_lite_16b", "v2_236b"])
def test_v2_routes_by_softmax_without_a_bias(name):
    c = model_config(name)
    assert (c.score, c.has_router_bias, c.normalize_gates, c.mtp_depth) == ("softmax", False, False, 0)


def test_config_works_without_jax():
    code = "import sys, deepseek_jax.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@st.composite
def ramps(draw):
    """Any valid run: rows of a micro-batch, micro-batches, and a batch ramp in complete micro-batches."""
    rows, accumulation_steps = draw(st.integers(1, 8)), draw(st.integers(1, 16))
    ramp_from = draw(st.one_of(st.none(), st.integers(1, accumulation_steps).map(lambda m: m * rows)))
    train = TrainConfig(steps=draw(st.integers(1, 400)), batch_size=rows * accumulation_steps,
                        accumulation_steps=accumulation_steps, ramp_from=ramp_from, ramp_until=draw(st.floats(0, 1)))
    return Config(model=model_config("tiny"), train=train)


@given(ramps())
def test_the_data_position_is_the_sum_of_all_batches_before(config):
    rows, position = config.train.batch_size // config.train.accumulation_steps, 0
    for step in range(config.train.steps + 2):
        assert config.sequences_before(step) == position
        position += rows * config.microbatches_at(step)


@given(ramps())
def test_the_ramp_rises_from_its_start_to_the_whole_batch(config):
    train, counts = config.train, [config.microbatches_at(step) for step in range(config.train.steps + 1)]
    rows = train.batch_size // train.accumulation_steps
    assert counts == sorted(counts) and counts[-1] == train.accumulation_steps
    if train.ramp_from is None or train.ramp_until == 0:
        assert counts[0] == train.accumulation_steps
    else:
        assert counts[0] * rows == train.ramp_from


def test_an_override_may_name_a_source_that_is_no_utf8():
    config = configs.load_config("tiny", ["--config.data.sources=(('caf\udce9/', 2.0),)"])
    assert config.data.sources == (("caf\udce9/", 2.0),)


def test_a_config_nested_too_deeply_is_refused_in_one_line(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"model": ' + b"[" * 10**5 + b"]" * 10**5 + b"}")
    with pytest.raises(ConfigError, match="nested too deeply"):
        configs.load_config(str(tmp_path / "config.json"))


def test_forced_balance_is_a_rule_of_the_model_and_comes_back_from_its_own_file():
    config = freeze({"model": model_config("tiny"), "balance": {"force_balanced": True}})
    assert config.model.router.endswith(":in_turn") and freeze(as_dict(config)) == config
    with pytest.raises(ConfigError, match="^balance.force_balanced=True takes the place of model.router='my.own:rule'; "
                                          "omit one of them.$"):
        freeze({"model": {"router": "my.own:rule"}, "balance": {"force_balanced": True}})
