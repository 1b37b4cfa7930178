"""See the package: python -m benchmarks.gpu [--out DIR] [--minutes 25] [--smoke] [--rehearse]."""

import argparse
import datetime
import pathlib
import signal
import sys
import tempfile
from typing import Any

import benchmarks.gpu
from benchmarks.gpu import report
from benchmarks.gpu.runner import run_all, run_stage
from benchmarks.gpu.stage import read
from benchmarks.gpu.stages import COMPILE, MACHINE, SMOKE, STAGES
from benchmarks.machine import shown
from deepseek_jax import io

SAME = ("device", "packages", "commit", "rehearse")  # what must be equal for the results of two runs to belong together


def machine_here(out: pathlib.Path, rehearse: bool) -> dict[str, Any]:
    """Facts about this machine, which are written to out/machine.json.

    Raises:
      ValueError: it has no Hopper GPU, or `out` has results of another machine or version of the code.
    """
    with tempfile.TemporaryDirectory() as folder:
        found = run_stage(MACHINE, pathlib.Path(folder), float("inf"), rehearse)
        facts = read(f"{folder}/machine.json").get("machine", {})
    if facts.get("state") != "done":
        raise ValueError(f"jax finds no device: {facts.get('why') or found.get('why') or found['state']}")
    facts["rehearse"] = rehearse
    if facts["kernels"] != "hopper" and not rehearse:
        raise ValueError(f"this needs a Hopper GPU (H100, H200, H800) and jax 0.11.2, and this machine has "
                         f"{facts['device']!r}; --rehearse runs the same stages anywhere.")
    before = read(str(out / "machine.json")).get("machine")
    if before and (other := [name for name in SAME if before.get(name) != facts[name]]):
        raise ValueError(f"{out} has results of a run with another {', '.join(other)}; name another "
                         "folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    io.write_json(out / "machine.json", {"machine": facts}, indent=1)
    return facts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=benchmarks.gpu.__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR", type=pathlib.Path,
                        help="results, logs and report.md (default: build/gpu, of a rehearsal build/gpu-rehearsal)")
    parser.add_argument("--minutes", type=float, default=25, help="after which nothing runs any more (default: 25)")
    parser.add_argument("--smoke", action="store_true", help="the first stage alone")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU and without a limit of time")
    args = parser.parse_args()
    args.out = args.out or pathlib.Path("build/gpu-rehearsal" if args.rehearse else "build/gpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a child ends with this process
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes:g} leaves no time; the default is 25.")
    try:
        facts = machine_here(args.out, args.rehearse)
        head = {"date": datetime.date.today().isoformat(), "minutes": args.minutes, "machine": facts,
                "command": shown(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])}
        stages = (SMOKE,) if args.smoke else STAGES + (COMPILE,) * args.rehearse
        right = run_all(stages, args.out, args.minutes, args.rehearse, head)
        report.write(args.out)
    except (OSError, ValueError) as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    print(f"{args.out / 'report.md'} has the tables.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
