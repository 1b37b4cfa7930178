"""The planner's results, as text and as plain dictionaries (no jax)."""

import dataclasses
from typing import Any

from deepseek_jax.scale.finetune import Finetuned, Step
from deepseek_jax.scale.hardware import Hardware
from deepseek_jax.scale.memory import LABELS
from deepseek_jax.scale.plan import Plan, Remat
from deepseek_jax.scale.serve import Asked, Served

REPORT = "pipe 16, expert 64 over 8 nodes, 2 replicas, dualpipe, 120 x 1 sequences"


def flat(found: Plan) -> dict[str, Any]:
    """A Plan, JSON-able."""
    return {"layout": found.layout.name, "mesh": dataclasses.asdict(found.layout.mesh),
            "step": dataclasses.asdict(found.step), "bytes": found.bytes, "bytes_per_device": found.total_bytes,
            "memory": found.memory, "fits": found.fits, "hours_per_trillion_tokens": found.hours_per_trillion,
            "hours": found.hours, "dollars": found.dollars}


def counts(result: dict[str, Any]) -> str:
    """Parameters of {"model", "parameters", "conventions"}, by group and under every convention."""
    lines = [f"{result['model']}: parameters"]
    lines += [f"  {name:50} {n:19,}" for name, n in result["parameters"].items() if n]
    return "\n".join(lines + [""] + [f"  {name:50} {n:19,}" for name, n in result["conventions"].items()])


def planned(found: Plan, advice: str) -> str:
    """One layout: GB a device by group, seconds of a step by cell, MFU, device-hours, dollars; `advice` if it does
    not fit."""
    step = found.step
    lines = ["", found.layout.name, ""]
    lines += [f"  {LABELS[name]:44} {size / 1e9:8.2f} GB" for name, size in found.bytes.items() if size]
    verdict = "fits" if found.fits else f"DOES NOT FIT: {advice}"
    lines += [f"  {'per device':44} {found.total_bytes / 1e9:8.2f} GB of {found.memory / 1e9:.0f}: {verdict}", "",
              f"  step {step.seconds:.3g} s = " + " + ".join(
                  f"{t:.3g} {name}" for name, t in (*step.cells.items(), ("bubble", step.bubble),
                                                    ("optimizer", step.optimizer)) if t),
              f"  MFU {step.mfu['non-causal']:.1%} ({step.mfu['causal']:.1%} causal) of bf16's peak, "
              f"{step.tokens_a_second:,.0f} tokens/s",
              f"  {found.hours_per_trillion:,.0f} device-hours per trillion tokens, {found.hours:,.0f} in all"
              + (f", ${found.dollars:,.0f}" if found.dollars is not None else " (give --price for dollars)")]
    return "\n".join(lines)


def chosen_remat(tried: list[Remat]) -> str:
    """The choices of `plan.cheapest_remat`, and the cost of each."""
    lines = ["", f"  {'--remat auto, by bytes saved for seconds spent':62} {'GB':>7} {'s':>7} {'+ s':>6}"]
    for before, one in zip((tried[0], *tried), tried):
        lines.append(f"  {one.remat:62} {one.bytes / 1e9:7.1f} {one.seconds:7.2f} {one.seconds - before.seconds:6.2f}")
    return "\n".join(lines)


def published(rows: list[dict[str, Any]]) -> str:
    """The result of `plan.published`: the report's figures next to the planned ones."""
    lines = ["", f"  {'':44} {'published':>10} {'planned':>10} {'ratio':>6}"]
    return "\n".join(lines + [f"  {r['what']:44} {r['published']:10.4g} {r['planned']:10.4g} {r['ratio']:6.2f}  "
                              f"{r['note']}".rstrip() for r in rows])


def ablated(rows: list[dict[str, Any]], sparsity: dict[str, float]) -> str:
    """The results of `plan.ablations` and `plan.sparsity`: seconds of a step without each invention."""
    lines = ["", f"  {'a step without':36} {'s':>7} {'times':>6} {'MFU':>7} {'GB':>7}  remat"]
    lines += [f"  {r['without']:36} {r['seconds']:7.2f} {r['times']:6.2f} {r['mfu']:7.1%} {r['gigabytes']:7.1f}  "
              f"{r['remat']}{'' if r['fits'] else ': DOES NOT FIT'}" for r in rows]
    lines.append(f"  and were every parameter active, a token would take {sparsity['gflop_if_dense']:,.0f} GFLOP "
                 f"instead of {sparsity['gflop_per_token']:,.0f}: {sparsity['times']:.1f} times")
    return "\n".join(lines)


