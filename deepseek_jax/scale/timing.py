"""The time of a step: products at measured rates, the network, and the schedule's bubble (no jax).

    F   = work + waiting for dispatch and combine            F&B = work of both on the remaining SMs, or the network
    step = makespan of the validated schedule at these costs + optimizer and ZeRO's collectives

Work is uniform over the pipeline's ranks, ends included; a hand-balanced pipeline comes close to that.
"""

import dataclasses

from deepseek_jax.config import ModelConfig
from deepseek_jax.pipeline.orders import kind_of
from deepseek_jax.pipeline.schedule import Schedule
from deepseek_jax.pipeline.validate import cell_costs, validate
from deepseek_jax.scale.costs import layer_flops, parameters, training_flops_per_token
from deepseek_jax.scale.hardware import Hardware, Measured
from deepseek_jax.scale.layout import Layout
from deepseek_jax.scale.traffic import layer_traffic, step_traffic


@dataclasses.dataclass(frozen=True)
class Cell:
    """Seconds of one kind of cell: of the device's work, and of waiting for the network if nothing else runs."""

    work: float
    network: float = 0.0

    @property
    def alone(self) -> float:
        return self.work + self.network


@dataclasses.dataclass(frozen=True)
class Step:
    """A predicted step: seconds, the mean over ranks of those spent in each kind of cell, and derived figures.

    mfu: as published, of bf16's peak, MTP not counted: {"non-causal", "causal"}.
    """

    seconds: float
    cells: dict[str, float]
    per_cell: dict[str, float]
    bubble: float
    optimizer: float
    mfu: dict[str, float]
    tokens_a_second: float


def widths(c: ModelConfig, parts: int = 1) -> dict[str, int]:
    """The count of numbers that a token's products read and write in one layer, by part. parts: see
    `costs.layer_flops`."""
    H, K = c.num_heads, c.experts_per_token
    query = c.d_model + H * c.qk_head_dim + (2 * c.q_rank if c.q_rank else 0)
    kv = c.d_model + 2 * c.kv_rank + c.rope_head_dim + parts * H * (c.nope_head_dim + c.v_head_dim)
    ffn = lambda f: 2 * c.d_model + 3 * f
    return {"attention": query + kv + H * c.v_head_dim + c.d_model, "scores": 0,
            "shared": ffn(c.num_shared_experts * c.expert_ffn_dim), "experts": K * ffn(c.expert_ffn_dim),
            "dense": ffn(c.dense_ffn_dim)}


def _rates(c: ModelConfig, hw: Hardware, m: Measured) -> dict[str, float]:
    """FLOP/s that products reach, by pass."""
    if not (c.fp8.enabled and hw.fp8):
        return dict.fromkeys(("forward", "input", "weight"), m.product_bf16 * hw.bf16)
    return {"forward": m.product_fp8 * hw.fp8, "input": m.product_fp8 * hw.fp8, "weight": m.weight_fp8 * hw.fp8}


def _layer(c: ModelConfig, hw: Hardware, m: Measured, layout: Layout, parts) -> dict[str, float]:
    """Seconds of work of one layer and micro-batch on one device, by pass; "input" includes recomputation."""
    split = layout.mesh.parts
    flops, width, rates = layer_flops(c, layout.sequence_length, split), widths(c, split), _rates(c, hw, m)
    seconds = dict.fromkeys(rates, 0.0)
    for part in parts:
        for what, rate in rates.items():
            n = flops[part][what] + (flops[part]["again"] if what == "input" else 0)
            rate = m.attention * hw.bf16 if part == "scores" else rate
            # Between products everything is read and written once more: quantized, normed, gathered, activated.
            moved = 4 * width[part] / (m.memory * hw.memory_bandwidth)
            if part == "scores" and split > 1:
                moved += _looped(c, hw, m, layout, what)
            seconds[what] += layout.tokens / layout.mesh.tensor * (n / rate + moved)
    return seconds


def _looped(c: ModelConfig, hw: Hardware, m: Measured, layout: Layout, what: str) -> float:
    """Seconds per token for the memory traffic of scores in the loop over blocks, which a kernel avoids: a score in
    float32 and its probability in bfloat16, and in the backward pass again, with the gradients of both."""
    once = 2 * (4 + 2)  # bytes per pair, written and read
    runs = {"forward": 1, "input": 2 + ("attention" in c.recomputed)}.get(what, 0)
    pairs = c.num_heads * layout.sequence_length / 2
    return once * runs * pairs / (m.memory * hw.memory_bandwidth)


def _ends(c: ModelConfig, hw: Hardware, m: Measured, layout: Layout) -> dict[str, float]:
    """The head, once for the main model and once for every depth of MTP, in bf16."""
    flops = 2 * c.d_model * c.vocab_size * (1 + c.mtp_depth) + 4 * c.d_model * c.d_model * c.mtp_depth
    one = layout.tokens / layout.mesh.tensor * flops / (m.product_bf16 * hw.bf16)
    return {"forward": one, "input": one, "weight": one}


