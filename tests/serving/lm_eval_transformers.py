"""Scores and greedy texts of lm-eval tasks: our engine and server compared with transformers in float32.

    python -m deepseek_jax.serve --hf DIR --name model --port 8000 --max-length 257
    python -m tests.serving.lm_eval_transformers DIR --server http://127.0.0.1:8000

DIR is a Hugging Face checkpoint (`convert to-hf --dtype float32`). Needs lm-eval (`[api]`), transformers and torch. The
tasks are made from lines of this project's code: the right end of a line, bits per byte of its beginning, the next 16
tokens.
"""

import argparse
import json
import pathlib
import random
import sys
import tempfile

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

import deepseek_jax
from deepseek_jax.chat import template as chat_template
from deepseek_jax.serving.harness import EngineLM
from deepseek_jax.workdir import load
from tests.serving.lm_eval_tasks import TASKS

LENGTH = 256  # tokens of context and continuation


def rows(count: int) -> list[dict]:
    """Lines cut in two, each with three ends of which one is the right one."""
    rng = random.Random(0)
    files = sorted(pathlib.Path(deepseek_jax.__file__).parent.rglob("*.py"))
    lines = [line.strip() for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if 40 < len(line) < 100]
    chosen = []
    for line in rng.sample(lines, count):
        cut = rng.randint(len(line) // 3, 2 * len(line) // 3)
        ends = [line[cut:], *(other[len(other) // 2:] for other in rng.sample(lines, 2))]
        label = rng.randrange(3)
        ends[0], ends[label] = ends[label], ends[0]
        chosen.append({"q": line[:cut], "choices": ends, "label": label})
    return chosen


def texts(found: dict) -> list[str]:
    """The generated texts, in the order of the rows."""
    samples = sorted(found["samples"]["writing"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--server", metavar="URL", help="a server of the checkpoint, under the name `model`")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(args.rows)))
        for name, text in TASKS.items():
            text = text.replace("DATA", str(data)).replace("max_gen_toks: 5", "max_gen_toks: 16")
            pathlib.Path(folder, f"{name}.yaml").write_text(text)
        cfg, variables, tokenizer = load(args.checkpoint, hf=True, on_host=True)
        model = EngineLM(cfg, variables, tokenizer, chat_template.of_folder(args.checkpoint, tokenizer, chats=False),
                         LENGTH)
        models = {"ours": model, "transformers": HFLM(args.checkpoint, dtype="float32", device="cpu", max_length=LENGTH,
                                                      batch_size=1)}
        if args.server:
            models["server"] = LocalCompletionsAPI(model="model", base_url=f"{args.server}/v1/completions",
                                                   tokenizer=args.checkpoint, max_length=LENGTH + 1)
        found = {name: simple_evaluate(one, tasks=list(TASKS), task_manager=TaskManager(include_path=folder),
                                       bootstrap_iters=0, log_samples=True) for name, one in models.items()}
    theirs, failed = found.pop("transformers"), False
    for name, ours in found.items():
        differ = 0
        for task, scores in ours["results"].items():
            for metric, value in scores.items():
                if isinstance(value, float):
                    other = theirs["results"][task][metric]
                    differ += int(abs(value - other) > 1e-5 * abs(other))
                    print(f"{name:8s}{task:12s}{metric.removesuffix(',none'):18s}{value:18.6f}{other:18.6f}")
        pairs = list(zip(texts(ours), texts(theirs), strict=True))
        written = sum(a != b for a, b in pairs)
        failed |= bool(differ or written)
        print(f"{name}: {differ} scores differ by more than 1e-5 of their size, {written} of {len(pairs)} texts "
              f"({len({b for _, b in pairs})} of them unlike the others).")
    sys.exit(failed)


if __name__ == "__main__":
    main()
