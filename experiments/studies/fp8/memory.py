"""Bytes that the backward pass keeps, FP8 against bfloat16, from the shapes and dtypes of JAX's own residuals.

    python experiments/studies/fp8/memory.py  writes memory.json beside this file

Nothing is computed: `jax.vjp` is traced, and the leaves of the function that it returns are what is kept. The count is
the difference of two batch sizes, so that parameters, and rows that pad experts to 128, drop out: bytes a token.
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp

from deepseek_jax.config import FP8Config, model_config
from deepseek_jax.model import DeepSeekV3

HERE = pathlib.Path(__file__).resolve().parent
# A dense and a MoE layer of V3's own sizes: the sum of 61 is the same mixture, but for the embedding.
V3_LAYERS = dict(num_layers=2, num_dense_layers=1, mtp_depth=0)


def models(fp8, remat):
    recipe = dict(fp8=FP8Config(enabled=fp8), remat=remat)
    return {"tiny": model_config("tiny", **recipe), "small": model_config("small", **recipe),
            "a dense and a MoE layer of v3_671b": model_config("v3_671b", **V3_LAYERS, **recipe)}


def residuals(cfg, batch, length):
    """jax.ShapeDtypeStructs of all that jax.vjp of the model's hidden states keeps."""
    model = DeepSeekV3(cfg)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32), logits=False))

    def pull_back(params, router, tokens):
        def hidden(params):
            output = model.apply({"params": params, "router": router}, tokens, logits=False)
            return output.hidden_BTD, output.mtp_hidden

        return jax.vjp(hidden, params)[1]

    return jax.tree.leaves(jax.eval_shape(pull_back, variables["params"], variables["router"], tokens))


def bytes_per_token(cfg, length=512):
    """{dtype: bytes a token}, from batches of 4 and 8 sequences."""
    def total(batch):
        sums = {}
        for x in residuals(cfg, batch, length):
            if jnp.issubdtype(x.dtype, jnp.number) or x.dtype == bool:
                sums[x.dtype.name] = sums.get(x.dtype.name, 0) + x.size * x.dtype.itemsize
        return sums

    small, large = total(4), total(8)
    return {name: (large[name] - small.get(name, 0)) / (4 * length) for name in large}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(models(False, "none")), default=list(models(False, "none")))
    args = parser.parse_args()
    rows = []
    print(f"{'model':36} {'remat':8} {'bf16':>9} {'FP8':>9}  bytes a token")
    for name in args.models:
        for remat in ("none", "report", "full"):
            kept = {kind: bytes_per_token(models(fp8, remat)[name]) for kind, fp8 in (("bf16", False), ("fp8", True))}
            bf16, fp8 = (sum(k.values()) for k in kept.values())
            rows.append({"model": name, "remat": remat, **kept, "saved": 1 - fp8 / bf16})
            print(f"{name:36} {remat:8} {bf16:9.0f} {fp8:9.0f}  {100 * (1 - fp8 / bf16):.1f} % less", flush=True)
    (HERE / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
