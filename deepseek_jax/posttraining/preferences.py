"""Runs that learn from preference pairs: the training loop with pairs instead of documents.

    dpo      weights of init.from -> pairs -> log-probabilities of policy and reference -> steps
    reward   weights of init.from and a new head -> pairs -> two numbers -> steps

The reference of DPO is the run that `init.from` names, read once and run on each batch by the same program as the
policy; of low-rank adapters it is their base. Optimizer, mesh, checkpoints, resumption and metrics are those of
`training.loop`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax.chat.template import of_folder
from deepseek_jax.checkpoint.adapters import Base
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.prepare import Prepared, Source, began_in, check_sources, claim_corpus, find_tokenizer
from deepseek_jax.model.types import Output
from deepseek_jax.parallel.processes import first_then_others, is_first
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.parallel.sharding import constrain_to_compute
from deepseek_jax.posttraining.dpo import answer_logprobs, bradley_terry, pair_losses
from deepseek_jax.posttraining.pairs import PairLoader, hold
from deepseek_jax.posttraining.reward_model import row_rewards
from deepseek_jax.training.base import load_reference, main_model
from deepseek_jax.training.loop import Pending, Run, TrainResult, check_run, closing
from deepseek_jax.training.losses import objective, token_logprobs
from deepseek_jax.training.step import Inputs, Loss, complete, of_rows, run_model, sums_of
from deepseek_jax.training.types import Batch, Metrics, Normalizers, Sums, TokenLosses
from deepseek_jax.workdir import alone_in, claim_workdir


def train_on_pairs(config: Config, workdir: str) -> TrainResult:
    """Trains to config.train.steps, resuming the run in the work directory. There are no variables for a sample.

    Raises: as `training.loop.train`.
    """
    check_preferences(config)
    runner = check_run(config, workdir)
    kind = {"dpo": DpoRun, "reward": RewardRun}[str(config.preference.objective)]
    began = began_in(config, workdir)
    sources = [Source(path, config.data.validation_fraction, began) for path, _ in config.data.sources]
    check_sources(began, {source.path: source.digest for source in sources}, branches=began != workdir)
    tokenizer: Any = first_then_others(lambda: find_tokenizer(config, workdir, sources), "tokenizer")
    text = functools.cache(lambda: of_folder(workdir, tokenizer, chats=False))
    held = [hold(source, tokenizer, text, kind.longest(config)) for source in sources]
    loader = PairLoader(config, held, tokenizer, *runner.share())
    with contextlib.ExitStack() as owned:
        if is_first():
            owned.enter_context(alone_in(workdir))
            about = tuple({"source": source.path, "digest": source.digest} for source in sources)
            claim_corpus(Prepared(tokenizer, (), (), about), workdir)
            claim_workdir(config, workdir)
            for source, pairs in zip(sources, held):
                print(f"{source.path}: {len(pairs.train):,} pairs, {len(pairs.validation):,} held out"
                      + (f", {pairs.left_out:,} too long for train.sequence_length" if pairs.left_out else "") + ".",
                      flush=True)
        with closing(kind(config, workdir, loader, runner)) as run:
            return TrainResult(run.go(), run.step, None, tokenizer, "")


def check_preferences(config: Config) -> None:
    """Raises ConfigError for settings that cannot be used with pairs."""
    if config.init.from_ is None:
        raise ConfigError("preference.objective starts from the weights of a run; add --config.init.from=RUN.")
    if config.preference.objective == "reward" and config.lora.rank is not None:
        raise ConfigError("lora.rank: the head of a reward model is trained with all weights; take lora.rank=None.")
    if config.distill.from_ is not None:
        raise ConfigError("distill.from is for documents, and preference.objective for pairs; take one.")
    if config.mesh.pipe > 1:
        raise ConfigError(f"mesh.pipe={config.mesh.pipe}: pipelines train next tokens alone; take mesh.pipe=1.")
    if config.mesh.parts > 1:
        raise ConfigError(f"{config.mesh.parts_key}={config.mesh.parts}: next tokens alone are trained on parts of "
                          f"sequences; take {config.mesh.parts_key}=1.")
    if config.model.index_warmup:
        raise ConfigError("model.index_warmup=True trains the indexer alone, by a loss that pairs do not have; take "
                          "--config.model.index_warmup=False.")


def dpo_loss(config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """DPO's loss and the balance losses of one micro-batch of pairs (`pairs.PairLoader`); a `training.step.Loss`.

    inputs.reference: the policy at the start. MTP modules get no gradient.
    """
    batch, reference = of_rows(config, inputs.micro), inputs.reference
    assert reference is not None
    now_BT, output = _logprobs(config, params, inputs.router, batch, inputs.step)
    before_BT, _ = _logprobs(main_model(config), reference["params"], reference["router"], batch)
    policy_P2, before_P2 = (answer_logprobs(x_BT, batch.weights_BT) for x_BT in (now_BT, before_BT))
    loss_P, watched = pair_losses(config.preference.beta, policy_P2, before_P2)
    tokens_P2 = batch.weights_BT.sum(axis=1).reshape(-1, 2)
    watched["logratio"] = ((policy_P2 - before_P2) / jnp.maximum(tokens_P2, 1)).mean(axis=1)
    return of_pairs(config, inputs, output, tokens_P2[:, 0] > 0, loss_P, watched)


def reward_loss(config: Config, params: dict[str, Any], inputs: Inputs) -> tuple[jax.Array, Sums]:
    """The Bradley-Terry loss and the balance losses of one micro-batch of pairs; a `training.step.Loss`."""
    rewards_B, output = row_rewards(config, params, inputs.router, inputs.micro, inputs.step)
    counted_P2 = (inputs.micro["weights"] != 0).any(axis=1).reshape(-1, 2)
    return of_pairs(config, inputs, output, counted_P2[:, 0], *bradley_terry(rewards_B.reshape(-1, 2)))


def of_pairs(config: Config, inputs: Inputs, output: Output, counted_P: jax.Array, loss_P: jax.Array,
             watched: dict[str, jax.Array]) -> tuple[jax.Array, Sums]:
    """The result of a `training.step.Loss` whose losses are means over pairs. counted_P: bool, False for filler."""
    total = lambda x_P: jnp.where(counted_P, x_P, 0).sum()
    none_D = jnp.zeros_like(inputs.normalizers.mtp_weight_D)
    losses = TokenLosses(total(loss_P), total(jnp.ones_like(loss_P)), none_D, none_D)
    # All micro-batches of a step have the same number of pairs: its loss is the mean of theirs.
    normalizers = inputs.normalizers._replace(weight=len(loss_P) / inputs.normalizers.share)
    return (objective(output, losses, normalizers, config.balance),
            sums_of(output, losses, {name: total(x_P) for name, x_P in watched.items()}))


def _logprobs(config: Config, params: dict[str, Any], router: dict[str, jax.Array], batch: Batch,
              step: jax.Array | None = None) -> tuple[jax.Array, Output]:
    output = run_model(config, params, router, batch, step=step)
    return token_logprobs(output.hidden_BTD, params["head"], batch.targets_BT, config.train.loss_chunk), output


class PreferenceRun(Run):
    """A run whose batches are pairs of answers."""

    def __init__(self, config: Config, workdir: str, loader: PairLoader, runner: Runner):
        super().__init__(config, workdir, loader, runner)
        scored = runner.jit(functools.partial(score, config, self.loss))
        self.score: Callable[[dict[str, Any]], Sums] = lambda micro: scored(
            self.state.params, self.state.router, runner.shard_batch(micro), self.frozen_params, self.reference)

    @staticmethod
    def longest(config: Config) -> int:
        """Maximum tokens of an answer with its prompt: of the last token only the probability is used."""
        return config.train.sequence_length + 1

    def row(self, pending: Pending, metrics: Metrics, tokens_per_second: float) -> dict[str, float]:
        """The row of training, with the metrics of the objective."""
        row = super().row(pending, metrics, tokens_per_second)
        row.pop("mtp_loss", None)  # not trained here
        return row

    def words(self, row: dict[str, float]) -> str:
        """The part of a row that the progress bar shows."""
        return f"loss {row['loss']:.3f}, accuracy {row['accuracy']:.0%}, margin {row['margin']:.2f}"

    def _steps(self, bar) -> bool:
        if self.step == 0:
            with self.watching.stall.suspended():
                self._evaluate(bar)
        return super()._steps(bar)

    def _evaluate(self, bar):
        """The objective on held-out pairs."""
        train = self.config.train
        limit = train.final_eval_batches if self.step == train.steps else train.eval_batches
        parts = jax.device_get([self.score(micro) for micro in self.loader.validation_batches(limit)])
        weight = sum(part.losses.weight for part in parts)
        means = {"loss": sum(part.losses.nats for part in parts) / weight} | {
            name: sum(part.own[name] for part in parts) / weight for name in parts[0].own}
        if self.writer:
            self.writer.write(self.step, **{f"eval_{name}": float(x) for name, x in means.items()})
        self._say(bar, f"step {self.step}: {int(weight)} held-out pairs, loss {means['loss']:.4f}, accuracy "
                       f"{means['accuracy']:.3f}, margin {means['margin']:.3f}")


class DpoRun(PreferenceRun):
    """Direct preference optimization."""

    loss = staticmethod(dpo_loss)
    name = "preferences"

    def find_reference(self, known: Base | None) -> tuple[dict[str, Any] | None, Base | None]:
        """The weights that the run started from; with adapters their base, which is already loaded."""
        if self.frozen is not None:
            return self.frozen, None
        return load_reference(self.config, self.runner, str(self.config.init.from_), known,
                              "the reference of preference.objective, init.from")


class RewardRun(PreferenceRun):
    """A reward model, which has no reference model."""

    loss = staticmethod(reward_loss)
    name = "reward model"

    @staticmethod
    def longest(config: Config) -> int:
        """The model also reads the last token of an answer."""
        return config.train.sequence_length


def score(config: Config, loss: Loss, params: dict[str, Any], router: dict[str, jax.Array], micro: dict[str, Any],
          base: dict[str, Any] | None, reference: dict[str, Any] | None) -> Sums:
    """Sums of one micro-batch of held-out pairs. base, reference: as in `training.step.accumulate`."""
    one, one_D = jnp.float32(1), jnp.ones((config.model.mtp_depth,))
    inputs = Inputs(router, micro, Normalizers(one, one_D, 0.0, one), jnp.int32(0), reference)
    return loss(config, complete(config, constrain_to_compute(params), base), inputs)[1]
