"""What one device can serve: bytes of weights and cache, users, and bounds on tokens per second (no jax).

    users  = (memory - reserve - weights - parameters as loaded) / cache of one user, in full pages
    step  >= bytes read / bandwidth,  bytes = weights that every token uses + experts touched + caches of all users
    experts touched by B tokens that choose K of E each = E (1 - (1 - K/E)^B), for uniform routing

The bounds are data sheets' figures over these counts: nothing is measured, and no program reaches them.
"""

import dataclasses
import math

from deepseek_jax.config import PRESETS, ModelConfig, model_config
from deepseek_jax.scale.costs import active_product_parameters, latent_core_products, parameters
from deepseek_jax.scale.hardware import HARDWARE, Hardware, device, smallest
from deepseek_jax.scale.memory import FLOAT32, KINDS, cache_per_token, served_weights

PAGE = 32  # tokens of a page of the engine's cache
PUBLISHED = 1e9  # parameters: presets with fewer are this project's own, and no replacement
RESERVE = 0.1  # of the memory: temporaries of compiled programs, gaps between buffers, the driver


@dataclasses.dataclass(frozen=True)
class Asked:
    """context: cached tokens of each user. dtype: of the checkpoint, "fp8" or a type of numbers. cache: format of the
    latents."""

    context: int = 4096
    dtype: str = "bfloat16"
    cache: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Bound:
    """Upper bounds on tokens per second of all users together. experts: of a MoE layer that one step touches."""

    batch: int
    experts: float
    by_memory: float
    by_flops: float

    @property
    def tokens_a_second(self) -> float:
        return min(self.by_memory, self.by_flops)


@dataclasses.dataclass(frozen=True)
class Served:
    """Bytes on the device, and what they leave.

    loaded: the checkpoint's own parameters, which `deepseek_jax.serve` keeps next to the weights that it lays out.
    room: for the cache; below zero where weights alone are too much. token, user: of cache. longest: tokens
    that there is room for. bounds: at a batch of 1, and of all users.
    """

    weights: float
    loaded: float
    reserve: float
    room: float
    token: int
    user: int
    users: int
    longest: int
    bounds: tuple[Bound, ...]


def computes_in(c: ModelConfig, dtype: str) -> str:
    """The type of the weights that decoding reads, given the checkpoint's."""
    return "fp8" if dtype == "fp8" else c.dtype


def loaded(c: ModelConfig, dtype: str) -> float:
    """Bytes of a checkpoint's parameters, of which the weights laid out are a copy; routers are float32.

    Nothing for "fp8": this program lays FP8 checkpoints out in bfloat16, so that is about a server which does not.
    """
    if dtype == "fp8":
        return 0
    routers = (c.num_moe_layers + c.mtp_depth) * c.num_experts * c.d_model
    biases = (c.num_moe_layers + c.mtp_depth) * c.num_experts * c.has_router_bias
    return KINDS[dtype] * (sum(parameters(c).values()) - routers) + FLOAT32 * (routers + biases)


def bound(c: ModelConfig, hw: Hardware, batch: int, asked: Asked) -> Bound:
    """The bounds of steps of `batch` users, each with a full context."""
    dtype = computes_in(c, asked.dtype)
    size = served_weights(c, dtype)
    share = 1 - (1 - c.experts_per_token / c.num_experts)**batch
    read = size["others"] + share * size["experts"] + batch * asked.context * cache_per_token(c, asked.cache)
    active = active_product_parameters(c)
    products = 2 * (sum(active.values()) - active["mtp"])
    core = 2 * c.num_layers * latent_core_products(c, asked.context)
    peak = hw.fp8 if dtype == "fp8" and hw.fp8 else hw.bf16
    return Bound(batch, share * c.num_experts, by_memory=batch * hw.memory_bandwidth / read,
                 by_flops=1 / (products / peak + core / hw.bf16))


def serve(c: ModelConfig, hw: Hardware, asked: Asked) -> Served:
    """Plans one device without drafting: `serve --depth 0`."""
    weights, kept = sum(served_weights(c, computes_in(c, asked.dtype)).values()), loaded(c, asked.dtype)
    room = (1 - RESERVE) * hw.memory - weights - kept
    token = cache_per_token(c, asked.cache)
    pages = max(math.floor(room / (PAGE * token)) - 1, 0)  # one is the scratch page
    a_user = -(-asked.context // PAGE)
    users = pages // a_user
    batches = (1,) if users < 2 else (1, users)
    return Served(weights, kept, RESERVE * hw.memory, room, token, a_user * PAGE * token, users, pages * PAGE,
                  tuple(bound(c, hw, batch, asked) for batch in batches) if users else ())


def instead(c: ModelConfig, hw: Hardware, asked: Asked, found: Served) -> str:
    """By how much a model that cannot serve a single user does not fit, and what would."""
    lacking = found.user + PAGE * found.token - found.room
    would = []
    if found.longest:
        would.append(f"a context of {found.longest:,} tokens")
    if asked.cache != "fp8" and serve(c, hw, dataclasses.replace(asked, cache="fp8")).users:
        would.append("--cache fp8")
    if asked.dtype != "fp8" and hw.fp8 and serve(c, hw, dataclasses.replace(asked, dtype="fp8")).users:
        would.append("a server that computes with FP8 weights (--dtype fp8)")
    sizes = {name: sum(parameters(model_config(name)).values()) for name in PRESETS}
    smaller = [name for name, size in sizes.items() if PUBLISHED < size < sum(parameters(c).values())
               and serve(model_config(name), hw, asked).users]
    if smaller:
        would.append(f"--model {max(smaller, key=lambda name: sizes[name])}")
    larger = [name for name in HARDWARE if device(name).memory > hw.memory and serve(c, device(name), asked).users]
    if larger:
        would.append(f"--hardware {smallest(larger)}")
    size = served_weights(c, computes_in(c, asked.dtype))
    for devices in (n for n in range(2, c.num_experts + 1) if c.num_experts % n == 0):
        each = (size["experts"] + found.loaded) / devices + size["others"] + size["embedding"]
        each += found.user + PAGE * found.token
        if each <= (1 - RESERVE) * hw.memory:
            would.append(f"{devices} devices that share the experts ({each / 1e9:.1f} GB each)")
            break
    return f"{lacking / 1e9:,.1f} GB too much for one user; what would fit: " + ("; ".join(would) or "nothing known")
