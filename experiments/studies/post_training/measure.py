"""Pre-training, fine-tuning and reinforcement learning of one small model, by the library's own functions.

An arm is a complete run in its own work directory, which starts from the weights of the arm that it comes after.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io as standard
import json
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax import io
from deepseek_jax.chat.template import without_template
from deepseek_jax.config import Config, as_dict, default_config, freeze
from deepseek_jax.data.prepare import find_tokenizer
from deepseek_jax.posttraining import rollout
from deepseek_jax.posttraining.distill import Asking, teacher_answers
from deepseek_jax.posttraining.loop import reinforce
from deepseek_jax.posttraining.tasks import find_task
from deepseek_jax.training.loop import train
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.workdir import LoadedRun, load_run
from experiments.studies.framework.results import by_arm, verdict_lines
from experiments.studies.framework.study import Job, Measure, Study
from experiments.studies.framework.training import MODEL, QUICK

TASK, SIZE = "reverse", 4
# Half of the documents of pre-training ask for a mirror image and answer correctly: the same skill under another name.
# The others ask as in the task, and this share of their answers is correct; the rest repeats the letters unchanged.
RIGHT = 0.1
DOCUMENTS, EXAMPLES = 20_000, 1_000  # of pre-training, of fine-tuning
PROBLEMS, QUICK_PROBLEMS = 512, 16  # problems for scoring an arm, the same for all arms and seeds

COMMON = {
    "data.fim_rate": 0.0, "data.split_punctuation_rate": 0.0,
    "data.packing": "whole", "data.mask_documents": True,  # an answer attends only to its own prompt
    "train.eval_batches": 1, "train.sample_tokens": 0, "train.final_eval_batches": 1,
    "optimizer.weight_decay": 0.0, "balance.sequence_loss_weight": 0.0,
}
TRAINED = {
    "data.sources": (("corpus/pretrain.jsonl", 1.0),), "data.validation_fraction": 0.02,
    "train.steps": 800, "train.batch_size": 32, "train.sequence_length": 64,
    "train.eval_every": 800, "train.checkpoint_every": 800,
    "optimizer.learning_rate": 3e-3, "optimizer.warmup": 0.05, "balance.bias_speed": 0.005,
}
TUNED = {"data.sources": (("corpus/right.jsonl", 1.0),), "train.steps": 20, "train.eval_every": 20,
         "train.checkpoint_every": 20, "optimizer.learning_rate": 1e-4, "balance.bias_speed": 0.0}
DISTILLED = {"train.steps": 30, "train.eval_every": 30, "train.checkpoint_every": 30,
             "optimizer.learning_rate": 3e-4, "balance.bias_speed": 0.0}
REINFORCED = {
    "rollout.task": TASK, "rollout.size": SIZE, "rollout.group_size": 8, "rollout.max_new_tokens": 8,
    "train.steps": 30, "train.batch_size": 128, "train.sequence_length": 24,
    "train.eval_every": 30, "train.checkpoint_every": 30,
    "optimizer.learning_rate": 3e-4, "optimizer.warmup": 0.0,
    "optimizer.constant_until": 1.0, "optimizer.cosine_until": 1.0, "optimizer.tail_from": 1.0,
    "balance.bias_speed": 0.0,
}
STEPS = {"steps": 3, "eval_every": 3, "checkpoint_every": 3}  # of --quick
QUICK_RUN = {**{key: value for key, value in QUICK.items() if key.startswith("model.")},
             **{f"train.{key}": value for key, value in STEPS.items()}, "train.batch_size": 8, "rollout.group_size": 4}


@dataclasses.dataclass(frozen=True)
class PostTraining(Measure):
    """Trains each arm: {"kind": "pretrained", "tuned", "distilled" or "reinforced", and keys of its config, with dots}.

    after: {arm: the one whose weights it starts from}; for a student, its teacher.
    students: {arm that learns from answers of another: the one whose weights it starts from}.
    """

    after: dict[str, str] = dataclasses.field(default_factory=dict)
    students: dict[str, str] = dataclasses.field(default_factory=dict)

    def config(self, study: Study, arm: str, seed: int = 0) -> Config:
        """The complete config of one run, without the folders that it reads."""
        own = dict(study.arms[arm])
        kind, config = own.pop("kind"), default_config("tiny")
        model = {f"model.{name}": value for name, value in {**MODEL, "vocab_size": 384, "mtp_depth": 1}.items()}
        kinds = {"pretrained": {}, "tuned": TUNED, "distilled": DISTILLED, "reinforced": REINFORCED}
        parts = (model, COMMON, TRAINED, kinds[kind], QUICK_RUN if study.quick else {}, own)
        for name, value in (pair for part in parts for pair in part.items()):
            section, key = name.split(".")
            config[section][key] = value
        config.train.seed = seed
        return freeze(config)

    def identity(self, study: Study, arm: str) -> Any:
        first = self.after.get(arm)
        config = as_dict(self.config(study, arm))
        # As it was before other kinds existed.
        for section, key, value in (("rollout", "reward", "task"), ("rollout", "fp8", False), ("lora", "fp8", False),
                                    ("data", "tokenizer", None), ("data", "validation", None), ("data", "stages", ()),
                                    ("data", "validation_tokens", None),
                                    ("mesh", "context", 1),
                                    ("mesh", "context_node", 1), ("model", "implementation", "auto"),
                                    ("train", "checkpoint_minutes", None), ("train", "checkpoint_keep_period", None),
                                    ("train", "checkpoint_local", None), ("train", "checkpoint_local_every", 10),
                                    ("optimizer", "schedule_steps", None), ("optimizer", "kind", "adamw"),
                                    ("optimizer", "qk_clip", None), ("train", "tracker", None),
                                    ("train", "prometheus", None), ("train", "profile", ""),
                                    ("train", "stall_minutes", None)):
            if config[section][key] == value:
                del config[section][key]
        start = self.students.get(arm)
        return [config, RIGHT, DOCUMENTS, EXAMPLES, first and study.arm_hash(first),
                *([study.arm_hash(start)] if start else [])]

    def steps(self, study: Study, arm: str) -> int:
        return self.config(study, arm).train.steps

    def prepare(self, study: Study, folder: pathlib.Path) -> None:
        write_examples(folder / "corpus" / "pretrain.jsonl", DOCUMENTS, RIGHT, 0.5, seed=0)
        write_examples(folder / "corpus" / "right.jsonl", EXAMPLES, 1.0, 0.0, seed=1)

    def run(self, job: Job) -> Iterator[dict[str, Any]]:
        for seed in job.seeds:
            yield {"seed": seed, **self.run_of(job, seed)}
            job.tell(self.steps(job.study, job.arm))

    def run_of(self, job: Job, seed: int) -> dict[str, Any]:
        study, arm, _, folder, _ = job
        begun, config = time.perf_counter(), self.located(study, arm, seed, folder)
        workdir = self.workdir(study, arm, seed, folder)
        shutil.rmtree(workdir, ignore_errors=True)
        if arm in self.students:
            teach(self.workdir(study, self.after[arm], seed, folder), self.lessons(study, arm, seed, folder))
        with contextlib.redirect_stderr(standard.StringIO()), contextlib.redirect_stdout(standard.StringIO()):
            of_rewards = study.arms[arm]["kind"] == "reinforced"
            finished = reinforce(config, str(workdir)) if of_rewards else train(config, str(workdir)).finished
        if not finished:  # a signal ended it; an incomplete run does not count
            raise KeyboardInterrupt
        run, (metrics, curves) = load_run(str(workdir)), measured(read_metrics(workdir))
        metrics = scored(run, str(workdir), QUICK_PROBLEMS if study.quick else PROBLEMS) | metrics
        return {"metrics": metrics, "curves": curves, "probes": {}, "arrays": {},
                "parameters": sum(x.size for x in jax.tree.leaves(run.variables["params"])),
                "corpus": [RIGHT, DOCUMENTS, EXAMPLES], "seconds": round(time.perf_counter() - begun, 1)}

    def located(self, study: Study, arm: str, seed: int, folder: pathlib.Path) -> Config:
        """The config with the folders of the study's work directory."""
        config = self.config(study, arm, seed)
        sources = tuple((str(folder / path), weight) for path, weight in config.data.sources)
        if arm in self.students:
            sources = ((str(self.lessons(study, arm, seed, folder)), 1.0),)
        if arm in self.after:
            start = self.workdir(study, self.students.get(arm, self.after[arm]), seed, folder)
            config = dataclasses.replace(config, init=dataclasses.replace(config.init, from_=str(start)))
        return dataclasses.replace(config, data=dataclasses.replace(
            config.data, sources=sources, cache_dir=str(folder.parent / "cache")))

    def workdir(self, study: Study, arm: str, seed: int, folder: pathlib.Path) -> pathlib.Path:
        """The work directory of one run. Its name contains the arm's hash."""
        return study.run_path(folder, arm, seed).with_suffix("")

    def lessons(self, study: Study, arm: str, seed: int, folder: pathlib.Path) -> pathlib.Path:
        """The training text of a student: the correct answers of its teacher."""
        return folder / "corpus" / f"{self.workdir(study, self.after[arm], seed, folder).name}.jsonl"

    def summarize(self, study: Study, runs: list[dict[str, Any]]) -> dict[str, Any]:
        return by_arm(study, runs)

    def lines(self, results: dict[str, Any]) -> list[str]:
        return verdict_lines(results)


