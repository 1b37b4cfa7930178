"""Training throughput of our step at the preset `small`: the side that `peer_transformers.py` is compared with.

A step is forward, backward, clipping, AdamW and the bias update over 8 x 512 random tokens, without multi-token
prediction (the peer trains none) unless --mtp-depth asks for it. Prints one line of JSON per repeat.

    python -m benchmarks.train_step --repeats 5 --steps-per-repeat 3 --warmup 2 --dtype bfloat16
"""

import argparse
import functools
import json
import os
import platform
import time

import jax
import numpy as np

from deepseek_jax import runtime
from deepseek_jax.config import Config, TrainConfig, model_config
from deepseek_jax.training.step import init_state, train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="lines to print")
    parser.add_argument("--steps-per-repeat", type=int, default=3, help="steps timed together")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps at the start, after the compilation")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of the products")
    parser.add_argument("--mtp-depth", type=int, default=0)
    args = parser.parse_args()

    runtime.prepare()
    model = model_config("small", dtype=args.dtype, mtp_depth=args.mtp_depth)
    config = Config(model=model, train=TrainConfig(batch_size=args.batch, sequence_length=args.length))
    state = jax.jit(functools.partial(init_state, config))()
    step = jax.jit(functools.partial(train_step, config), donate_argnums=0)
    draw = np.random.default_rng(1)

    def batch():
        shape = (1, args.batch, args.length + 1)
        return {"tokens": draw.integers(0, model.vocab_size, shape, np.int32), "weights": np.ones(shape, np.float32),
                "segment_ids": np.ones(shape, np.int32), "active": np.int32(1)}

    for _ in range(1 + args.warmup):
        state, metrics = step(state, batch())
        metrics.loss.block_until_ready()
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    for repeat in range(args.repeats):
        batches = [batch() for _ in range(args.steps_per_repeat)]
        start = time.perf_counter()
        for one in batches:
            state, metrics = step(state, one)
            loss = float(metrics.loss)
        seconds = time.perf_counter() - start
        row = {"side": "deepseek_jax", "repeat": repeat, "seconds": round(seconds, 4), "loss": round(loss, 5),
               "tokens_per_second": round(args.batch * args.length * args.steps_per_repeat / seconds, 1),
               "dtype": args.dtype, "threads": os.cpu_count(), "parameters": parameters,
               "settings": {"mtp_depth": args.mtp_depth},
               "versions": {"python": platform.python_version(), "jax": jax.__version__}}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
