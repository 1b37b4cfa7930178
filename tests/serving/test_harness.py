"""Tasks of lm-eval, on local files: scores equal those of a plain forward pass, in process and over the server's API.
"""

import json
import types

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from deepseek_jax.chat.messages import PLAIN
from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serving.harness import EngineLM, evaluate_tasks
from tests.model import naive
from tests.serving.lm_eval_tasks import TASKS
from tests.serving.openai.conftest import running

CFG = naive.tiny(num_layers=2, vocab_size=262)
VARIABLES = naive.variables_of(CFG)
ROWS = [{"q": "import os\nos.path.", "choices": ["join", "banana", "x"], "label": 0},
        {"q": "for i in ", "choices": ["range", "apples and pears", " "], "label": 1},
        {"q": "", "choices": ["nothing", "before it"], "label": 1}]


@pytest.fixture(scope="module")
def model():
    return EngineLM(CFG, VARIABLES, train_tokenizer(["some text"] * 3, 262), PLAIN, max_length=32)


@pytest.fixture(scope="module")
def chat():
    return EngineLM(CFG, VARIABLES, train_tokenizer(["some text"] * 3, 262), PLAIN, max_length=32, chat=True)


def logprobs_of(ids):
    """Logprobs of each token but the first, by a plain forward pass, and whether it is the most likely one."""
    row = np.zeros((1, 64), np.int32)
    row[0, :len(ids)] = ids
    logits = np.asarray(naive.forward(CFG)(VARIABLES, row).logits_BTW[0, :len(ids) - 1], np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[range(len(ids) - 1), ids[1:]], logits.argmax(-1) == ids[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(text.replace("DATA", str(path / "rows.jsonl")))
    return str(path)


def test_continuations_have_the_logprobs_of_a_plain_pass(model):
    pairs = [("for i in ", "range"), ("", "nothing"), ("a", "b"), ("x" * 60, "some text")]
    asked = [(("", ""), *((model._encode_pair(a, b)) if a else ([model.prefix_token_id], model.tok_encode(b))))
             for a, b in pairs]
    for (_, context, new), (logprob, greedy) in zip(asked, model._loglikelihood_tokens(asked), strict=True):
        expected, likeliest = logprobs_of([*context, *new][-33:])
        assert logprob == pytest.approx(expected[-len(new):].sum(), abs=1e-4)
        assert greedy == likeliest[-len(new):].all()


def test_tasks_of_ones_own_are_scored(model, folder):
    found = evaluate_tasks(model, list(TASKS), folder)
    score = lambda context, new: logprobs_of([*(model.tok_encode(context) or [model.prefix_token_id]),
                                              *model.tok_encode(new)])[0][-len(model.tok_encode(new)):].sum()
    right = [int(np.argmax([score(row["q"], c) for c in row["choices"]]) == row["label"]) for row in ROWS]
    assert found["choice"]["acc,none"] == pytest.approx(np.mean(right))
    nats = 0.0
    texts = [row["q"] * 3 + "some text" for row in ROWS]
    for text in texts:
        ids = [model.prefix_token_id, *model.tok_encode(text)]
        for start in range(0, len(ids) - 1, 32):  # windows of 32 predictions; the last has as much context as fits
            end = min(start + 32, len(ids) - 1)
            begin = max(0, end - 32)
            nats -= logprobs_of(ids[begin:end + 1])[0][start - begin:].sum()
    assert found["perplexity"]["bits_per_byte,none"] == pytest.approx(
        nats / np.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)
    assert found["writing"]["exact_match,none"] == 0.0


def test_a_task_that_there_is_not_is_named(model):
    with pytest.raises(ConfigError, match="there is no task 'hellaswagg'"):
        evaluate_tasks(model, ["hellaswagg"])


def test_chats_are_asked_where_answers_are_texts(chat, folder):
    assert evaluate_tasks(chat, ["writing"], folder)["writing"]["exact_match,none"] == 0.0
    with pytest.raises(ConfigError, match="--chat is for tasks that generate"):
        evaluate_tasks(chat, ["choice"], folder)


def test_the_server_gives_the_same_scores(model, chat, folder, monkeypatch):
    """With lm-eval's own client, which sends ids and asks for an echo with logprobs."""
    for needed in ("aiohttp", "tenacity", "requests"):
        pytest.importorskip(needed)
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with running() as (_, url):
        # lm-eval leaves two positions free: one for the token that it requests, one for the prefix of a window.
        api = LocalCompletionsAPI(model="org/random", base_url=url + "/v1/completions", tokenizer_backend="None",
                                  max_length=34)
        # As if the server had endpoints of a tokenizer; so transformers, the alternative, is not needed here.
        api.tokenizer_backend, api.tokenized_requests, api.tokenizer = "remote", True, types.SimpleNamespace(
            encode=model.tok_encode, decode=model.tokens.decode, eos_token="<|eos|>", bos_token_id=model.tokens.bos,
            eos_token_id=model.tokens.eos)
        api.custom_prefix_token_id = model.tokens.bos  # lm-eval treats a BOS of 0 as none
        found = simple_evaluate(api, tasks=list(TASKS), task_manager=TaskManager(include_path=folder),
                                bootstrap_iters=0)["results"]
        api = LocalChatCompletion(model="org/random", base_url=url + "/v1/chat/completions")
        chats = simple_evaluate(api, tasks=["writing"], task_manager=TaskManager(include_path=folder),
                                apply_chat_template=True, bootstrap_iters=0, log_samples=True)["samples"]["writing"]
    answers = [sample["resps"][0][0] for sample in sorted(chats, key=lambda sample: sample["doc_id"])]
    assert answers == chat.generate_until([types.SimpleNamespace(args=(
        chat.apply_chat_template([{"role": "user", "content": row["q"] + "a"}]), {"until": ["zq"], "max_gen_toks": 5}))
        for row in ROWS]) and any(answers)
    here = evaluate_tasks(model, list(TASKS), folder)
    for task, scores in here.items():
        for metric, value in scores.items():
            if isinstance(value, float):
                assert found[task][metric] == pytest.approx(value, rel=1e-5), (task, metric)