def cells(c: ModelConfig, hw: Hardware, layout: Layout, m: Measured, limited: bool = True) -> dict[str, Cell]:
    """F, Bi and W of one micro-batch on one rank with the mean share of layers and ends."""
    moe = _layer(c, hw, m, layout, ("attention", "scores", "shared", "experts"))
    dense = _layer(c, hw, m, layout, ("attention", "scores", "dense"))
    ends, layers = _ends(c, hw, m, layout), c.num_moe_layers + c.mtp_depth
    work = {what: m.slowdown * (layers * moe[what] + c.num_dense_layers * dense[what] + ends[what]) / layout.mesh.pipe
            for what in moe}
    # A sum of gradients is read and written in float32.
    held = sum(parameters(c).values()) - parameters(c)["experts"] * (1 - 1 / (layout.mesh.nodes * layout.mesh.local))
    work["weight"] += 8 * held / layout.mesh.pipe / layout.mesh.tensor / (m.memory * hw.memory_bandwidth)
    mine = layers / layout.mesh.pipe
    dispatch, combine = network_seconds(c, hw, layout, m, limited)
    network = mine * (dispatch + combine)
    if layout.mesh.pipe > 1:
        network += layout.tokens * c.d_model * 2 / hw.node_bandwidth
    again = mine * dispatch * ("dispatch" in c.recomputed)
    return {"F": Cell(work["forward"], network), "Bi": Cell(work["input"], network + again), "W": Cell(work["weight"])}


def network_seconds(c: ModelConfig, hw: Hardware, layout: Layout, m: Measured,
                    limited: bool = True) -> tuple[float, float]:
    """(Dispatch, combine) of one layer and micro-batch: for each the slower of the two networks, since the hops of
    different tokens run at the same time."""
    sent = layer_traffic(c, layout, limited)
    of = lambda way, share: max(sent[f"{way} across"] / (share * hw.node_bandwidth),
                                sent[f"{way} inside"] / (m.local * hw.local_bandwidth))
    return of("dispatch", m.dispatch), of("combine", m.combine)


def costs(cell: dict[str, Cell], m: Measured) -> dict[str, float]:
    """The costs for `pipeline.validate`, in seconds.

    In F&B both passes compute on the SMs that are not used for moving tokens, while the other's tokens are sent; the
    longer of the two counts, plus the part of the network's time that XLA's schedule does not hide.
    """
    f, bi, w = cell["F"], cell["Bi"], cell["W"]
    one, other = f.alone, bi.alone + w.alone
    work, network = f.work + bi.work + w.work, f.network + bi.network
    together = max(work / (1 - m.reserved), network) + m.exposed * network
    return {"f": one, "b": other, "w": w.alone, "fb": min(one + other, together)}


def optimizer_seconds(c: ModelConfig, hw: Hardware, layout: Layout, m: Measured) -> float:
    """AdamW on a device's masters, and ZeRO-1's reduce-scatter of gradients and all-gather of weights."""
    sent = step_traffic(c, layout)
    devices = layout.mesh.devices
    moment = {"bfloat16": 2, "float32": 4}[layout.moment_dtype]
    bytes_each = 4 + 2 * 4 + 2 * 2 * moment + 2  # gradient read; master and moments read and written; bf16 written
    update = bytes_each * sum(parameters(c).values()) / devices / (m.memory * hw.memory_bandwidth)
    mesh = layout.mesh
    fabric = hw.node_bandwidth if mesh.replica * mesh.context * mesh.nodes > 1 else hw.local_bandwidth
    return update + (sent["gradients"] + sent["weights"]) / fabric


def step(c: ModelConfig, hw: Hardware, layout: Layout, m: Measured | None = None, limited: bool = True) -> Step:
    """Predicts one step.

    Args:
      limited: False: tokens may go to any node, as without the router's group limit.
    """
    m = m or Measured()
    cell = cells(c, hw, layout, m, limited)
    optimizer = optimizer_seconds(c, hw, layout, m)
    schedule = layout.pipeline
    overlapped = layout.schedule.startswith("dualpipe")
    share = 1.0 if schedule is None else layout.mesh.pipe / schedule.stages
    each = {name: share * t for name, t in costs(cell, m).items()}
    if schedule is None:
        bubble, spent = 0.0, {"F": layout.microbatches * each["f"], "B": layout.microbatches * each["b"]}
        seconds = sum(spent.values())
    else:
        report = validate(schedule, each)
        bubble, seconds = sum(report.idle) / schedule.ranks, report.makespan
        spent = spent_in(schedule, each)
        middle = {"F&B": each["fb"]} if overlapped else {"F": each["f"], "B": each["b"]}
        more = (layout.microbatches - schedule.microbatches) * schedule.stages / schedule.ranks
        spent = {name: t + more * middle.get(name, 0) for name, t in spent.items()}
        seconds += more * sum(middle.values())
    seconds += optimizer
    done = layout.tokens_a_step
    peak = seconds * layout.mesh.devices * hw.bf16
    counted = dataclasses.replace(c, mtp_depth=0)
    mfu = {name: done * training_flops_per_token(counted, layout.sequence_length, causal=name == "causal") / peak
           for name in ("non-causal", "causal")}
    return Step(seconds, spent, each, bubble, optimizer, mfu, done / seconds)


def spent_in(schedule: Schedule, each: dict[str, float]) -> dict[str, float]:
    """Mean over ranks of the seconds in each kind of cell; Bi under B, as in the published table."""
    time = cell_costs(each)
    total: dict[str, float] = {}
    for rank in range(schedule.ranks):
        for cell in schedule.order(rank):
            name = kind_of(cell)
            total["B" if name == "Bi" else name] = total.get("B" if name == "Bi" else name, 0) + time[name]
    return {name: t / schedule.ranks for name, t in total.items()}