def searched(best: list[tuple[str, Plan]], reasons: dict[str, tuple[int, tuple | None]]) -> str:
    """The result of `plan.search`: the fastest layouts, and how many others fail for which reason."""
    lines = ["", f"  {'layouts that fit, fastest first':86} {'remat':7} {'s':>7} {'MFU':>6} {'GB':>6}"]
    lines += [f"  {p.layout.name:86} {remat:7} {p.step.seconds:7.2f} {p.step.mfu['non-causal']:6.1%} "
              f"{p.total_bytes / 1e9:6.1f}" for remat, p in best]
    if not best:
        lines.append("  none")
    lines.append("  the others:")
    for name, (number, nearest) in reasons.items():
        near = f"; nearest: {nearest[1]}, remat {nearest[2]}, {nearest[0] / 1e9:.1f} GB too much" if nearest else ""
        lines.append(f"  {number:5} {name}{near}")
    return "\n".join(lines)


def decoded(rows: list[dict[str, Any]]) -> str:
    """Rows of `decoding`: microseconds of a step's network and work, tokens a second of a user and a node."""
    lines = ["", f"  {'decoding':40} {'MTP':>4} {'network us':>10} {'work us':>8} {'/s user':>8} {'bound':>6} "
                 f"{'/s node':>8}"]
    for r in rows:
        theirs = ", ".join(f"published {name}: {value:g}" for name, value in r["published"].items())
        lines.append(f"  {r['layout']:40} {'yes' if r['mtp'] else 'no':>4} {r['network'] * 1e6:10.0f} "
                     f"{r['work'] * 1e6:8.0f} {r['tokens_a_user']:8.1f} {r['bound_a_user']:6.1f} "
                     f"{r['tokens_a_node']:8.0f}  {theirs}".rstrip())
    return "\n".join(lines)


def _departures(name: str, hw: Hardware) -> list[str]:
    """A note if the machine's products run in another precision than their name says."""
    return [f"  {name}, {kind}: {hw.sources[kind]}" for kind in ("bf16", "fp8") if hw.sources[kind] != "sheet"]


def served(name: str, hw: Hardware, asked: Asked, found: Served, advice: str) -> str:
    """The plan of serving on one device; `advice`: what would fit if this does not."""
    rows = [("weights, laid out for decoding", found.weights), ("reserve for programs and driver", found.reserve),
            ("left for the cache", found.room)]
    kind = "fp8" if asked.fp8 else "the model's type"
    lines = [f"serving on one {name}, {hw.memory / 1e9:.0f} GB; weights in {kind}, cache in {asked.cache}", ""]
    lines += [f"  {what:38} {size / 1e9:10,.2f} GB" for what, size in rows if size]
    lines += [f"  {'cache of one token, all layers':38} {found.token:10,} bytes",
              f"  {f'cache of one user, {asked.context:,} tokens':38} {found.user / 1e9:10,.3f} GB", ""]
    if not found.users:
        return "\n".join([*lines, f"  DOES NOT FIT: {advice}"])
    lines += [f"  fits: {found.users:,} users of {asked.context:,} tokens; room for {found.longest:,} in all", "",
              "  upper bounds from data sheet and counts, not measurements; every user has a full context:",
              f"  {'users':>7} {'experts touched a layer':>24} {'tokens/s by memory':>19} {'by FLOPs':>12} "
              f"{'bound, all':>12} {'a user':>9}"]
    lines += [f"  {b.batch:7,} {b.experts:24.1f} {b.by_memory:19,.0f} {b.by_flops:12,.0f} {b.tokens_a_second:12,.0f} "
              f"{b.tokens_a_second / b.batch:9,.1f}" for b in found.bounds]
    if asked.fp8:
        lines.append("  deepseek_jax.serve does not do this: it lays FP8 checkpoints out in bfloat16")
    return "\n".join(lines + _departures(name, hw))


def finetuned(name: str, hw: Hardware, step: Step, rows: list[Finetuned], advice: str) -> str:
    """The plan of fine-tuning on one device, a column for each remat policy; `advice` where none of them fits."""
    lines = [f"fine-tuning all parameters on one {name}, {hw.memory / 1e9:.0f} GB: {step.sequences} x {step.context:,} "
             f"tokens a step, {step.rows} at once, moments in {step.moments}", "",
             f"  {'GB, with remat':44}" + "".join(f" {row.remat:>10}" for row in rows)]
    groups = [group for group in LABELS if any(row.bytes[group] for row in rows)]
    lines += [f"  {LABELS[group]:44}" + "".join(f" {row.bytes[group] / 1e9:10,.2f}" for row in rows)
              for group in groups]
    most = lambda n: f"{n:,}" if n else "-"
    per = lambda what, values: f"  {what:44}" + "".join(f" {value:>10}" for value in values)
    lines += [per("in all", [f"{row.total / 1e9:,.2f}" for row in rows]),
              per(f"of the usable {rows[0].usable / 1e9:.1f}, left",
                  [f"{(row.usable - row.total) / 1e9:,.2f}" for row in rows]),
              per("fits", ["yes" if row.fits else "no" for row in rows]),
              per("longest context that fits", [most(row.longest) for row in rows]),
              per("most sequences at once that fit", [most(row.most_sequences) for row in rows])]
    if not any(row.fits for row in rows):
        lines += ["", f"  DOES NOT FIT: {advice}"]
    return "\n".join(lines + _departures(name, hw))
