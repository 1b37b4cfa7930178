"""What a finished run shows: its score beside compressors', pictures, and a sample of what it writes."""

import dataclasses

import jax

from deepseek_jax.checkpoint.manager import restore_items
from deepseek_jax.config import Config, ConfigError, MeshConfig
from deepseek_jax.data.baselines import compressed_bits_per_byte
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import prepare, prepare_evaluation
from deepseek_jax.plots.training import plot_expert_load, plot_loss
from deepseek_jax.serving import generate
from deepseek_jax.training.loop import evaluate, load_workdir_config
from deepseek_jax.training.metrics import read_metrics
from deepseek_jax.training.step import eval_step


def load_trained(workdir: str, ema: bool = False):
    """The config and variables of a run's newest undamaged checkpoint, and its step.

    Raises:
      ConfigError: no run or no checkpoint there, or no moving average in it.
    """
    config = dataclasses.replace(load_workdir_config(workdir), mesh=MeshConfig())  # one device here
    items, step, _ = restore_items(workdir, names=("ema", "router") if ema else ("params", "router"))
    params = items["ema" if ema else "params"]
    if not params:
        raise ConfigError(f"the run in {workdir} keeps no moving average; train with --config.train.ema_decay=0.999.")
    return config, {"params": params, "router": items["router"]}, step


def evaluate_workdir(workdir: str, data: str | None = None, ema: bool = False, compressors: bool = False) -> dict:
    """Scores a run on all of its held-out documents, or on all documents of `data`."""
    config, variables, step = load_trained(workdir, ema)
    prepared = prepare(config, workdir) if data is None else prepare_evaluation(config, workdir, data)
    loader = Loader(config, prepared)
    step_fn = jax.jit(lambda *args: eval_step(config, *args))
    result = {"step": step, **evaluate(config, loader, step_fn, variables["params"], variables["router"])}
    return result | (compressed_bits_per_byte(config.data, data) if compressors else {})


def finish(config: Config, workdir: str, state, loader: Loader):
    """Shows the last evaluation beside compressors, draws the pictures, prints a sample."""
    rows = read_metrics(workdir)
    last, steps = [r for r in rows if "eval_loss" in r][-1], [r for r in rows if "loss" in r][-50:]
    scores = {"model": last["eval_bits_per_byte"]} | compressed_bits_per_byte(config.data)
    print("Bits per byte of the held-out files:")
    for name, value in scores.items():
        print(f"  {name.removesuffix('_bits_per_byte').replace('_', ' '):16s} {value:.3f}")
    vio = [r["max_vio"] for r in steps]
    print(f"MaxVio (busiest over mean load): {sum(vio) / len(vio):.3f} a batch (the last {len(vio)} steps; at most "
          f"{max(vio):.3f}), {last['max_vio_global']:.3f} over the held-out files together")
    pictures = [plot_loss(workdir)]
    if config.model.num_moe_layers or config.model.mtp_depth:
        pictures.append(plot_expert_load(workdir))
    print("Pictures: " + ", ".join(str(p) for p in pictures))
    if config.train.sample_tokens:
        print("Sample:\n" + sample(config, state, loader.tokenizer))


def sample(config: Config, state, tokenizer) -> str:
    """A continuation of config.train.sample_prompt, drawn at temperature 0.8."""
    prompt = [tokenizer.bos, *tokenizer.encode(config.train.sample_prompt)]
    made = generate(config.model, {"params": state.params, "router": state.router}, [prompt],
                    config.train.sample_tokens, temperature=0.8, seed=config.train.seed, eos_id=tokenizer.eos)
    return tokenizer.decode([*prompt[1:], *made.tokens[0]])
