"""Drafts of a trained model, token by token: what its MTP module proposed, and what the model then wrote.

The engine decodes, with one draft a step; tokens are sampled, because greedy text of a small model repeats itself.
The engine reports for each token whether it was drafted. Rejected drafts are read from its state between two steps.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from deepseek_jax.config import ConfigError
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.sequence import Request, Sequence
from deepseek_jax.workdir import load

PROMPTS = ("def ", "class ", "import os\n\n\ndef main(argv):\n    ", '    """Return ')
NEW_TOKENS = 80
TEMPERATURE, TOP_P = 0.7, 0.9


def drafted(folder: str, prompts: Iterable[str] = PROMPTS, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Continues prompts with the run in `folder`, the same way each time.

    Returns:
      {"run": what it is, "samples": [{"prompt", "tokens": [[text, "accepted" | "rejected" | "none", draft]], ...}]};
      draft: the text that was drafted in the token's place, "" where it was accepted or nothing was drafted.
    Raises:
      ConfigError: no such run, or one without an MTP module.
    """
    model = load(folder)
    if not model.cfg.mtp_depth:
        raise ConfigError(f"the run in {folder} has no MTP module (model.mtp_depth=0), so it drafts nothing.")
    engine = Engine(model.cfg, model.variables, EngineConfig(max_sequences=1, max_length=256, depth=1, most_steps=1))
    samples = []
    for stream, prompt in enumerate(prompts):
        request = Request(tuple(model.tokenizer.encode(prompt)), new_tokens, TEMPERATURE, top_p=TOP_P, stream=stream)
        samples.append(sample(model.tokenizer, prompt, *followed(engine, request)))
    return {"run": about(folder), "samples": samples}


def followed(engine: Engine, request: Request) -> tuple[Sequence, list[int]]:
    """Runs one request, a step at a time: the sequence, and the draft that each step began with (-1: none)."""
    sequence, drafts = engine.submit(request), []
    while engine.busy:
        # The engine's drafts are private; these are for the next step, in the sequence's slot.
        waiting = engine._drafts
        begins = int(waiting.token_Bd[sequence.slot, 0]) if sequence.slot >= 0 and not sequence.fresh else -1
        before = len(sequence.made)
        engine.step()
        if len(sequence.made) > before:
            drafts += [begins] * (len(sequence.made) - before)
    return sequence, drafts


def sample(tokenizer: Tokenizer, prompt: str, sequence: Sequence, drafts: list[int]) -> dict[str, Any]:
    """One continuation, with the text of each rejected draft."""
    texts = pieces(tokenizer, [token.id for token in sequence.made])
    vain = [tokenizer.decode([draft]) if token.draft == "rejected" else ""
            for token, draft in zip(sequence.made, drafts, strict=True)]
    tokens = [[text, token.draft, draft] for text, token, draft in zip(texts, sequence.made, vain, strict=True)]
    return {"prompt": prompt, "tokens": tokens, "drafted": sequence.drafted, "accepted": sequence.accepted}


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it."""
    texts = [tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
    return [after[len(before):] for before, after in itertools.pairwise(texts)]


def about(folder: str) -> dict[str, Any]:
    """A description of the run: its steps, the tokens it read, and its bits per byte on held-out text."""
    text = pathlib.Path(folder, "metrics.jsonl").read_text(encoding="utf-8")
    last: dict[str, Any] = {}
    for line in text.splitlines():
        last |= {key: value for key, value in json.loads(line).items() if value is not None}
    return {"steps": last["step"], "tokens": last["tokens"], "bits_per_byte": round(last["eval_bits_per_byte"], 2),
            "temperature": TEMPERATURE}
