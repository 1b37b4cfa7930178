"""The speed of decoding: bounds set by the network, and by reading weights and caches (no jax).

Two micro-batches alternate: one computes while the other's tokens are at the experts (report, section 3.4.2).

    layer = 2 max(network of one micro-batch, work of one)      tokens/s of a user = tokens a step / (layers x layer)
"""

import dataclasses

from deepseek_jax.config import ConfigError, ModelConfig
from deepseek_jax.scale.costs import (
    attended,
    attention_parameters,
    decodes_sparsely,
    ffn_parameters,
    latent_core_products,
)
from deepseek_jax.scale.hardware import Hardware, Measured
from deepseek_jax.scale.memory import cache_row, index_row


@dataclasses.dataclass(frozen=True)
class Serving:
    """devices: that share the experts, with one or more each. batch: sequences per device. context: average cached
    tokens per sequence. tensor: devices that share a sequence's attention."""

    devices: int
    batch: int
    context: int
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Seconds of one layer and micro-batch, and tokens per second of a user and of a node of 8 devices."""

    network: float
    work: float
    tokens_a_user: float
    tokens_a_node: float
    bound_a_user: float  # if only the network mattered


def network_seconds(c: ModelConfig, hw: Hardware, tokens: float) -> float:
    """FP8 out, bf16 back, to each routed expert and to the shared one, which counts as one more."""
    return 3 * tokens * (c.experts_per_token + c.num_shared_experts) * c.d_model / hw.node_bandwidth


def decode(c: ModelConfig, hw: Hardware, serving: Serving, measured: Measured | None = None,
           accepted: float | None = None, cache_bytes: int | None = None) -> Decoding:
    """Predicts a decode step.

    Args:
      accepted: share of MTP's drafts that are right; each step then verifies two tokens of every sequence and runs the
        MTP layer. None: without MTP.
      cache_bytes: of one token's latent and rotated key in one layer; None: bf16.
    """
    m = measured or Measured()
    cache = cache_bytes or cache_row(c, "bfloat16")
    each = 1 if accepted is None else 2
    sequences = serving.batch / 2  # of a micro-batch
    tokens = sequences * each
    read = m.memory * hw.memory_bandwidth
    attention, expert = attention_parameters(c), ffn_parameters(c, c.expert_ffn_dim)
    experts = -(-c.num_experts // serving.devices) + c.num_shared_experts
    weights = (attention / serving.tensor + experts * expert) / read  # FP8: a byte a parameter
    products = 2 * tokens * (attention / serving.tensor + (c.experts_per_token + c.num_shared_experts) * expert)
    core = 2 * tokens * latent_core_products(c, serving.context)
    cached = attended(c, serving.context) * cache
    cached += serving.context * index_row(c, "bfloat16") if decodes_sparsely(c) else 0
    core = max(core / (m.attention * hw.bf16), sequences * cached / read) / serving.tensor
    work = m.slowdown * (max(weights, products / (m.product_fp8 * (hw.fp8 or hw.bf16))) + core)
    network = network_seconds(c, hw, tokens)
    layers = c.num_layers + (accepted is not None)
    a_step = 1 if accepted is None else 1 + accepted
    rate = lambda seconds: a_step / (2 * layers * seconds)
    user = rate(max(network, work))
    return Decoding(network, work, user, 8 * serving.batch * user, rate(network))


def check_published(model: str, devices: int | None) -> None:
    """Raises ConfigError if the published layouts do not apply: another model, or a single device."""
    if model != "v3_671b" or devices == 1:
        raise ConfigError("--decode compares with the published layouts of v3_671b, on 144 devices and more; for one "
                          "device of yours take --serve.")


def published(c: ModelConfig, hw: Hardware) -> list[dict]:
    """Published layouts, with and without MTP, next to the published figures (report, section 3.4; arXiv 2505.09343,
    section 2.3; open-infra-index)."""
    cases = [
        ("network bound, 32 tokens a micro-batch", Serving(256, 64, 1), {"bound_a_user": 67.0}),
        ("report: 40 nodes, TP4, EP320", Serving(320, 64, 4096, tensor=4), {}),
        ("production: 18 nodes, EP144", Serving(144, 88, 5000), {"tokens_a_user": 21.0, "tokens_a_node": 14800.0}),
    ]
    rows = []
    for name, serving, theirs in cases:
        for accepted in (None, 0.875):
            found = decode(c, hw, serving, accepted=accepted)
            rows.append({"layout": name, "mtp": accepted is not None, **dataclasses.asdict(serving),
                         **dataclasses.asdict(found), "published": theirs if accepted is None else {}})
    return rows
