"""The state that a run begins with: fresh, with the weights of another run, branched off one, or its own last state.

    checkpoint of the work directory, else RUN@STEP -> complete state      RUN -> weights      neither -> random

If the config differs from that of the checkpoint, it applies from that step on, if `history` allows the change.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import traverse_util

from deepseek_jax.checkpoint.adapters import restore_weights
from deepseek_jax.checkpoint.manager import Checkpoints, find_checkpoint, restore_state
from deepseek_jax.checkpoint.manifest import directory_of, has_begun, steps
from deepseek_jax.config import Config, ConfigError
from deepseek_jax.data.position import Position, position_of
from deepseek_jax.history import check_changes, check_steps, record, saved_config
from deepseek_jax.parallel.processes import is_first
from deepseek_jax.parallel.runner import Runner
from deepseek_jax.training.base import frozen_shapes
from deepseek_jax.training.step import TrainState, fresh_adapters, fresh_state, init_state, start_state
from deepseek_jax.workdir import check_speaks, is_hf_checkpoint, load_workdir_config


class Restored(NamedTuple):
    """A state that a run continues from. meta: of its checkpoint. position: in its sources, from this step on."""

    state: TrainState
    meta: dict[str, Any]
    position: Position


def restore(config: Config, workdir: str, checkpoints: Checkpoints, abstract: Any) -> Restored | None:
    """The last state of the run in the work directory, or the one that it branches off; None: it starts fresh. Changes
    of settings are recorded in config.json.

    abstract: the state's shapes. Raises ConfigError for a state that this config cannot continue.
    """
    found, branch = checkpoints.restore(abstract), None
    if found is None and config.init.step is not None:
        branch = config.init.from_
        found = restore_state(find_checkpoint(str(config.init.folder), config.init.step), abstract)
    if found is None:
        if is_first():
            record(config, workdir, 0, None)  # config.json may be that of lost local states
        return None
    state, meta = found
    step, before = int(state.step), saved_config(meta)
    if before is not None:
        check_changes(before, config, workdir if branch is None else branch, "take that config, or another --workdir.",
                      ignored=() if branch is None else ("init.from",))
    check_steps(config, step, workdir if branch is None else branch)
    position = position_of(meta, before or config)
    if before is not None:
        position = position.after(before, config, step)
    if is_first():
        changes = record(config, workdir, step, before, branch)
        print(f"Resuming from step {step} of {config.train.steps}." if branch is None else
              f"Branching off {branch}, with {config.train.steps} steps in all.", flush=True)
        if changes:
            print(f"From step {step} on: {', '.join(changes)}.", flush=True)
    return Restored(state, meta, position)


def starting_state(config: Config, runner: Runner | None = None, frozen: dict[str, Any] | None = None) -> TrainState:
    """A fresh state, or one with the weights of the run in config.init.from. frozen: the weights of a base of adapters,
    whose biases are the initial ones."""
    runner = runner or Runner(config)
    fresh = jax.eval_shape(fresh_state(config))
    where = runner.shardings(fresh)
    if config.init.from_ is None:
        return jax.jit(fresh_state(config), out_shardings=where)()
    key = jax.random.key(config.train.seed)
    if frozen is not None:
        shapes = frozen_shapes(dataclasses.replace(config, lora=dataclasses.replace(config.lora, fp8=False)))["params"]
        # A copy of the biases: the state is donated to every step, and the base outlives them.
        adapted = lambda router: start_state(config, fresh_adapters(config, shapes), jax.tree.map(jnp.copy, router),
                                             key)
        return jax.jit(adapted, out_shardings=where)(frozen["router"])
    abstract = runner.with_shardings({"params": fresh.params, "router": fresh.router})
    missing = traverse_util.flatten_dict(_fresh_parts(config, abstract["params"]))
    found = {path: x for path, x in traverse_util.flatten_dict(abstract["params"]).items() if path not in missing}
    abstract["params"] = traverse_util.unflatten_dict(found)
    weights, _ = restore_weights(str(config.init.folder), abstract)
    weights["params"] = traverse_util.unflatten_dict(traverse_util.flatten_dict(weights["params"]) | missing)
    begin = functools.partial(start_state, config)
    if where is not None:
        begin = jax.jit(begin, out_shardings=where)
    return begin(weights["params"], weights["router"], key)


def _fresh_parts(config: Config, params: dict[str, Any]) -> dict[str, Any]:
    """Random values for the parameters that this run has and the run of init.from has not: indexers, the head of a
    reward model; {} if there are none."""
    theirs, parts = load_workdir_config(str(config.init.folder)), set()
    if config.model.index_topk is not None and theirs.model.index_topk is None:
        parts.add("indexer")
        if is_first():
            print(f"init.from={config.init.from_} has dense attention: the indexers start with new weights.",
                  flush=True)
    if config.preference.objective == "reward" != theirs.preference.objective:
        parts.add("reward_head")
    if not parts:
        return {}
    of_parts = lambda tree: traverse_util.unflatten_dict(
        {path: x for path, x in traverse_util.flatten_dict(tree).items() if parts & set(path)})
    where = jax.tree.map(lambda x: x.sharding, of_parts(params))
    make = lambda: of_parts(init_state(config).params)
    return jax.jit(make, out_shardings=where if jax.tree.leaves(where) else None)()


def check_branch(config: Config, workdir: str) -> None:
    """Raises ConfigError if this config cannot continue the run in init.from=RUN@STEP. A branch that has saved no
    longer needs that run."""
    if config.init.step is None or has_begun(workdir):
        return
    folder = str(config.init.folder)
    check_changes(load_workdir_config(folder), config, folder, "take that config, or "
                  f"--config.init.from={folder} for its weights alone.", ignored=("init.from",))
    find_checkpoint(folder, config.init.step)


def check_length(config: Config, workdir: str) -> None:
    """Raises ConfigError for a run, or a branch, that already has more steps than train.steps; `restore` does so for
    states on the machines themselves."""
    saved = steps(directory_of(workdir))
    if saved:
        check_steps(config, saved[-1], workdir)
    elif config.init.step is not None:
        check_steps(config, config.init.step, str(config.init.from_))


def check_start(config: Config) -> None:
    """Raises ConfigError for an unusable init.from, before the corpus is read."""
    folder = config.init.folder
    if folder is None and config.lora.rank is not None:
        raise ConfigError("lora.rank trains adapters of the weights of a run; add --config.init.from=RUN, or take "
                          "lora.rank=None.")
    if folder is not None and is_hf_checkpoint(folder):
        raise ConfigError(f"init.from={folder} is a Hugging Face checkpoint; python -m deepseek_jax.convert from-hf "
                          f"{folder} RUN makes a work directory of it, then --config.init.from=RUN.")
    if folder is not None and config.init.step is None and config.preference.objective != "reward":
        check_speaks(load_workdir_config(folder), folder)
