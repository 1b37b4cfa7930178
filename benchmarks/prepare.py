"""`prepare` on made-up text of any size: megabytes per CPU second, the memory of its largest process, the speed-up of
two workers over one, and the time to start a run on the result.

    python -m benchmarks.prepare --gigabytes 0.2 1 --json benchmarks/results/prepare_cpu.json

Documents have 2.7 KB each, with words drawn from a Zipf law, punctuation, line breaks and numbers, all in ASCII; 16 MB
of them are written repeatedly in different orders. A tokenizer of 8,192 tokens is trained on the first ones beforehand.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.machine import hardware, write_results
from deepseek_jax.config import load_config
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import prepare
from deepseek_jax.data.tokenizer import train_tokenizer

WORDS, VOCAB = 30_000, 8192
# Usage of a process and its ended children. The caller is small because a child's peak starts at its parent's memory.
LAUNCH = """import json, resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, used.ru_maxrss]))"""
SYLLABLES = [a + b + c for a in "bcdfghlmnprstvw" for b in "aeiou" for c in ("", "n", "r", "s")]


def documents(seed: int = 0, size: int = 16_000_000) -> list[str]:
    """Texts of `size` bytes in total."""
    rng = np.random.default_rng(seed)
    counts = np.concatenate([np.full(60, 1), np.full(1500, 2), rng.choice([2, 3, 4], WORDS - 1560)])
    words = np.array(["".join(rng.choice(SYLLABLES, n)) for n in counts], object)
    shares = np.cumsum(1 / (np.arange(WORDS) + 3.7))
    texts, made = [], 0
    while made < size:
        n = int(rng.integers(200, 600))
        chosen = words[np.searchsorted(shares, rng.random(n) * shares[-1])].tolist()
        texts.append("".join(word + _behind(mark) for word, mark in zip(chosen, rng.random(n).tolist())))
        made += len(texts[-1])
    return texts


def _behind(mark: float) -> str:
    return next((text for most, text in ((0.01, ".\n\n"), (0.06, ". "), (0.12, ", ")) if mark < most),
                f" {int(mark * 1e5)} " if mark < 0.13 else " ")


def write_corpus(path: str, texts: list[str], gigabytes: float) -> int:
    """Writes rows of .jsonl. Returns the bytes of their texts."""
    rows, size, rng = [json.dumps({"text": text}) + "\n" for text in texts], 0, np.random.default_rng(1)
    with open(path, "w", encoding="utf-8") as f:
        while size < gigabytes * 1e9:
            f.writelines(rows[i] for i in rng.permutation(len(rows)).tolist())
            size += sum(map(len, texts))
    return size


def prepared(folder: str, keys: list[str], workers: int, size: int) -> dict[str, float]:
    """Tokenizes `folder`. Returns seconds, CPU seconds of all processes, and the peak memory of the largest."""
    command = [sys.executable, "-m", "deepseek_jax.prepare", "--config", "tiny", "--out", folder, "--workers",
               str(workers), *keys]
    begin = time.monotonic()
    found = subprocess.run([sys.executable, "-S", "-c", LAUNCH, *command], check=True, stdout=subprocess.PIPE).stdout
    seconds, (cpu, peak) = time.monotonic() - begin, json.loads(found)
    return {"workers": workers, "seconds": seconds, "cpu_seconds": cpu, "megabytes_a_cpu_second": size / 1e6 / cpu,
            "peak_megabytes": peak * 1024 / 1e6}


def started(workdir: str, keys: list[str]) -> dict[str, float]:
    """Seconds from the config to the first batch of a run, in a separate process."""
    begin = time.monotonic()
    config = load_config("tiny", keys)
    loader = Loader(config, prepare(config, workdir))
    made = time.monotonic()
    loader.batch(0)
    return {"tokens_and_loader": made - begin, "first_batch": time.monotonic() - made}


def measured(folder: str, gigabytes: float, texts: list[str], workers: list[int]) -> dict[str, Any]:
    """`prepared` of a corpus of that size with each number of workers, and `started` on the tokens of the last."""
    inside = lambda name: os.path.join(folder, name)
    size = write_corpus(inside("text.jsonl"), texts, gigabytes)
    keys = [f"--config.data.sources=(('{inside('text.jsonl')}', 1.0),)", f"--config.model.vocab_size={VOCAB}",
            f"--config.data.tokenizer={inside('tokenizer.json')}"]
    report: dict[str, Any] = {"bytes": size, "runs": []}
    for count in workers:
        report["runs"].append(prepared(inside(f"tokens{count}"), keys, count, size))
        print(report["runs"][-1], flush=True)
    pathlib.Path(inside("run")).mkdir()
    keys.append(f"--config.data.cache_dir={inside(f'tokens{workers[-1]}')}")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        report["start"] = pool.apply(started, (inside("run"), keys))
    print(report["start"], flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", help="where the text and its tokens are for the time being")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    texts, sizes = documents(), []
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    for gigabytes in args.gigabytes:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            train_tokenizer(texts, VOCAB).save(os.path.join(folder, "tokenizer.json"))
            sizes.append(measured(folder, gigabytes, texts, args.workers))
    if args.json:
        write_results(args.json, {"sizes": sizes, "machine": hardware()})


if __name__ == "__main__":
    main()
