"""What machines can do, one row each, with where every figure comes from (no jax).

Bandwidths are bytes per second in one direction of one device. "report": DeepSeek-V3's report, section 3; "DeepEP",
"DeepGEMM", "FlashMLA": those projects' published tables, measured on H800s; "sheet": the vendor's data sheet.
"""

import dataclasses

from deepseek_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its fabrics.

    bf16, fp8: peak FLOP/s of dense products; fp8 None: no FP8 units, so such products run at bf16's rate.
    memory: bytes. memory_bandwidth: bytes/s. local_bandwidth: to the devices of its node (of a pod: over ICI);
    node_bandwidth: to other nodes. node_size: devices that the fast fabric joins in one node of training.
    price: dollars per device-hour; None: unknown, so that --price has to say it.
    """

    bf16: float
    fp8: float | None
    memory: float
    memory_bandwidth: float
    local_bandwidth: float
    node_bandwidth: float
    node_size: int
    price: float | None
    sources: dict[str, str]


_FIGURES = ("bf16", "fp8", "memory", "memory_bandwidth", "local_bandwidth", "node_bandwidth", "node_size")
_SHEET = dict.fromkeys(_FIGURES, "sheet")
_NO_PRICE = _SHEET | {"price": "none; give --price"}
_NDR = _SHEET | {"node_bandwidth": "sheet: one 400 Gbit/s NIC a GPU", "price": "none; give --price"}
_ICI = "sheet: ICI, half of its bidirectional total; the torus joins all chips, so nodes are no slower"

HARDWARE = {
    "h800": Hardware(989e12, 1979e12, 80e9, 3.35e12, 160e9, 50e9, 8, 2.0,
                     _SHEET | {"local_bandwidth": "report, 3.2.2: 160 GB/s", "node_bandwidth": "report, 3.2.2: 50 GB/s",
                               "price": "report, section 1: assumed rent"}),
    "h100": Hardware(989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9, 8, None, _NDR),
    "h200": Hardware(989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9, 8, None, _NDR),
    "b200": Hardware(2250e12, 4500e12, 180e9, 7.7e12, 900e9, 50e9, 8, None, _NDR),
    "v5p": Hardware(459e12, None, 95e9, 2.765e12, 300e9, 300e9, 4, None, _NO_PRICE | {
        "fp8": "sheet: no FP8 units", "local_bandwidth": _ICI, "node_bandwidth": _ICI}),
    "v6e": Hardware(918e12, None, 32e9, 1.64e12, 224e9, 224e9, 4, None, _NO_PRICE | {
        "fp8": "sheet: no FP8 units", "local_bandwidth": _ICI, "node_bandwidth": _ICI}),
    "7x": Hardware(2307e12, 4614e12, 192e9, 7.38e12, 600e9, 600e9, 4, None, _NO_PRICE | {
        "local_bandwidth": _ICI, "node_bandwidth": _ICI}),
}


def hardware(name: str) -> Hardware:
    """The row `name`. Raises ConfigError, with the names there are."""
    if name not in HARDWARE:
        raise ConfigError(f"hardware {name!r} is unknown; take one of {', '.join(HARDWARE)}.")
    return HARDWARE[name]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What no data sheet says, each as a share of a peak or in its own unit, and who measured it on what.

    product_bf16 is the one that nobody published for these shapes.
    """

    product_fp8: float = 1250e12 / 1979e12  # DeepGEMM, H800: mean of the grouped products of V3, 1346 and 1214 TFLOP/s
    weight_fp8: float = 957e12 / 1979e12  # DeepGEMM, H800: mean of its two weight-gradient rows, 920 and 994
    product_bf16: float = 0.65  # assumed: the share that FP8's products reach of their peak
    attention: float = 660e12 / 989e12  # FlashMLA, H800: its compute-bound figure, for training's core as well
    memory: float = 3000e9 / 3350e9  # FlashMLA, H800
    dispatch: float = 51 / 50  # DeepEP, H800, 64-way, of node_bandwidth
    combine: float = 50 / 50
    local: float = 153 / 160  # DeepEP, H800, 8-way, of local_bandwidth
    reserved: float = 20 / 132  # report, 3.2.2: SMs that move tokens meanwhile
    # All that is no product, no core of attention and no waiting for the network: quantizing, norms, SwiGLU, gathers,
    # launches, and experts that have more to do than others. From the published 13.95 s of overlapped cells.
    slowdown: float = 1.275
