"""A new routing or bias rule is one file: it trains, resumes, serves and joins a study; elsewhere it is refused by
name.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.config import ConfigError, MeshConfig, freeze, model_config
from deepseek_jax.interop import hf_config
from deepseek_jax.model import DeepSeekV3, router
from deepseek_jax.scale import plan
from deepseek_jax.serving import generate
from deepseek_jax.serving.engine import Engine
from deepseek_jax.training.loop import starting_state
from deepseek_jax.workdir import load_run
from examples import own_balancer, own_router
from experiments.studies.framework import runner
from experiments.studies.framework.study import Study
from experiments.studies.framework.training import Training
from tests import runs
from tests.model import naive

HASH, MOMENTUM = "examples.own_router:hash_route", "examples.own_balancer:MOMENTUM"
HASHED = ["--config.model.router=" + HASH, "--config.model.router_bias=none", "--config.train.steps=4",
          "--config.train.checkpoint_every=4", "--config.train.ramp_from=None"]


@pytest.fixture(scope="module")
def hashed(tmp_path_factory):
    """A work directory trained with hash routing."""
    folder = tmp_path_factory.mktemp("hashed")
    config = runs.write_config(folder)
    result = runs.run("train", "--config", config, "--workdir", folder / "run", *HASHED)
    assert result.code == 0, result.err
    return folder / "run"


def test_hash_routing_sends_equal_tokens_to_equal_experts(hashed):
    cfg, variables, _ = (run := load_run(str(hashed))).config.model, run.variables, run.step
    tokens = np.array([[5, 9, 5, 7, 9, 5, 7, 7]], np.int32)

    output = jax.jit(lambda v, t: DeepSeekV3(cfg).apply(v, t, capture=("chosen",)))(variables, tokens)
    chosen_LTK = np.asarray(output.captured["chosen"])[:, 0]
    for token in (5, 7, 9):
        at = chosen_LTK[:, tokens[0] == token]
        assert (at == at[:, :1]).all()
    assert len(np.unique(chosen_LTK)) > cfg.experts_per_token


def test_the_decoder_routes_by_the_tokens_that_the_forward_pass_sees():
    cfg = naive.tiny(num_layers=2, router=HASH, router_bias="none")
    variables = naive.variables_of(cfg)  # weights so large that another expert gives another token
    prompts = [[5, 9, 5, 7, 9], [3, 3, 4]]
    made = generate(cfg, variables, prompts, 8)
    for prompt, new in zip(prompts, made.tokens):
        row = np.zeros((1, 16), np.int32)
        row[0, :len(prompt) + 8] = prompt + new
        logits = naive.forward(cfg)(variables, row).logits_BTW[0]
        assert logits[len(prompt) - 1:len(prompt) + 7].argmax(-1).tolist() == new


def by_token_and_place(cfg, x_ND, weights, bias_E, context):
    tokens_N = context.tokens_N * (1 + context.positions_N)
    return own_router.hash_route(cfg, x_ND, weights, bias_E, context._replace(tokens_N=tokens_N))


def test_the_router_of_an_mtp_module_sees_the_tokens_ahead():
    cfg = naive.tiny(router=f"{__name__}:by_token_and_place", mtp_depth=2)
    tokens_T = np.array([5, 9, 5, 7, 9, 0, 1, 7])
    counts = naive.forward(cfg)(naive.variables_of(cfg), tokens_T[None].astype(np.int32)).counts["mtp_bias"]
    for k, counts_E in enumerate(counts, start=1):
        first_T = np.roll(tokens_T, -k) * np.arange(1, 9) * 2654435761 % 2**32 % cfg.num_experts
        chosen_TK = (first_T[:, None] + np.arange(cfg.experts_per_token) * (cfg.num_experts // cfg.experts_per_token))
        expected_E = np.bincount((chosen_TK % cfg.num_experts).ravel(), minlength=cfg.num_experts)
        np.testing.assert_array_equal(counts_E, expected_E)


@pytest.mark.slow
def test_a_speculative_continuation_by_hash_routing_is_the_plain_one(hashed):
    run = load_run(str(hashed))
    plain, drafted = (generate(run.config.model, run.variables, [[1, 2, 3], [4, 5]], 6, speculative=s)
                      for s in (False, True))
    assert plain.tokens == drafted.tokens


def test_the_commands_generate_from_a_run_with_its_own_rule(hashed):
    said = runs.run("generate", "--workdir", hashed, "--prompt", "def ", "--max-new-tokens", 4)
    assert said.code == 0 and said.out.startswith("def ")
    assert runs.run("evaluate", "--workdir", hashed).code == 0


@pytest.mark.slow
def test_a_balancer_with_momentum_keeps_its_state_in_the_checkpoint_and_moves_by_it(tmp_path):
    config = runs.write_config(tmp_path)
    change = [f"--config.balance.bias_rule={MOMENTUM}", "--config.train.steps=6", "--config.train.checkpoint_every=3",
              "--config.train.sample_tokens=0"]
    assert runs.run("train", "--config", config, "--workdir", tmp_path / "run", *change).code == 0

    leaves = json.loads((tmp_path / "run/checkpoints/6/meta.json").read_text())["leaves"]
    assert {"balancer/bias", "balancer/mtp_bias"} <= leaves.keys()
    state = restore_items(tmp_path / "run", ("balancer",))[0]["balancer"]
    assert np.abs(state["bias"]).max() > 0 and np.abs(state["mtp_bias"]).max() > 0
    with (tmp_path / "run" / "metrics.jsonl").open() as f:
        whole = [json.loads(line).get("loss") for line in f]
    shutil.rmtree(tmp_path / "run/checkpoints/6")
    assert runs.run("train", "--config", config, "--workdir", tmp_path / "run", *change).code == 0
    with (tmp_path / "run" / "metrics.jsonl").open() as f:
        assert [json.loads(line).get("loss") for line in f] == whole


def test_the_example_of_a_balancer_is_the_formula():
    bias_LE, counts_LE = jnp.zeros((1, 4)), jnp.array([[8, 4, 4, 0]])
    state = own_balancer.MOMENTUM.init(bias_LE)
    moved_LE, state = own_balancer.MOMENTUM.update(bias_LE, counts_LE, jnp.float32(0.5), state)
    np.testing.assert_allclose(state, [[-0.1, 0, 0, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(moved_LE, [[-0.5, 0, 0, 0.5]])


@pytest.mark.slow
def test_a_study_compares_a_rule_with_the_report_s(tmp_path):
    study = Study(name="hashes", arms={"bias": {}, "hash": {}}, quick_arms=("bias", "hash"), quick_seeds=(0,),
                  measure=Training(network=lambda arm: {"model.router": HASH} if arm == "hash" else {}),
                  draw=lambda *_: None).shortened()
    job = lambda arm: runner.Job(study, arm, [0], tmp_path, lambda steps: None)
    study.measure.prepare(study, tmp_path)
    losses = {arm: next(study.measure.run(job(arm)))["metrics"]["loss"] for arm in study.arms}
    assert len(set(losses.values())) == 2 and all(np.isfinite(x) for x in losses.values())


def test_both_examples_give_configs_that_can_be_frozen():
    for example in (own_router, own_balancer):
        freeze(example.get_config())


def wholesale(cfg, x_ND, weights, bias_E, context):
    return router.route(cfg, x_ND, weights, bias_E, context)


router.across_tokens(wholesale)
MINE = f"{__name__}:wholesale"


def test_a_rule_over_all_tokens_trains_and_is_refused_by_name_where_they_are_not_seen_at_once():
    cfg = naive.tiny(router=MINE)
    variables = naive.variables_of(cfg)
    plain = dataclasses.replace(cfg, router="group_limited")
    tokens = np.arange(8, dtype=np.int32)[None]
    np.testing.assert_array_equal(DeepSeekV3(cfg).apply(variables, tokens).hidden_BTD,
                                  DeepSeekV3(plain).apply(variables, tokens).hidden_BTD)
    with pytest.raises(ConfigError, match=r"wholesale' chooses experts over all tokens of a batch, and decoding"):
        Engine(cfg, variables)
    with pytest.raises(ConfigError, match="wholesale' chooses experts over all tokens.*mesh.pipe=2"):
        router.check_routes_alone(cfg, "mesh.pipe=2")


@pytest.mark.parametrize(("change", "words"), [
    (dict(router="expert_choice"), "model.router='expert_choice' is unknown; take 'group_limited', or name your own"),
    (dict(router="examples.own_router:nothing"), "has no nothing"),
    (dict(router="examples.nowhere:route"), "module examples.nowhere cannot be imported"),
    (dict(attention="linear"), "model.attention='linear' is unknown"),
])
def test_a_part_that_is_not_there_is_named(change, words):
    with pytest.raises(ConfigError) as error:
        cfg = model_config("tiny", **change)
        router.routing_rule(cfg)
    assert words in str(error.value)


@pytest.mark.parametrize(("rule", "words"), [
    ("sine", "balance.bias_rule='sine' is unknown; take one of 'sign', 'proportional'"),
    ("examples.own_balancer:update", "is no BiasRule"),
])
def test_a_bias_rule_that_is_not_there_is_named(rule, words):
    with pytest.raises(ConfigError) as error:
        config = freeze({"model": naive.tiny(), "balance": {"bias_rule": rule}})
        starting_state(dataclasses.replace(config, mesh=MeshConfig()))
    assert words in str(error.value)


def test_a_model_with_its_own_attention_trains_only():
    cfg = naive.tiny(attention="experiments.studies.mla.attention:MQA", router_bias="additive")
    with pytest.raises(ConfigError, match="trains only"):
        Engine(cfg, {})


def test_export_and_planner_refuse_parts_that_the_published_models_do_not_have():
    cfg = model_config("tiny", router=HASH)
    with pytest.raises(ConfigError, match="model.router='examples.own_router:hash_route'"):
        hf_config.write(cfg, "bfloat16")
    with pytest.raises(ConfigError, match="model.router='examples.own_router:hash_route' is not known to the planner"):
        plan.check_known(cfg)
