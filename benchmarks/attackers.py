"""The effect of hostile clients on others: 64 streams of a served run, with one kind of attacker at a time.

    python -m benchmarks.attackers --workdir run --rounds 3 --json benchmarks/results/attackers_cpu.json

For each kind, in turns: 64 streams alone, with the attackers, and with the attackers at an idle server on another port,
which shows the cost of sharing the machine's cores. It measures the tokens per second of the streams alone and of
streams and attackers together, the CPU time of the server and of the attackers while the streams run, and the longest
response time of /health, which a separate process requests every 50 ms. Linux only.
"""

import argparse
import asyncio
import contextlib
import datetime
import multiprocessing
import statistics
import time

from benchmarks import hostile_clients
from benchmarks.hostile_clients import ATTACKERS, ATTACKS, NEW, STREAMS, process
from benchmarks.machine import hardware, write_results


def measure(port: int, server: int, attacker: str | None = None, attacked: int | None = None,
            count: int = ATTACKERS) -> dict[str, float]:
    """Tokens per second of all streams together, how many of them failed, and the longest /health in seconds.

    all_tokens_per_second: of streams and attackers, from the request of the first stream to the end of the last.
    server_cpu, attackers_cpu: CPU seconds in that time; a busy core adds one per second.

    Args:
      server: its process id. attacked: the port that the `count` attackers connect to.
    """
    async def streams():
        asked = (hostile_clients.ask(port, hostile_clients.completion(seed=i)) for i in range(STREAMS))
        return await asyncio.gather(*asked, return_exceptions=True)

    longest = multiprocessing.get_context("spawn").Value("d", 0.0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(hostile_clients.probe, port, longest))
        pids = {"server_cpu": server}
        if attacker is not None:
            pids["attackers_cpu"] = stack.enter_context(process(hostile_clients.attack, attacker, attacked, count))
        time.sleep(2)  # until both are working
        read = lambda: {"all_tokens_per_second": hostile_clients.tokens_of(port)} | {
            name: hostile_clients.cpu_seconds(pid) for name, pid in pids.items()}
        before, start = read(), time.monotonic()
        answers = asyncio.run(streams())
        seconds = time.monotonic() - start
        used = {name: value - before[name] for name, value in read().items()}
    time.sleep(1)
    failed = sum(not isinstance(answer, bytes) or b"data: [DONE]" not in answer for answer in answers)
    used["all_tokens_per_second"] /= seconds
    return {"tokens_per_second": STREAMS * NEW / seconds, "failed": failed, "longest_health": longest.value,
            "seconds": seconds} | used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--attackers", type=int, default=ATTACKERS, help="connections of an attack at a time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in args.attacks}
    elsewhere = hostile_clients.free_port()
    with hostile_clients.served(args.workdir) as (port, server), process(hostile_clients.idle, elsewhere):
        measure(port, server)
        for name in args.attacks * args.rounds:
            found[name].append({"alone": measure(port, server),
                                "attacked": measure(port, server, name, port, args.attackers),
                                "idle server attacked": measure(port, server, name, elsewhere, args.attackers)})
            print(name, *(f"{side}: {x['tokens_per_second']:.0f} of {x['all_tokens_per_second']:.0f} tokens/s, /health "
                          f"{x['longest_health']:.2f} s, {x['failed']:.0f} failed, processor {x['server_cpu']:.1f} + "
                          f"{x.get('attackers_cpu', 0.0):.1f} s of {x['seconds']:.1f}"
                          for side, x in found[name][-1].items()), sep="; ", flush=True)
    share = lambda rows, side, rate="tokens_per_second": statistics.median(
        row[side][rate] / row["alone"][rate] for row in rows)
    if args.json:
        write_results(args.json, {
            "what": f"{STREAMS} streams of {NEW} tokens, alone and next to attackers, {args.attackers} of a kind",
            "date": datetime.date.today().isoformat(), "hardware": hardware(), "attacks": found,
            "median share of the tokens per second alone": {
                name: {side: share(rows, side) for side in ("attacked", "idle server attacked")}
                for name, rows in found.items()},
            "median share with the attackers' own tokens": {
                name: share(rows, "attacked", "all_tokens_per_second") for name, rows in found.items()}})


if __name__ == "__main__":
    main()
