"""A checkpoint of several processes on one disk: how long process 0 works after the others, and what each reads.

    python -m benchmarks.checkpoints --gigabytes 4 --folder DIR --json benchmarks/results/checkpoints_cpu.json
    python -m benchmarks.checkpoints --files 521664 --json benchmarks/results/checkpoints_files_cpu.json

The state is split over the processes as in a large run. Process 0 joins the lists of files and renames the folder when
all have written and flushed theirs. The kernel counts the bytes that are read (/proc/self/io). The second command uses
made-up names: it measures the CPU time for the manifest of that many files, and for the lengths of empty files.
"""

import argparse
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks.machine import hardware
from deepseek_jax import io, storage
from deepseek_jax.checkpoint import agreement, manifest
from deepseek_jax.checkpoint.manager import Checkpoints
from deepseek_jax.parallel.processes import joined

LEAVES = 200  # about as many as a state of v3_671b has


def read_so_far() -> int:
    """Bytes that this process has read, from the disk or the page cache."""
    words = dict(line.split(": ") for line in pathlib.Path("/proc/self/io").read_text().splitlines())
    return int(words["rchar"])


def one_process(workdir: str, gigabytes: float, local: str | None) -> dict[str, float]:
    """Saves and restores this process's part. Returns seconds and bytes."""
    sharding = NamedSharding(jax.make_mesh((jax.device_count(),), ("all",)), PartitionSpec("all"))
    rows = int(gigabytes * 1e9 / 4 / LEAVES / 1024) // jax.device_count() * jax.device_count()
    make = jax.jit(lambda i: jnp.full((rows, 1024), i, jnp.float32) + jnp.arange(rows)[:, None], out_shardings=sharding)
    state = {f"leaf{i}": make(i) for i in range(LEAVES)}
    checkpoints = Checkpoints(workdir, local=local)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints.restore(abstract)
    jax.block_until_ready(state)
    agreement.wait_for_all("made")
    begin = time.monotonic()
    (checkpoints.save_local if local else checkpoints.save)(1, state, {})
    copied = time.monotonic() - begin
    checkpoints.wait()
    if checkpoints.local:
        checkpoints.local.wait()
    saved = time.monotonic()  # one clock for all processes of a machine
    agreement.wait_for_all("saved")
    before, begun = read_so_far(), time.monotonic()
    found = Checkpoints(workdir, local=local).restore(abstract)
    assert found is not None
    jax.block_until_ready(found[0])
    seconds = time.monotonic() - begun
    same = all(bool((a == b).all()) for i, a in state.items() for b in [found[0][i]])
    checkpoints.close()
    return {"copied": copied, "saved_at": saved, "save": saved - begin, "restore": seconds, "same": same,
            "read": read_so_far() - before, "own": sum(x.nbytes for x in state.values()) / jax.process_count()}


def of_files(number: int, folder: str) -> dict[str, object]:
    """Seconds of CPU for the files of a large checkpoint, independent of their content."""
    def timed(call):
        begin = time.process_time()
        value = call()
        return value, time.process_time() - begin

    names = [f"state-0123456789ab/params.layers.experts.gate/c.{i // 2048}.{i % 2048}" for i in range(number)]
    path, some = os.path.join(folder, "manifest.json"), [os.path.join(folder, str(i)) for i in range(number // 5)]
    known = {name: [1 << 26, zlib.crc32(name.encode())] for name in names}
    _, write = timed(lambda: io.write_json(path, {"files": dict(sorted(known.items()))}, indent=None, sync=True))
    _, read = timed(lambda: manifest.files_of(folder))
    for name in some:
        pathlib.Path(name).touch()
    _, lengths = timed(lambda: storage.in_parallel(os.path.getsize, some))
    data = os.urandom(1 << 26)
    _, crc = timed(lambda: [zlib.crc32(data) for _ in range(10)])
    return {"files": number, "megabytes_of_manifest": os.path.getsize(path) / 1e6, "cpu_seconds_to_write_it": write,
            "cpu_seconds_to_read_it": read, "files_with_lengths": len(some), "cpu_seconds_of_lengths": lengths,
            "crc32_gigabytes_per_second": len(data) * 10 / crc / 1e9, "machine": hardware()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--folder", help="on the disk to measure (default: that of temporary files)")
    parser.add_argument("--local", help="save to folders in this one as to train.checkpoint_local")
    parser.add_argument("--files", type=int, help="measure what that many files take, and nothing else")
    parser.add_argument("--json", help="write the result there")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a process: work directory, address, number
    args = parser.parse_args()
    if args.one:
        workdir, address, number = args.one
        from deepseek_jax.parallel.meeting import Group

        with joined(Group(address, args.processes, int(number))):
            local = args.local and os.path.join(args.local, f"machine_{number}")  # each with a copy of another's
            print("found " + json.dumps(one_process(workdir, args.gigabytes, local)), flush=True)
        return
    if args.files:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            result = of_files(args.files, folder)
        print(json.dumps(result, indent=2))
        if args.json:
            io.write_json(args.json, result)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as workdir, socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
        free.close()
        own = [*sys.argv[1:], "--one", workdir, address]
        every = [subprocess.Popen([sys.executable, "-m", "benchmarks.checkpoints", *own, str(i)], text=True,
                                  stdout=subprocess.PIPE, env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"})
                 for i in range(args.processes)]
        said = [process.communicate()[0] for process in every]
    found = [json.loads(words.split("found ")[1]) for words in said]
    last = max(one["saved_at"] for one in found[1:])
    result = {
        "gigabytes": sum(one["own"] for one in found) / 1e9, "processes": args.processes, "local": bool(args.local),
        "same": all(one["same"] for one in found),
        "seconds_copied_to_host": max(one["copied"] for one in found),
        "seconds_saved": max(one["save"] for one in found),
        "seconds_of_process_0_after_the_others": None if args.local else found[0]["saved_at"] - last,
        "seconds_restored": max(one["restore"] for one in found),
        "gigabytes_read_by_each": [round(one["read"] / 1e9, 3) for one in found],
        "gigabytes_held_by_each": found[0]["own"] / 1e9, "machine": hardware()}
    print(json.dumps(result, indent=2))
    if args.json:
        io.write_json(args.json, result)


if __name__ == "__main__":
    main()