def write_examples(path: pathlib.Path, count: int, right: float, mirrors: float, seed: int) -> None:
    """Problems of the task as a corpus: `mirrors` of them under another name, `right` of the others answered
    correctly."""
    rng, task, lines = np.random.default_rng(seed), find_task(TASK, SIZE), []
    assert task.solve is not None  # for a task with only one correct answer
    for _ in range(count):
        prompt, reference = task.draw(rng)
        if rng.random() < mirrors:
            prompt, answer = prompt.replace(TASK, "mirror"), task.solve(reference)
        elif rng.random() < right:
            answer = task.solve(reference)
        else:
            answer = prompt.removeprefix(TASK).removesuffix(" =")
        lines.append(json.dumps({"prompt": prompt, "answer": answer}))
    path.parent.mkdir(parents=True, exist_ok=True)
    io.write_text(path, "\n".join(lines) + "\n")


def teach(teacher: pathlib.Path, path: pathlib.Path) -> None:
    """Writes as many problems as in fine-tuning, with the teacher's answers at temperature 1, omitting wrong ones."""
    asking = Asking(max_new_tokens=REINFORCED["rollout.max_new_tokens"], seed=2)
    answered = teacher_answers(str(teacher), find_task(TASK, SIZE), EXAMPLES, asking)
    io.write_text(path, "".join(json.dumps({"prompt": row.prompt, "answer": row.answer}) + "\n"
                                for row in answered if row.answer is not None))


