"""What hostile clients cost the others: 64 streams of a served run next to one kind of attacker at a time.

    python -m benchmarks.attackers --workdir run --rounds 3 --json benchmarks/results/attackers_cpu.json

For each kind, in turns: 64 streams alone, with the attackers, and with the attackers at an idle server on another port,
which is what they cost by sharing the machine's cores. Printed are the streams' tokens per second and the longest that
/health took, which a process of its own asks for every 50 ms.
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


def measure(port: int, attacker: str | None = None, attacked: int | None = None) -> dict[str, float]:
    """Tokens per second of all streams together, how many of them failed, and the longest /health in seconds.

    attacked: the port that the attackers go for.
    """
    async def streams():
        asked = (hostile_clients.ask(port, hostile_clients.completion(seed=i)) for i in range(STREAMS))
        return await asyncio.gather(*asked, return_exceptions=True)

    longest = multiprocessing.get_context("spawn").Value("d", 0.0)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(hostile_clients.probe, port, longest))
        if attacker is not None:
            stack.enter_context(process(hostile_clients.attack, attacker, attacked))
        time.sleep(2)  # until both are at work
        start = time.monotonic()
        answers = asyncio.run(streams())
        seconds = time.monotonic() - start
    time.sleep(1)
    failed = sum(not isinstance(answer, bytes) or b"data: [DONE]" not in answer for answer in answers)
    return {"tokens_per_second": STREAMS * NEW / seconds, "failed": failed, "longest_health": longest.value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in args.attacks}
    elsewhere = hostile_clients.free_port()
    with hostile_clients.served(args.workdir) as port, process(hostile_clients.idle, elsewhere):
        measure(port)
        for name in args.attacks * args.rounds:
            found[name].append({"alone": measure(port), "attacked": measure(port, name, port),
                                "idle server attacked": measure(port, name, elsewhere)})
            print(name, *(f"{side}: {x['tokens_per_second']:.0f} tokens/s, /health {x['longest_health']:.2f} s, "
                          f"{x['failed']:.0f} failed" for side, x in found[name][-1].items()), sep="; ", flush=True)
    share = lambda rows, side: statistics.median(
        row[side]["tokens_per_second"] / row["alone"]["tokens_per_second"] for row in rows)
    if args.json:
        write_results(args.json, {
            "what": f"{STREAMS} streams of {NEW} tokens, alone and with {ATTACKERS} attackers of one kind at a time",
            "date": datetime.date.today().isoformat(), "hardware": hardware(), "attacks": found,
            "median share of the tokens per second alone": {
                name: {side: share(rows, side) for side in ("attacked", "idle server attacked")}
                for name, rows in found.items()}})


if __name__ == "__main__":
    main()
