"""Hardware figures, one row per machine, with the source of every figure (no jax).

Bandwidths are bytes per second in one direction of one device. "report": DeepSeek-V3's report, section 3; "DeepEP",
"DeepGEMM", "FlashMLA": those projects' published tables, measured on H800s; "sheet": the vendor's data sheet.
"""

import dataclasses
from typing import Literal

from deepseek_jax.config import ConfigError

# This project's kernels for experts' products and attention on a machine; None: XLA's programs.
Kernels = Literal["hopper", "tpu"] | None


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device and its networks.

    bf16, fp8: peak FLOP/s of dense products; fp8 None: no FP8 units, so bfloat16 is used instead.
    memory: bytes. memory_bandwidth: bytes/s. local_bandwidth: to the devices of its node (of a pod: over ICI);
    node_bandwidth: to other nodes. node_size: devices that the fast network joins into one node.
    price: dollars per device-hour; None: unknown, so --price has to give it.
    kernels: those of this project that run on it.
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
    kernels: Kernels = None


_FIGURES = ("bf16", "fp8", "memory", "memory_bandwidth", "local_bandwidth", "node_bandwidth", "node_size")
_SHEET = dict.fromkeys(_FIGURES, "sheet")
_NO_PRICE = _SHEET | {"price": "none; give --price"}
_NDR = _SHEET | {"node_bandwidth": "sheet: one 400 Gbit/s NIC a GPU", "price": "none; give --price"}
_NO_FP8 = {"fp8": "sheet: no FP8 units; bfloat16 is used"}
_PCIE = {"local_bandwidth": "sheet: PCIe alone, half of its bidirectional total",
         "node_bandwidth": "assumed: one 100 Gbit/s NIC a card; the sheet has none", "price": "none; give --price"}
_ICI = "sheet: ICI, half of its bidirectional total; the torus joins all chips, so nodes are no slower"

HARDWARE = {
    "h800": Hardware(989e12, 1979e12, 80e9, 3.35e12, 160e9, 50e9, 8, 2.0,
                     _SHEET | {"local_bandwidth": "report, 3.2.2: 160 GB/s", "node_bandwidth": "report, 3.2.2: 50 GB/s",
                               "price": "report, section 1: assumed rent"}, "hopper"),
    "h100": Hardware(989e12, 1979e12, 80e9, 3.35e12, 450e9, 50e9, 8, None, _NDR, "hopper"),
    "h200": Hardware(989e12, 1979e12, 141e9, 4.8e12, 450e9, 50e9, 8, None, _NDR, "hopper"),
    "b200": Hardware(2250e12, 4500e12, 180e9, 7.7e12, 900e9, 50e9, 8, None, _NDR),
    # The SXM card with 80 GB, in a DGX.
    "a100": Hardware(312e12, None, 80e9, 2.039e12, 300e9, 25e9, 8, None, _NO_PRICE | _NO_FP8 | {
        "node_bandwidth": "sheet of the DGX A100: one 200 Gbit/s NIC a GPU"}),
    "l40s": Hardware(362e12, 733e12, 48e9, 864e9, 32e9, 12.5e9, 8, None, _SHEET | _PCIE),
    # The Ada white paper's appendix: products summed in float32. Summed in float16, FP8 would be twice as fast.
    "rtx4090": Hardware(165.2e12, 330.3e12, 24e9, 1.008e12, 32e9, 12.5e9, 8, None, _SHEET | _PCIE),
    "t4": Hardware(8.1e12, None, 16e9, 320e9, 16e9, 12.5e9, 8, None, _SHEET | _PCIE | _NO_FP8 | {
        "bf16": "sheet: no bfloat16 units, so XLA computes such products in float32, at 8.1 TFLOP/s; the 65 TFLOP/s of "
                "float16 are of no use here, since no model of this program computes in it"}),
    "v5p": Hardware(459e12, None, 95e9, 2.765e12, 300e9, 300e9, 4, None, _NO_PRICE | _NO_FP8 | {
        "local_bandwidth": _ICI, "node_bandwidth": _ICI}, "tpu"),
    "v6e": Hardware(918e12, None, 32e9, 1.64e12, 224e9, 224e9, 4, None, _NO_PRICE | _NO_FP8 | {
        "local_bandwidth": _ICI, "node_bandwidth": _ICI}, "tpu"),
    "7x": Hardware(2307e12, 4614e12, 192e9, 7.38e12, 600e9, 600e9, 4, None, _NO_PRICE | {
        "local_bandwidth": _ICI, "node_bandwidth": _ICI}, "tpu"),
}

