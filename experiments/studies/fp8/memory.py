"""Bytes of the backward pass's residuals, FP8 against bfloat16, from the shapes and dtypes of JAX's own residuals.

    python experiments/studies/fp8/memory.py [--list]      writes memory.json next to this file

Nothing is computed: `jax.vjp` is traced as for an H100, where experts' rows are not padded to the tiles of a CPU, and
the leaves of the returned function are the residuals. The count is the difference between two batch sizes, so that
parameters and rows that pad experts to 128 cancel: bytes per token, for the complete mesh if there is one.
"""

import argparse
import collections
import pathlib

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice

from deepseek_jax import io
from deepseek_jax.config import FP8Config, MeshConfig, model_config
from deepseek_jax.model import DeepSeekV3
from deepseek_jax.parallel.mesh import abstract_mesh

HERE = pathlib.Path(__file__).resolve().parent
H100 = AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
# A dense and a MoE layer with V3's sizes: apart from the embedding, all 61 layers are a mixture of these two.
V3 = ("v3_671b", dict(num_layers=2, num_dense_layers=1, mtp_depth=0))
# name -> (preset, its changes, mesh). With experts on other devices, the tokens received there are saved too.
MODELS = {"tiny": ("tiny", {}, {}), "small": ("small", {}, {}),
          "a dense and a MoE layer of v3_671b": (*V3, {}),
          "the same, experts on 8 devices": (*V3, dict(local=8, capacity=1.0))}


def residuals(name: str, fp8: bool, remat: str, batch: int, length: int) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the residuals of jax.vjp of the model's hidden states."""
    preset, changes, axes = MODELS[name]
    cfg = model_config(preset, **changes, fp8=FP8Config(enabled=fp8), remat=remat)
    mesh = MeshConfig(**axes, dispatch_fp8=fp8)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    few = jnp.zeros((1, 8), jnp.int32)
    variables = jax.eval_shape(lambda: DeepSeekV3(cfg).init(jax.random.key(0), few, logits=False))

    def pull_back(params, router, tokens):
        def hidden(params):
            output = DeepSeekV3(cfg, mesh).apply({"params": params, "router": router}, tokens, logits=False)
            return output.hidden_BTD, output.mtp_hidden  # pyright: ignore[reportAttributeAccessIssue] (apply)

        return jax.vjp(hidden, params)[1]

    with jax.sharding.use_abstract_mesh(abstract_mesh(mesh).update(abstract_device=H100)):
        return jax.tree.leaves(jax.eval_shape(pull_back, variables["params"], variables["router"], tokens))


def bytes_per_token(name: str, fp8: bool, remat: str, length: int = 512) -> dict[tuple[str, int], float]:
    """{(dtype, last dimension): bytes a token}, from batches of 8 and 16 sequences."""
    def total(batch):
        sums = collections.Counter()
        for x in residuals(name, fp8, remat, batch, length):
            if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool:
                sums[x.dtype.name, x.shape[-1] if x.ndim else 1] += x.size * x.dtype.itemsize
        return sums

    small, large = total(8), total(16)
    return {key: (large[key] - small[key]) / (8 * length) for key in large if large[key] != small[key]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--list", action="store_true", help="print the residuals, by dtype and last dimension")
    args = parser.parse_args()
    rows = []
    print(f"{'model':36} {'remat':8} {'bf16':>9} {'FP8':>9}  bytes a token")
    for name in args.models:
        for remat in ("none", "report", "full"):
            kept = {kind: bytes_per_token(name, fp8, remat) for kind, fp8 in (("bf16", False), ("fp8", True))}
            bf16, fp8 = (sum(k.values()) for k in kept.values())
            largest = {kind: {f"{dtype} [.., {width}]": size for (dtype, width), size in
                              sorted(k.items(), key=lambda item: -item[1])} for kind, k in kept.items()}
            rows.append({"model": name, "remat": remat, "bytes": {"bf16": bf16, "fp8": fp8}, "saved": 1 - fp8 / bf16,
                         "kept": largest})
            print(f"{name:36} {remat:8} {bf16:9.0f} {fp8:9.0f}  {100 * (1 - fp8 / bf16):.1f} % less", flush=True)
            for kind, k in largest.items() if args.list else ():
                print("", *(f"{kind:>45} {size:9.0f}  {what}" for what, size in k.items()), sep="\n")
    io.write_json(HERE / "memory.json", rows, indent=1)


if __name__ == "__main__":
    main()