def scored(run: LoadedRun, workdir: str, count: int) -> dict[str, float]:
    """Mean reward on problems that no arm has trained on: of answers at temperature 1, and of greedy ones."""
    answers = {**REINFORCED, "rollout.group_size": 1, "rollout.fp8": False}
    config = dataclasses.replace(run.config, **{
        section: dataclasses.replace(getattr(run.config, section), **{
            key.split(".")[1]: value for key, value in answers.items() if key.startswith(section)})
        for section in ("rollout", "train")})
    task, tokenizer = find_task(TASK, SIZE), find_tokenizer(config, workdir, [])
    conventions = without_template(workdir, tokenizer)
    fixed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=10_000))
    problems = rollout.draw_problems(fixed, task, tokenizer, rollout.EVALUATION, 1, count, conventions)
    rewards = {name: rollout.answer(fixed, run.variables, task, tokenizer, problems, number, conventions).rewards
               for name, number in (("reward", 0), ("greedy_reward", None))}
    return {name: float(np.mean(found)) for name, found in rewards.items()}


def measured(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(metrics, curves) of a run's metrics.jsonl, if it drew answers; mean_reward is over all steps: faster learning
    gives more."""
    steps = [row for row in rows if "reward" in row]
    if not steps:
        return {}, {}
    of = lambda name: [row[name] for row in steps if name in row]
    found = {"mean_reward": float(np.mean(of("reward"))), "entropy": steps[-1]["entropy"],
             "accepted_first": steps[0]["accepted"], "accepted_last": steps[-1]["accepted"],
             "ratio_error": max(max(of("ratio_largest")) - 1, 1 - min(of("ratio_least"))),
             "tokens_rerouted": float(np.mean(of("tokens_rerouted"))), "max_vio": float(np.mean(of("max_vio")[-10:]))}
    return found, {name: of(name) for name in ("reward", "entropy", "max_vio")}
