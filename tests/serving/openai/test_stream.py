"""What a choice's listener passes on: answer and reasoning separately, an echo with its tokens, nothing after a stop.
"""

import math
import types

import pytest

from deepseek_jax.serving.openai.requests import CompletionRequest, ServedModel
from deepseek_jax.serving.openai.stream import _Listener
from deepseek_jax.serving.sequence import Request, Token
from tests.chat.test_template import published


def heard(prompt, ids, together=1, finish="stop", end=None, **how):
    """The deltas of one choice whose tokens come `together` at a time, and how many tokens were kept."""
    here, put = published(), []
    how = dict(chat=True, prompts=1, requests=[Request(tuple(prompt), 99)], stops=(), stream=True, include_usage=False,
               alternatives=None, return_drafts=False) | how
    service = types.SimpleNamespace(served=ServedModel("m", here, 512, 99), metrics=None, failure=None, live=set())
    listen = _Listener(types.SimpleNamespace(service=service, completion=CompletionRequest(**how), put=put.append), 0)
    sequence = types.SimpleNamespace(request=how["requests"][0], scored=[], finish=finish, end=end, admitted=0.0,
                                     submitted=0.0)
    for i in range(0, len(ids), together):
        kept = listen(sequence, [Token(t, "none", -1.0) for t in ids[i:i + together]])
        if kept is not None:
            break
    else:
        kept = None
    listen(sequence, [])
    return put, kept


def joined(put):
    return "".join(d.reasoning for d in put), "".join(d.text for d in put)


@pytest.mark.parametrize("together", [1, 3, 50])
@pytest.mark.parametrize("opened", ["by the template", "by the model", "never", "and closed by the template"])
def test_reasoning_is_apart_from_the_answer_however_it_was_opened(together, opened):
    here, mark = published(), published().backend.token_to_id
    thought, answer = "why not é?", "hello there"
    think = [*here.encode(thought), mark("</think>"), *here.encode(answer)]
    prompt = {"by the template": [5, mark("</think>"), mark("<think>")], "by the model": [5],
              "never": [5], "and closed by the template": [mark("<think>"), mark("</think>")]}[opened]
    ids = {"by the template": think, "by the model": [mark("<think>"), *think]}.get(opened, here.encode(answer))
    put, _ = heard(prompt, ids, together)
    assert joined(put) == (thought if opened.startswith("by") else "", answer)
    assert [t.token.id for d in put for t in d.tokens] == list(ids) and put[-1].finish_reason == "stop"


def test_a_completion_has_no_reasoning_apart():
    here, mark = published(), published().backend.token_to_id
    put, _ = heard([mark("<think>")], [*here.encode("a"), mark("</think>"), *here.encode("b")], chat=False)
    assert joined(put) == ("", "a</think>b")


@pytest.mark.parametrize("together", [1, 4, 50])
def test_a_stop_string_ends_either_and_says_how_many_tokens_are_kept(together):
    here, mark = published(), published().backend.token_to_id
    ids = [*here.encode("think of STOP it"), mark("</think>"), *here.encode("x")]
    put, kept = heard([mark("<think>")], ids, together, stops=("STOP",))
    assert joined(put) == ("think of ", "")
    tokens = [t.token.id for d in put for t in d.tokens]
    assert ids[:len(tokens)] == tokens and kept == (len(tokens) - 1) % together + 1


def test_an_echo_begins_with_the_prompt_and_ends_with_the_token_that_ended_it():
    here = published()
    prompt, ids = [here.bos, *here.encode("hello é")], here.encode(" fine")
    put, _ = heard(prompt, ids, chat=False, echo=True, end=Token(here.eos, "none", -0.5))
    tokens = [t for d in put for t in d.tokens]
    assert joined(put) == ("", "hello é fine") and [t.token.id for t in tokens] == [*prompt, *ids, here.eos]
    assert math.isnan(tokens[0].token.logprob) and tokens[-1].offset == len("hello é fine") and tokens[-1].text == ""
    assert [t.offset for t in tokens] == sorted(t.offset for t in tokens)
