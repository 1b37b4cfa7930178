"""The serving capacity of one device: bytes of weights and cache, users, and bounds on tokens per second (no jax).

    users  = (memory - reserve - weights) / cache of one user, in full pages
    step  >= bytes read / bandwidth,  bytes = weights that every token uses + experts touched + caches of all users
    experts touched by B tokens that choose K of E each = E (1 - (1 - K/E)^B), for uniform routing

The bounds are data-sheet figures divided by these counts: nothing is measured, and no program reaches them.
"""

import dataclasses
import math

from deepseek_jax.config import PRESETS, ModelConfig, model_config
from deepseek_jax.scale.costs import active_product_parameters, latent_core_products, parameters
from deepseek_jax.scale.hardware import HARDWARE, Hardware, device, smallest
from deepseek_jax.scale.memory import cache_per_token, cache_read, served_weights

PAGE = 32  # tokens of a page of the engine's cache
PUBLISHED = 1e9  # parameters: presets with fewer are this project's own, and are not suggested as replacements
RESERVE = 0.1  # share of the memory for temporaries of compiled programs, gaps between buffers, the driver


@dataclasses.dataclass(frozen=True)
class Asked:
    """context: cached tokens of each user. fp8: weights in FP8, else in the model's type. cache: format of the
    latents."""

    context: int = 4096
    fp8: bool = False
    cache: str = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Bound:
    """Upper bounds on tokens per second of all users together. experts: those of a MoE layer that one step uses."""

    batch: int
    experts: float
    by_memory: float
    by_flops: float

    @property
    def tokens_a_second(self) -> float:
        return min(self.by_memory, self.by_flops)


@dataclasses.dataclass(frozen=True)
class Served:
    """Bytes on the device, and the rest.

    room: for the cache; negative if weights alone are too large. token, user: of cache. longest: tokens
    that there is room for. bounds: at a batch of 1, and of all users.
    """

    weights: float
    reserve: float
    room: float
    token: int
    user: int
    users: int
    longest: int
    bounds: tuple[Bound, ...]


def weights_in(c: ModelConfig, fp8: bool) -> str:
    """The type of the weights that decoding reads."""
    return "fp8" if fp8 else c.dtype


def bound(c: ModelConfig, hw: Hardware, batch: int, asked: Asked) -> Bound:
    """The bounds of steps of `batch` users, each with a full context."""
    size = served_weights(c, weights_in(c, asked.fp8))
    share = 1 - (1 - c.experts_per_token / c.num_experts)**batch
    read = size["others"] + share * size["experts"] + batch * cache_read(c, asked.cache, asked.context)
    active = active_product_parameters(c)
    products = 2 * (sum(active.values()) - active["mtp"])
    core = 2 * c.num_layers * latent_core_products(c, asked.context)
    peak = hw.fp8 if asked.fp8 and hw.fp8 else hw.bf16
    return Bound(batch, share * c.num_experts, by_memory=batch * hw.memory_bandwidth / read,
                 by_flops=1 / (products / peak + core / hw.bf16))


def serve(c: ModelConfig, hw: Hardware, asked: Asked) -> Served:
    """Plans one device without drafting: `serve --depth 0`."""
    weights = sum(served_weights(c, weights_in(c, asked.fp8)).values())
    room = (1 - RESERVE) * hw.memory - weights
    token = cache_per_token(c, asked.cache)
    pages = max(math.floor(room / (PAGE * token)) - 1, 0)  # one is the scratch page
    a_user = -(-asked.context // PAGE)
    users = pages // a_user
    batches = (1,) if users < 2 else (1, users)
    return Served(weights, RESERVE * hw.memory, room, token, a_user * PAGE * token, users, pages * PAGE,
                  tuple(bound(c, hw, batch, asked) for batch in batches) if users else ())


def instead(c: ModelConfig, hw: Hardware, asked: Asked, found: Served) -> str:
    """The memory that a model lacks to serve a single user, and what would fit."""
    lacking = found.user + PAGE * found.token - found.room
    would = []
    if found.longest:
        would.append(f"a context of {found.longest:,} tokens")
    if asked.cache != "fp8" and serve(c, hw, dataclasses.replace(asked, cache="fp8")).users:
        would.append("--cache fp8")
    if not asked.fp8 and hw.fp8 and serve(c, hw, dataclasses.replace(asked, fp8=True)).users:
        would.append("a server that computes with FP8 weights (--fp8)")
    sizes = {name: sum(parameters(model_config(name)).values()) for name in PRESETS}
    smaller = [name for name, size in sizes.items() if PUBLISHED < size < sum(parameters(c).values())
               and serve(model_config(name), hw, asked).users]
    if smaller:
        would.append(f"--model {max(smaller, key=lambda name: sizes[name])}")
    larger = [name for name in HARDWARE if device(name).memory > hw.memory and serve(c, device(name), asked).users]
    if larger:
        would.append(f"--hardware {smallest(larger)}")
    size = served_weights(c, weights_in(c, asked.fp8))
    for devices in (n for n in range(2, c.num_experts + 1) if c.num_experts % n == 0):
        each = size["experts"] / devices + size["others"] + size["embedding"]
        each += found.user + PAGE * found.token
        if each <= (1 - RESERVE) * hw.memory:
            would.append(f"{devices} devices that share the experts ({each / 1e9:.1f} GB each)")
            break
    return f"{lacking / 1e9:,.1f} GB too much for one user; what would fit: " + ("; ".join(would) or "nothing known")
