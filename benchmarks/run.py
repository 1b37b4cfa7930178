"""Times training commands against each other, in the same run on the same machine.

The speed of a machine drifts: other load, clock rates, page caches. So each side is started several times and the sides
take turns (A B A B ...); every start is a new process that warms up and then prints JSON lines with
`tokens_per_second`. The report has the median over all starts, and the ratio of the first side's median to each other
side's.

    python -m benchmarks.run --json benchmarks/results/train_cpu.json
    python -m benchmarks.run --side ours="python -m benchmarks.train_step" --side eager="... --experts eager"

Uses only the standard library, since the sides have different environments.
"""

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator

from benchmarks.machine import PEER, ROOT, hardware, shown, write_results

# glibc returns freed memory to the kernel, which then clears every page again. Here all sides keep it, in huge pages.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_ARENA_MAX": "1",
             "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def default_sides() -> dict[str, list[str]]:
    """Our step with bfloat16 and float32 products, and the peer where `make bench` could install it."""
    ours = [sys.executable, "-m", "benchmarks.train_step"]
    sides = {"deepseek_jax": [*ours, "--dtype=bfloat16"], "deepseek_jax_float32": [*ours, "--dtype=float32"]}
    if PEER.exists():
        peer = [str(PEER), "-m", "benchmarks.peer_transformers"]
        sides |= {"transformers": [*peer, "--dtype=float32"], "transformers_autocast": [*peer, "--dtype=bfloat16"]}
    else:
        print("No .venv-peer with torch (make bench makes it where it can): timing our side alone.", file=sys.stderr)
    return sides


def start(name: str, command: list[str]) -> list[dict]:
    """Runs one side once and returns the rows it printed. Ends the program if the side fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | ALLOCATOR)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        sys.exit(f"{name} failed with exit code {done.returncode}: {last}\n  {shlex.join(command)}")
    return rows


def summarize(command: list[str], starts: list[list[dict]]) -> dict:
    """The median over the starts of the medians of their repeats, and the range of these medians."""
    speeds = [statistics.median(row["tokens_per_second"] for row in rows) for rows in starts]
    last = starts[-1][-1]
    facts = {key: last[key] for key in ("dtype", "threads", "parameters", "settings", "versions") if key in last}
    return {"command": shown(command), "tokens_per_second": statistics.median(speeds), "lowest": min(speeds),
            "highest": max(speeds), "starts": speeds, "loss": last.get("loss"), **facts}


def table(report: dict) -> Iterator[str]:
    first = next(iter(report["sides"]))
    yield f"{'':22} {'tokens/s':>9} {'lowest':>9} {'highest':>9}   {first} is"
    for name, side in report["sides"].items():
        ratio = report["ratios"].get(name)
        yield (f"{name:22} {side['tokens_per_second']:9,.0f} {side['lowest']:9,.0f} {side['highest']:9,.0f}"
               + (f"   {ratio:.2f} x as fast" if ratio else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", action="append", default=[], metavar="NAME=COMMAND", help="replaces the default ones")
    parser.add_argument("--starts", type=int, default=5, help="processes a side; the sides take turns")
    parser.add_argument("--repeats", type=int, default=3, help="rows a process")
    parser.add_argument("--steps-per-repeat", type=int, default=2)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--json", metavar="FILE", help="also write the report here")
    args = parser.parse_args()
    if any("=" not in side for side in args.side) or args.starts < 1:
        parser.error("a side looks like --side name='python program.py', and --starts is at least 1.")

    sides = {name: shlex.split(command) for name, command in (side.split("=", 1) for side in args.side)}
    flags = [f"--repeats={args.repeats}", f"--steps-per-repeat={args.steps_per_repeat}", f"--warmup={args.warmup}"]
    sides = {name: [*command, *flags] for name, command in (sides or default_sides()).items()}
    starts = {name: [] for name in sides}
    for turn in range(args.starts):
        for name, command in sides.items():
            starts[name].append(start(name, command))
            speed = statistics.median(row["tokens_per_second"] for row in starts[name][-1])
            print(f"{turn + 1}/{args.starts} {name}: {speed:,.0f} tokens/s", file=sys.stderr, flush=True)

    report = {"what": "training, tokens per second: forward, backward, clipping and AdamW; 8 x 512 tokens a step",
              "date": datetime.date.today().isoformat(), "hardware": hardware(),
              "environment": ALLOCATOR, "load_at_end": round(os.getloadavg()[0], 2),
              "command": shown(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
              "sides": {name: summarize(sides[name], starts[name]) for name in sides}}
    first, *others = report["sides"]
    report["ratios"] = {name: round(report["sides"][first]["tokens_per_second"]
                                    / report["sides"][name]["tokens_per_second"], 3) for name in others}
    print("\n".join(table(report)))
    if args.json:
        write_results(args.json, report)


if __name__ == "__main__":
    main()
