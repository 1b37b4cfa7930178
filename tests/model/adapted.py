"""Tiny models with adapters, and their merged weights: NumPy, float64, written only from the definition."""

import functools
import math

import jax
import numpy as np

from deepseek_jax import fp8
from deepseek_jax.checkpoint.arrays import quantize
from deepseek_jax.checkpoint.blocks import MATRICES
from deepseek_jax.config import LoraConfig
from deepseek_jax.model import lora
from tests.model import naive

CFG = naive.tiny(num_layers=2)
SMALL = dict(num_layers=1, num_dense_layers=0, mtp_depth=0)
LORA = LoraConfig(rank=3, alpha=6.0)
# The product of A and B for each weight W[inputs, outputs], as an einsum; L and E are layers and experts.
PRODUCTS = {"q_a": "LDR,LRQ->LDQ", "q_b": "LQR,LRHA->LQHA", "kv_a": "LDR,LRC->LDC", "kv_b": "LCR,LRHX->LCHX",
            "o": "LHVR,LRD->LHVD", "ffn": "LXR,LRY->LXY", "experts": "LEXR,LERY->LEXY"}


variables = functools.cache(naive.variables_of)


def adapters_of(cfg, settings=LORA, seed=1, size=1.0):
    """Adapters as after training: neither A nor B is 0. B is `size` times as large as A."""
    shapes = jax.eval_shape(lambda: lora.fresh(settings, jax.random.key(0), variables(cfg)["params"]))
    rng = np.random.default_rng(seed)
    dtype = np.float64 if cfg.dtype == "float64" else np.float32

    def leaf(path, x):
        return (0.3 * (size if path[-1].key == "b" else 1) * rng.standard_normal(x.shape)).astype(dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def in_blocks(params):
    """The parameters as stored in an FP8 base, computed by NumPy."""
    def held(path, w):
        inputs, outputs = MATRICES.get(path[-1].key, (0, 0))
        if not inputs:
            return w
        stack, rest = w.shape[:w.ndim - inputs - outputs], w.shape[w.ndim - inputs - outputs:]
        matrices = np.asarray(w).reshape(-1, math.prod(rest[:inputs]), math.prod(rest[inputs:]))
        values, scales = zip(*map(quantize, matrices))
        return fp8.Blocks(np.stack(values).reshape(w.shape), np.stack(scales).reshape(*stack, *scales[0].shape))

    return jax.tree_util.tree_map_with_path(held, params)


def merged(params, adapters, scale):
    """W + scale * A B, weight by weight."""
    def visit(node, extra, name, stacked):
        if extra is None:
            return node
        if isinstance(node, dict):
            return {key: visit(part, extra.get(key), key, stacked) for key, part in node.items()}
        a, b = np.asarray(extra["a"], np.float64), np.asarray(extra["b"], np.float64)
        attention = name in PRODUCTS
        rule = PRODUCTS[name if attention else "experts" if node.ndim - stacked == 3 else "ffn"]
        rule = rule if stacked else rule.replace("L", "")
        return node + scale * np.einsum(rule, a, b)

    return {key: visit(part, adapters.get(key), key, not key.startswith("mtp_")) for key, part in params.items()}
