"""The cost of training a model on a machine: memory, step time, MFU, hours, dollars, and the best layout.

No jax, and nothing runs: counts from `costs`, bytes from `memory`, times from `timing`, whose measured terms are named
in `hardware.Measured`; the bubble is that of the schedule's table, checked by `pipeline.validate`.
"""

import dataclasses
import itertools
from typing import Any

from deepseek_jax.config import PARTS, ConfigError, ModelConfig
from deepseek_jax.config.model import RECOMPUTABLE
from deepseek_jax.scale import memory, timing
from deepseek_jax.scale.costs import conventions, training_flops_per_token
from deepseek_jax.scale.hardware import Hardware, Measured
from deepseek_jax.scale.layout import Layout, Split, make_layout

TOKENS = 14.8e12  # report, section 4.2
BEST = 5  # number of layouts that a search returns
# GPU-hours that the report spent after pre-training (section 1, table 1): taken over, not modelled.
AFTERWARDS = {"context extension": 119e3, "post-training": 5e3}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One layout, evaluated. `bytes` per device by group; `hours` of one device for all tokens; `dollars` for them."""

    layout: Layout
    step: timing.Step
    bytes: dict[str, float]
    memory: float
    hours_per_trillion: float
    hours: float
    dollars: float | None

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.memory


def check_known(c: ModelConfig) -> None:
    """Raises ConfigError for a model with custom parts, whose traffic and work the planner does not know."""
    for name, published in PARTS.items():
        if getattr(c, name) != published:
            raise ConfigError(f"model.{name}={getattr(c, name)!r} is not known to the planner, which counts the "
                              f"published models; plan with {published!r}.")


def plan(c: ModelConfig, hw: Hardware, layout: Layout, tokens: float = TOKENS, price: float | None = None,
         measured: Measured | None = None, limited: bool = True) -> Plan:
    """Evaluates one layout.

    Args:
      tokens: of the complete training. price: dollars per device-hour; None: the machine's.
      limited: see `timing.step`.
    """
    check_known(c)
    step = timing.step(c, hw, layout, measured, limited)
    per_token = layout.mesh.devices / step.tokens_a_second / 3600
    price = hw.price if price is None else price
    return Plan(layout, step, memory.bytes_per_device(c, layout, hw.kernels), hw.memory, 1e12 * per_token,
                tokens * per_token, None if price is None else price * tokens * per_token)


@dataclasses.dataclass(frozen=True)
class Remat:
    """A choice of recomputation: ModelConfig.remat, bytes per device, seconds of a step, and whether it fits."""

    remat: str
    bytes: float
    seconds: float
    fits: bool


def cheapest_remat(c: ModelConfig, hw: Hardware, layout: Layout, measured: Measured | None = None,
                   limited: bool = True) -> list[Remat]:
    """Choices of recomputation until a layout fits: values are added in order of bytes saved per second spent.

    Args:
      measured, limited: as for `plan`.
    Returns:
      The choices in order, "none" first. The last one fits, or none does.
    """
    def needed(remat):
        return sum(memory.bytes_per_device(dataclasses.replace(c, remat=remat), layout, hw.kernels).values())

    def cell(remat):  # of both passes; the true step time is the schedule's makespan, which is slow to compute
        model, m = dataclasses.replace(c, remat=remat), measured or Measured()
        one = timing.costs(timing.cells(model, hw, layout, m, limited), m)
        overlap = layout.mesh.pipe > 1 and layout.schedule.startswith("dualpipe")
        return one["fb"] if overlap else one["f"] + one["b"]

    def of(remat):
        total = needed(remat)
        seconds = timing.step(dataclasses.replace(c, remat=remat), hw, layout, measured, limited).seconds
        return Remat(remat, total, seconds, total <= hw.memory)

    tried, left, names = [of("none")], list(RECOMPUTABLE), []
    if not tried[-1].fits:
        tried.append(of("report"))
    while left and not tried[-1].fits:
        before = tried[-1].remat
        name = max(left, key=lambda name: (needed(before) - needed(",".join([*names, name]))) /
                   max(cell(",".join([*names, name])) - cell(before), 1e-9))
        names.append(name)
        left.remove(name)
        tried.append(of(",".join(names)))
    if not tried[-1].fits:
        tried.append(of("full"))
    return tried


def what_to_change(c: ModelConfig, layout: Layout, found: Plan) -> str:
    """The bytes that a layout lacks, and the change to try first: the one that reduces its largest group."""
    over = (found.total_bytes - found.memory) / 1e9
    largest = max(found.bytes, key=lambda group: found.bytes[group])
    first = {"kept": "a smaller capacity" if layout.mesh.capacity is None or layout.mesh.capacity > 1.25 else
             "remat=full" if c.remat != "full" else "fewer rows, or more devices along pipe or expert",
             "experts' products": "a machine for whose experts' products there are kernels (h100, h200, TPUs)",
             "buffers": "another schedule: this one puts weight gradients off",
             "passing": "fewer rows"}.get(largest, "more devices along pipe or expert")
    if largest == "kept" and layout.schedule == "gpipe" and layout.mesh.pipe > 1:
        first = "another schedule: gpipe keeps every micro-batch"
    return (f"needs {over:.1f} GB more than there is; most is {memory.LABELS[largest]} "
            f"({found.bytes[largest] / 1e9:.1f} GB): try {first}")


def what_fits(c: ModelConfig, hw: Hardware, found: Plan) -> str:
    """The cheapest recomputation that would make a layout fit, and its cost; "" if there is none.
    """
    last = cheapest_remat(c, hw, found.layout)[-1]
    if not last.fits:
        return ""
    return (f"--remat {last.remat} fits: {last.bytes / 1e9:.1f} GB, and {last.seconds - found.step.seconds:+.2f} s a "
            "step")


# Many parameters: the question, and the fixed values of what is searched.
def search(c: ModelConfig, hw: Hardware, devices: int, sequences: int, sequence_length: int = 4096,
           price: float | None = None, tokens: float = TOKENS, remats: tuple[str, ...] = ("none", "report", "full"),
           deferred: int | None = None, parts: int = 1,
           **mesh: Any) -> tuple[list[tuple[str, Plan]], dict[str, tuple[int, tuple | None]]]:
    """The fastest layouts that fit, over pipe, expert, rows, remat and schedule; the other devices are replicas.

    Args:
      remats: to try; "auto": for each layout the cheapest that fits. deferred: see Layout. parts: of a sequence.
      mesh: fields of MeshConfig.
    Returns:
      (the BEST (remat, Plan), best first; {reason: (how many layouts failed, the one that came nearest)}).
    """
    powers = [2**i for i in range(13)]
    fitting: list[tuple[str, Plan]] = []
    reasons: dict[str, list] = {}
    for pipe, expert, rows, remat in itertools.product(powers[:6], powers[:9], powers[:3], remats):
        if devices % (pipe * expert):
            continue
        for schedule in ("1f1b", "zb1p", "dualpipe", "dualpipev") if pipe > 1 else ("1f1b",):
            try:
                layout = make_layout(c, Split(devices, pipe, expert, node_size=hw.node_size, parts=parts), sequences,
                                     rows, sequence_length, schedule, deferred, **mesh)
            except ConfigError as error:
                _note(reasons, _kind(str(error)), None)
                continue
            chosen = cheapest_remat(c, hw, layout)[-1].remat if remat == "auto" else remat
            model = dataclasses.replace(c, remat=chosen)
            needed = sum(memory.bytes_per_device(model, layout, hw.kernels).values())
            if needed > hw.memory:
                _note(reasons, "does not fit into memory", (needed - hw.memory, layout.name, chosen))
                continue
            fitting.append((chosen, plan(model, hw, layout, tokens, price)))
    fitting.sort(key=lambda found: found[1].hours)
    return fitting[:BEST], {name: (len(all_), min((x for x in all_ if x), default=None))
                            for name, all_ in sorted(reasons.items(), key=lambda item: -len(item[1]))}


def _note(reasons, name, nearest):
    reasons.setdefault(name, []).append(nearest)


def _kind(message: str) -> str:
    """A short name for a family of error messages, so that they can be counted."""
    for part, name in (("needs at least", "too few micro-batches for the schedule"),
                       ("do not fill nodes", "experts do not fill nodes"),
                       ("parts of a sequence", "too few nodes for the parts of a sequence"),
                       ("do not fill", "too few sequences a step"),
                       ("MoE layers that stages", "more pipeline ranks than MoE layers"),
                       ("does not divide", "experts or groups do not divide")):
        if part in message:
            return name
    return "the schedule's ranks or micro-batches are odd"


def ablations(c: ModelConfig, hw: Hardware, layout: Layout, measured: Measured | None = None) -> list[dict[str, Any]]:
    """The value of each of the report's inventions: the layout without one of them, and without all of them, each with
    the cheapest recomputation that makes it fit.

    Returns:
      [{"without", "remat", "seconds", "times", "mfu", "gigabytes", "fits"}]: of a step; times: as long as with all.
    """
    bf16 = dataclasses.replace(c, fp8=dataclasses.replace(c.fp8, enabled=False))
    on = lambda **mesh: dataclasses.replace(layout, mesh=dataclasses.replace(layout.mesh, **mesh))
    cases = [
        ("nothing: the report's layout", c, layout, True),
        ("DualPipe: 1F1B", c, dataclasses.replace(layout, schedule="1f1b"), True),
        ("DualPipe: ZB1P", c, dataclasses.replace(layout, schedule="zb1p", deferred=None), True),  # with 0 it is 1F1B
        ("FP8: bf16 products and dispatch", bf16, on(dispatch_fp8=False), True),
        ("two hops: flat dispatch", c, on(dispatch="flat"), True),
        ("the limit of 4 nodes", c, layout, False),
        ("two hops and the limit", c, on(dispatch="flat"), False),
        ("all of them", bf16,
         dataclasses.replace(on(dispatch="flat", dispatch_fp8=False), schedule="1f1b"), False),
    ]
    rows: list[dict] = []
    for name, model, changed, limited in cases:
        model = dataclasses.replace(model, remat=cheapest_remat(model, hw, changed, measured, limited)[-1].remat)
        found = plan(model, hw, changed, measured=measured, limited=limited)
        rows.append({"without": name, "remat": model.remat, "fits": found.fits, "seconds": found.step.seconds,
                     "mfu": found.step.mfu["non-causal"],
                     "times": found.step.seconds / (rows[0]["seconds"] if rows else found.step.seconds),
                     "gigabytes": found.total_bytes / 1e9})
    return rows


def sparsity(c: ModelConfig, sequence_length: int = 4096) -> dict[str, float]:
    """The value of sparsity: FLOPs of a token if all parameters were active, divided by those of this model."""
    ours = training_flops_per_token(dataclasses.replace(c, mtp_depth=0), sequence_length)
    counted = conventions(c)
    idle = counted["main model"] - counted["active per token"]
    return {"gflop_per_token": ours / 1e9, "gflop_if_dense": (ours + 6 * idle) / 1e9, "times": 1 + 6 * idle / ours}


def published(found: Plan) -> list[dict]:
    """A plan of the report's run and the published figures (arXiv 2505.09343, table 4; report, section 1)."""
    # A layout that defers no weight gradient has no W of its own: all of them are part of B.
    cells, afterwards = {"W": 0.0, **found.step.cells}, sum(AFTERWARDS.values())
    total = (found.hours_per_trillion * TOKENS / 1e12 + afterwards) / 1e6
    rows = [("step, s", 19.926, found.step.seconds, ""), ("F alone, s", 1.13, cells["F"], ""),
            ("B alone, s", 1.99, cells["B"], ""), ("W alone, s", 0.48, cells["W"], ""),
            ("F&B overlapped, s", 13.95, cells["F&B"], "slowdown is fitted to it, with nothing exposed"),
            ("bubble, s", 2.06, found.step.bubble, ""), ("optimizer, s", 0.29, found.step.optimizer, ""),
            ("MFU, non-causal", 0.4373, found.step.mfu["non-causal"], ""),
            ("MFU, causal", 0.3894, found.step.mfu["causal"], ""),
            ("thousand GPU-hours per trillion tokens", 180, found.hours_per_trillion / 1e3, ""),
            ("million GPU-hours, 14.8T tokens and after", 2.788, total, "what came after pre-training taken over"),
            ("million dollars at $2", 5.576, 2 * total, "price taken over")]
    return [{"what": what, "published": theirs, "planned": ours, "ratio": ours / theirs, "note": note}
            for what, theirs, ours, note in rows]
