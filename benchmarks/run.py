"""Times training commands beside each other, in the same run on the same machine.

Machines drift: neighbours, clocks, page caches. So each side is started several times and the sides take turns
(A B A B ...), every start a fresh process that warms up and then prints JSON lines with `tokens_per_second`. What is
reported is the median over all starts, and the first side's median over each other side's.

    python benchmarks/run.py --json benchmarks/results/train_cpu.json
    python benchmarks/run.py --side ours="python benchmarks/train_step.py" --side eager="... --experts eager"

Uses the standard library alone, since no side's environment is the other's.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys

from deepseek_jax import io

HERE = pathlib.Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peer" / "bin" / "python"

# glibc gives freed memory back to the kernel, which clears every page again. All sides keep theirs, in huge pages.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_ARENA_MAX": "1",
             "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def default_sides():
    """Our step with bfloat16 and float32 products, and the peer where `make bench` could install it."""
    ours = [sys.executable, "benchmarks/train_step.py"]
    sides = {"deepseek_jax": [*ours, "--dtype=bfloat16"], "deepseek_jax_float32": [*ours, "--dtype=float32"]}
    if PEER.exists():
        peer = [str(PEER), "benchmarks/peer_transformers.py"]
        sides |= {"transformers": [*peer, "--dtype=float32"], "transformers_autocast": [*peer, "--dtype=bfloat16"]}
    else:
        print("No .venv-peer with torch (make bench makes it where it can): timing our side alone.", file=sys.stderr)
    return sides


def start(name, command):
    """Runs one side once and returns the rows it printed. Ends the program if the side fails."""
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | ALLOCATOR)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        last = (done.stderr.strip() or done.stdout.strip() or "it printed nothing").splitlines()[-1]
        sys.exit(f"{name} failed with exit code {done.returncode}: {last}\n  {shlex.join(command)}")
    return rows


def hardware():
    """The machine in words."""
    model = platform.processor()
    cpuinfo, meminfo = pathlib.Path("/proc/cpuinfo"), pathlib.Path("/proc/meminfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    memory = int(meminfo.read_text().split()[1]) // 2**20 if meminfo.exists() else None
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.system()}


def shown(command):
    """The command without this machine's paths."""
    words = [pathlib.Path(word) for word in command]
    inside = [word.relative_to(HERE.parent) if word.is_relative_to(HERE.parent) else word.name for word in words]
    return " ".join(str(part) if word.is_absolute() else str(word) for word, part in zip(words, inside))


def summarize(name, command, starts):
    """Median over the starts, each start being the median of its own repeats, and how far the starts lie apart."""
    speeds = [statistics.median(row["tokens_per_second"] for row in rows) for rows in starts]
    last = starts[-1][-1]
    facts = {key: last[key] for key in ("dtype", "threads", "parameters", "settings", "versions") if key in last}
    return {"command": shown(command), "tokens_per_second": statistics.median(speeds), "lowest": min(speeds),
            "highest": max(speeds), "starts": speeds, "loss": last.get("loss"), **facts}


def table(report):
    first = next(iter(report["sides"]))
    yield f"{'':22} {'tokens/s':>9} {'lowest':>9} {'highest':>9}   {first} is"
    for name, side in report["sides"].items():
        ratio = report["ratios"].get(name)
        yield (f"{name:22} {side['tokens_per_second']:9,.0f} {side['lowest']:9,.0f} {side['highest']:9,.0f}"
               + (f"   {ratio:.2f} x as fast" if ratio else ""))


def main():
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
              "command": shown(["python", "benchmarks/run.py", *sys.argv[1:]]),
              "sides": {name: summarize(name, sides[name], starts[name]) for name in sides}}
    first, *others = report["sides"]
    report["ratios"] = {name: round(report["sides"][first]["tokens_per_second"]
                                    / report["sides"][name]["tokens_per_second"], 3) for name in others}
    print("\n".join(table(report)))
    if args.json:
        pathlib.Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        io.write_json(args.json, report, indent=1)


if __name__ == "__main__":
    main()
