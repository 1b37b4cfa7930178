"""Tasks of lm-eval on our own engine (extra `eval`): multiple choice and perplexity by logprobs, generation by text.

Texts are tokenized as in lm-eval's own class for transformers: without BOS, but with the prefix token before an empty
context or at the start of a rolling window. In a chat, a context is a list of messages, to which the checkpoint's
template is applied.
"""

from __future__ import annotations

import json
from typing import Any

from lm_eval import simple_evaluate, utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

from deepseek_jax.chat.messages import Conventions, Tokenizer, chat_ids
from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.serving.generation import run_requests
from deepseek_jax.serving.openai.prompts import Continuation
from deepseek_jax.serving.sequence import Request, Sequence

MOST_AT_ONCE = 256  # requests of one call, whose results are kept until all have ended


class EngineLM(TemplateLM):
    """A model with lm-eval's interface.

    Args:
      variables: {"params", "bias"} of the model. text: its checkpoint's tokenizer and template.
      max_length: tokens of context and continuation; the beginning of longer ones is cut off.
      chat: whether contexts are chats, whose answers have texts but no logprobs.
    """

    backend = "causal"

    def __init__(self, cfg: ModelConfig, variables: dict[str, Any], tokenizer: Tokenizer, text: Conventions,
                 max_length: int = 2048, chat: bool = False):
        super().__init__()
        self.cfg, self.variables, self.tokens, self.text = cfg, variables, tokenizer, text
        self.max_length, self.chat = max_length, chat

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokens.eos

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: BOS, as for transformers."""
        return self.tokens.bos

    def tok_encode(self, string: str, **options: Any) -> list[int]:
        """Ids of a text, without BOS."""
        return self.tokens.encode(string)

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's caches of rendered chats; here they hold messages, independent of the tokenizer."""
        return "messages"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as a string for `generate_until`: a template's markup has ids that no text produces."""
        return json.dumps(chat_history)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Logprob of each complete text, in windows of max_length without shared predicted tokens."""
        windows = []
        for i, request in enumerate(requests):
            rolling = utils.get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id,
                                                      self.max_length, context_len=1)
            windows += [(i, *utils.make_disjoint_window(window)) for window in rolling]
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens([((None, None), context, new) for _, context, new in windows])
        for (i, *_), (logprob, _) in zip(windows, scores, strict=True):
            totals[i] += logprob
        return totals

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        """(logprob, whether greedy) of each continuation, given ((context, continuation), their ids)."""
        if self.chat:
            raise ConfigError("--chat is for tasks that generate; leave it out for multiple choice and perplexity.")
        asked = []
        for _, context, new in requests:
            ids = [*context, *new][-(self.max_length + 1):]
            asked.append(Request(tuple(ids), 0, prompt_logprobs=True))
        found = []
        for (_, _, new), sequence in zip(requests, self._run(asked), strict=True):
            scored = sequence.scored[-len(new):]
            found.append((sum(token.logprob for token in scored),
                          all(token.id == token.best[0][0] for token in scored)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of its stop strings, or to an end token."""
        asked, texts = [], []
        for request in requests:
            arguments: Any = request.args
            context, how = arguments
            until, most = how.get("until") or [], int(how.get("max_gen_toks", 256))
            ids = (chat_ids(json.loads(context), self.tokens, self.text.template) if self.chat else
                   self.tok_encode(context))[-max(1, self.max_length - most):] or [self.prefix_token_id]
            asked.append(Request(tuple(ids), most, stop_tokens=self.text.ends or frozenset([self.tokens.eos]),
                                 temperature=float(how.get("temperature", 0.0)) if how.get("do_sample") else 0.0))
            texts.append(Continuation(self.tokens, tuple([until] if isinstance(until, str) else until)))
        self._run(asked, texts)
        return [text.text for text in texts]

    def _run(self, asked: list[Request], listeners: list[Continuation] | None = None) -> list[Sequence]:
        """Longest prompts first, so that those of a batch have similar lengths; results in the order of `asked`."""
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i].prompt))
        ended: dict[int, Sequence] = {}
        for start in range(0, len(order), MOST_AT_ONCE):
            some = order[start:start + MOST_AT_ONCE]
            made = run_requests(self.cfg, self.variables, [asked[i] for i in some], listeners=[
                listeners[i] for i in some] if listeners else ())
            ended |= dict(zip(some, made.sequences, strict=True))
        return [ended[i] for i in range(len(asked))]


def evaluate_tasks(model: EngineLM, tasks: list[str], folder: str | None = None, shots: int | None = None,
                   limit: int | None = None) -> dict[str, Any]:
    """Scores of each task, as lm-eval names them: {task: {metric: value}}.

    Args:
      tasks: names. folder: of your own task files (YAML). shots: examples before each question; None: the task's
        default. limit: questions per task; None: all.
    Raises:
      ConfigError: an unknown task, or one that is impossible as a chat.
    """
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ConfigError(f"there is no task {unknown[0]!r}; `lm-eval ls tasks` lists them, --task-folder adds others.")
    evaluate: Any = simple_evaluate  # a decorator hides its parameters
    result = evaluate(model, tasks=tasks, task_manager=manager, num_fewshot=shots, limit=limit,
                      apply_chat_template=model.chat, bootstrap_iters=0, log_samples=False)
    return result["results"]