# Dense bfloat16 peak of one device, FLOP/s, by prefix of jax's `device_kind`; the last two are not planned for.
PEAK_BFLOAT16 = {"NVIDIA H100": HARDWARE["h100"].bf16, "NVIDIA H200": HARDWARE["h200"].bf16,
                 "NVIDIA H800": HARDWARE["h800"].bf16, "NVIDIA B200": HARDWARE["b200"].bf16,
                 "TPU v5": HARDWARE["v5p"].bf16, "TPU v6 lite": HARDWARE["v6e"].bf16,
                 "NVIDIA A100": HARDWARE["a100"].bf16, "NVIDIA L40S": HARDWARE["l40s"].bf16,
                 "NVIDIA GeForce RTX 4090": HARDWARE["rtx4090"].bf16, "TPU v4": 275e12, "TPU v5 lite": 197e12}
# Bytes of one jax device of the targets that programs are compiled for; a 7x chip is two jax devices.
DEVICE_MEMORY = {name: HARDWARE[name].memory for name in ("h100", "h800", "v5p", "v6e")} | {
    "v5e": 16e9, "7x": HARDWARE["7x"].memory / 2}


def hardware(name: str) -> Hardware:
    """The row `name`.

    Raises:
      ConfigError: there is none; lists those there are.
    """
    if name not in HARDWARE:
        raise ConfigError(f"hardware {name!r} is unknown; take one of {', '.join(HARDWARE)}.")
    return HARDWARE[name]


def device(name: str) -> Hardware:
    """One jax device of the machine `name`: half a chip for a 7x, the row itself for all others. Raises ConfigError."""
    row = hardware(name)
    if name != "7x":
        return row
    halves = {figure: getattr(row, figure) / 2 for figure in ("bf16", "fp8", "memory", "memory_bandwidth")}
    return dataclasses.replace(row, **halves)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Figures that no data sheet has, each as a share of a peak or in its own unit, with the source of the measurement.

    Only product_bf16 has not been published for these shapes.
    """

    product_fp8: float = 1250e12 / 1979e12  # DeepGEMM, H800: mean of the grouped products of V3, 1346 and 1214 TFLOP/s
    weight_fp8: float = 957e12 / 1979e12  # DeepGEMM, H800: mean of its two weight-gradient rows, 920 and 994
    product_bf16: float = 0.65  # assumed: the share that FP8's products reach of their peak
    attention: float = 660e12 / 989e12  # FlashMLA, H800: its compute-bound figure, for training's core as well
    memory: float = 3000e9 / 3350e9  # FlashMLA, H800
    dispatch: float = 51 / 50  # DeepEP, H800, 64-way, of node_bandwidth
    combine: float = 50 / 50
    local: float = 153 / 160  # DeepEP, H800, 8-way, of local_bandwidth
    reserved: float = 20 / 132  # report, 3.2.2: SMs that move tokens at the same time
    # The share of the network's seconds in F&B that the device waits: by XLA's schedule of the report's layout, on an
    # H800 (experiments/scale/v3_671b_h100_2048_report.json).
    exposed: float = 0.064
    # Everything except products, attention's core and waiting for the network: quantizing, norms, SwiGLU, gathers,
    # launches, and uneven loads of experts. Fitted to the published 13.95 s of overlapped cells.
    slowdown: float = 1.275


def smallest(names: list[str]) -> str:
    """The machine with the least memory per device; if there are several, the slowest."""
    return min(names, key=lambda name: (device(name).memory, device(name).memory_bandwidth))


def check_fp8(name: str, hw: Hardware) -> None:
    """Raises ConfigError if FP8 products are requested for a machine without FP8 units."""
    if hw.fp8 is None:
        raise ConfigError(f"{name} has no FP8 units: products run in bfloat16 there; leave out --fp8.")
