"""A small model with every feature that a pipeline supports, and its serial reference.

It has an embedding at the start, stages of two layers with a custom-VJP product, their own loss and counts, a head and
a loss at the end. Embedding and head are sharded over `pipe`, tokens over `node` and `local`; the stage's tokens are
exchanged over (node, local) and back, like those of experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deepseek_jax.pipeline.execute import Arguments, Model

W, D, F, B, LAYERS = 16, 6, 8, 4, 2
DATA = ("node", "local")
MESH_AXES = ("pipe", *DATA)


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, dy: (dy @ kept[1].T, kept[0].T @ dy))


def target(inputs):
    return (3 * inputs["tokens"] + 1) % W


def layer(p, bias, travel, x_BD):
    h_BF = jax.nn.silu(product(x_BD, p["gate"])) * product(x_BD, p["up"])
    return x_BD + travel(product(travel(h_BF), p["down"])) + bias


def stage(params, fixed, x_BD, inputs, travel, remat):
    """Remat: "none", "layers" (with a policy that keeps what is named) or "full"."""
    def whole(params, x_BD):
        loss, counts = 0.0, []
        one = functools.partial(layer, travel=travel)
        if remat == "layers":
            one = jax.checkpoint(one, policy=jax.checkpoint_policies.dots_saveable)
        for i in range(LAYERS):
            x_BD = one(jax.tree.map(lambda a, i=i: a[i], params), fixed["bias"][i][None], x_BD=x_BD)
            weight_B1 = 1 + inputs["threshold"][:, None]  # so B needs the inputs of its own micro-batch
            loss = loss + 0.1 * jnp.sum(weight_B1 * jax.nn.softmax(product(x_BD, params["gate"][i])) ** 2)
            counts.append((x_BD > inputs["threshold"][:, None]).sum(axis=0))
        return x_BD, loss, {"counts": jnp.stack(counts)}

    return (jax.checkpoint(whole) if remat == "full" else whole)(params, x_BD)


def serial(arguments):
    """(loss, sums) of a complete step without a pipeline; params in natural order."""
    def one(total, inputs):
        x_BD, loss, counts = arguments.shared["embedding"][inputs["tokens"]], 0.0, []
        for s in range(arguments.params["gate"].shape[0]):
            params, fixed = (jax.tree.map(lambda a, s=s: a[s], t) for t in (arguments.params, arguments.fixed))
            x_BD, more, sums = stage(params, fixed, x_BD, inputs, lambda h: h, "none")
            loss, counts = loss + more, counts + [sums["counts"]]
        logits_BW = (x_BD * arguments.shared["scale"][None]) @ arguments.shared["head"]
        loss -= jnp.take_along_axis(jax.nn.log_softmax(logits_BW), target(inputs)[:, None], axis=1).sum()
        return total + loss, (jnp.stack(counts), (logits_BW.argmax(axis=1) == target(inputs)).sum())

    loss, (counts, right) = lax.scan(one, jnp.zeros((), arguments.shared["scale"].dtype), arguments.inputs)
    return loss, {"counts": counts.sum(axis=0), "right": right.sum()}


def parallel(remat="none", pipe="pipe", data=DATA, travels=True):
    """The same model as the three functions of a pipeline."""
    def enter(shared, inputs):
        rows = shared["embedding"].shape[0]
        index_B = inputs["tokens"] - lax.axis_index(pipe) * rows
        mine_B = (index_B >= 0) & (index_B < rows)
        return lax.psum(jnp.where(mine_B[:, None], shared["embedding"][jnp.clip(index_B, 0, rows - 1)], 0), pipe)

    def travel(h_BF):
        return lax.all_to_all(h_BF, data, 0, 0, tiled=True) if travels else h_BF

    def leave(shared, x_BD, inputs):
        logits_BW = (x_BD * shared["scale"][None]) @ shared["head"]
        columns = logits_BW.shape[1]
        target_B = target(inputs)
        index_B = target_B - lax.axis_index(pipe) * columns
        mine_B = (index_B >= 0) & (index_B < columns)
        top_B = lax.pmax(lax.stop_gradient(logits_BW).max(axis=1), pipe)
        total_B = lax.psum(jnp.exp(logits_BW - top_B[:, None]).sum(axis=1), pipe)
        picked_B = jnp.take_along_axis(logits_BW, jnp.clip(index_B, 0, columns - 1)[:, None], axis=1)[:, 0]
        first = lax.axis_index(pipe) == 0
        loss = jnp.where(first, (jnp.log(total_B) + top_B).sum(), 0) - jnp.where(mine_B, picked_B, 0).sum()
        return loss, {"right": (mine_B & (picked_B == top_B)).sum()}

    return Model(enter, functools.partial(stage, travel=travel, remat=remat), leave)


SPECS = Arguments(params=P("pipe"), fixed=P("pipe"),
                  shared={"embedding": P("pipe"), "head": P(None, "pipe"), "scale": P()}, inputs=P(None, DATA))


def make_mesh(pipe, node=1, local=1):
    return Mesh(np.array(jax.devices()[:pipe * node * local]).reshape(pipe, node, local), MESH_AXES)


def arguments(stages, microbatches, batch=B, dtype=jnp.float64):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 4, dtype)
    tokens = jnp.asarray(rng.integers(0, W, size=(microbatches, batch)), jnp.int32)
    return Arguments(
        params={"gate": normal(stages, LAYERS, D, F), "up": normal(stages, LAYERS, D, F),
                "down": normal(stages, LAYERS, F, D)},
        fixed={"bias": normal(stages, LAYERS, D)},
        shared={"embedding": normal(W, D), "head": normal(D, W), "scale": 1 + normal(D)},
        inputs={"tokens": tokens, "threshold": normal(microbatches, batch)})


def example():
    """Arguments of a single stage: params, x, context, dy, dloss."""
    one = jax.tree.map(lambda a: a[0], arguments(stages=1, microbatches=1))
    rng = np.random.default_rng(1)
    x, dy = (jnp.asarray(rng.normal(size=(B, D))) for _ in range(2))
    return one.params, x, (one.fixed, one.inputs), dy, jnp.asarray(1.5)
