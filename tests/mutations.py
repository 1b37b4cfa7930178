"""Breaks the source on purpose, one line at a time, and looks whether a test notices.

    python tests/mutations.py                 all of them, one after the other
    python tests/mutations.py yarn tile       those whose name contains one of the words
    python tests/mutations.py --list

Each mutation is applied to a copy of the tree, where only the test files that should notice run. Prints a table of
mutation -> red tests; exits with 1 if a mutation survives, or if its text is no longer in the source. To add one, add
a line to MUTATIONS: a name, the file, the text as it stands there (once), what to put in its place, and the tests.
"""

import argparse
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("deepseek_jax", "kernels_pallas", "experiments", "tests", "pyproject.toml")


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # below tests/, separated by spaces


FILES = ("router", "rope", "attention", "experts", "layers", "mtp", "transformer")
ROUTER, ROPE, ATTENTION, EXPERTS, LAYERS, MTP, TRANSFORMER = (f"deepseek_jax/model/{name}.py" for name in FILES)
LOSSES = "deepseek_jax/training/losses.py"
COSTS = "deepseek_jax/scale/costs.py"

T_ROUTER, T_ROPE, T_ATTENTION, T_EXPERTS, T_LAYERS, T_MTP, T_TRANSFORMER = (f"model/test_{name}.py" for name in FILES)
T_LOSSES, T_COSTS = "training/test_losses.py", "scale/test_costs.py"

STEP, LOOP, OPTIMIZER, METRICS, DURABLE = (f"deepseek_jax/training/{name}.py"
                                           for name in ("step", "loop", "optimizer", "metrics", "durable"))
T_STEP, T_LOOP, T_OPTIMIZER, T_METRICS, T_CHECKPOINT = (
    f"training/test_{name}.py" for name in ("step", "loop", "optimizer", "metrics", "checkpoint"))
EXAMPLES, LOADER = (f"deepseek_jax/data/{name}.py" for name in ("examples", "loader"))
T_EXAMPLES, T_LOADER = "data/test_examples.py", "data/test_loader.py"
INTEROP = "deepseek_jax/interop/"
NAMES, HF, HF_CONFIG, EXPORT = (f"{INTEROP}{name}.py" for name in ("names", "huggingface", "hf_config", "export"))
ARRAYS = "deepseek_jax/training/arrays.py"
T_NAMES, T_PARITY, T_HF_CONFIG, T_BAD, T_CONVERSION = (
    f"interop/test_{name}.py" for name in ("names", "parity", "hf_config", "bad_input", "conversion"))

MUTATIONS = [Mutation(*row) for row in [
    # routing
    ("dropped groups are 0.0 instead of -inf", ROUTER, "scores_NGX, -jnp.inf)", "scores_NGX, 0.0)", T_ROUTER),
    ("group score of one instead of two", ROUTER, "best = 2 if", "best = 1 if", T_ROUTER),
    ("softmax group score of two instead of one", ROUTER, '"sigmoid" else 1', '"sigmoid" else 2', T_ROUTER),
    ("gate from the biased score", EXPERTS, "routing.gates(cfg, scores_NE, chosen_NK)",
     "routing.gates(cfg, scores_NE + bias_E[None], chosen_NK)", T_EXPERTS),
    ("selection ignores the bias", ROUTER, "else scores_NE + bias_1E", "else scores_NE", T_ROUTER),
    ("multiplicative bias is added", ROUTER, "return scores_NE * bias_1E if", "return scores_NE + bias_1E if",
     T_ROUTER),
    ("route scale missing", ROUTER, "return gate_NK * cfg.route_scale", "return gate_NK", T_ROUTER),
    ("gates are not normalized", ROUTER, "if cfg.normalize_gates:", "if False:", T_ROUTER),
    ("gates are always normalized", ROUTER, "if cfg.normalize_gates:", "if True:", T_ROUTER),
    ("bias update has the wrong sign", ROUTER, "(total_L1 // E - counts_LE)", "(counts_LE - total_L1 // E)",
     T_ROUTER),
    ("bias moves by the mean of all layers", ROUTER, "counts_LE.sum(axis=-1, keepdims=True)",
     "counts_LE.sum(axis=(0, 1), keepdims=True) // counts_LE.shape[0]", T_ROUTER),
    ("sequence loss on biased scores", EXPERTS, "routing.sequence_loss(cfg, scores_NE.reshape(B, T, E))",
     "routing.sequence_loss(cfg, (scores_NE + bias_E[None]).reshape(B, T, E))", T_EXPERTS),
    ("sequence loss of scores that do not sum to one", ROUTER,
     "p_BE = (scores_BTE / scores_BTE.sum(axis=-1, keepdims=True)).mean(axis=1)", "p_BE = scores_BTE.mean(axis=1)",
     T_ROUTER),
    ("router in bfloat16", ROUTER, "x_ND.astype(w_DE.dtype)", "x_ND.astype(jnp.bfloat16).astype(w_DE.dtype)",
     T_EXPERTS),
    # experts
    ("a capacity drops tokens", EXPERTS, "filled_R = rank_R < counts_E[expert_R]",
     "filled_R = rank_R < jnp.minimum(counts_E, 6)[expert_R]", T_EXPERTS),
    ("the last choice of a token is dropped", EXPERTS, "for gate_N, row_N in zip(gates_NK.T, plan.row_NK.T))",
     "for gate_N, row_N in zip(gates_NK.T[:-1], plan.row_NK.T))", T_EXPERTS),
    ("the gradient of a token misses one row", EXPERTS, "for row_N in plan.row_NK.T)\n    return dx_ND",
     "for row_N in plan.row_NK.T[1:])\n    return dx_ND", T_EXPERTS),
    ("tokens of an expert are out of order", EXPERTS, "jnp.argsort(chosen_NK.reshape(-1), stable=True)",
     "jnp.argsort(chosen_NK.reshape(-1), stable=True, descending=True)[::-1]", T_EXPERTS),
    ("tiles start one tile late", EXPERTS, 'jnp.searchsorted(end_E, jnp.arange(tiles), side="right")',
     'jnp.searchsorted(end_E, jnp.arange(tiles), side="left")', T_EXPERTS),
    ("tile weight gradient goes to the next expert", EXPERTS, "jax.ops.segment_sum(dw_TDF, expert_T,",
     "jax.ops.segment_sum(dw_TDF, expert_T + 1,", T_EXPERTS),
    ("equal groups where one expert needs more", EXPERTS, "jnp.where(counts_E.max() <= room, room, sizes_E)",
     "jnp.full_like(sizes_E, room)", T_EXPERTS),
    ("unequal groups taken for equal ones", EXPERTS, "lax.cond(jnp.all(sizes_E == R // E),",
     "lax.cond(jnp.any(sizes_E >= 0),", T_EXPERTS),
    ("no shared expert", EXPERTS, "if cfg.num_shared_experts:", "if False:", f"{T_EXPERTS} {T_TRANSFORMER}"),
    # attention
    ("a token does not see itself", ATTENTION, "jnp.arange(block))[:, None] <= (i", "jnp.arange(block))[:, None] < (i",
     T_ATTENTION),
    ("a token sees the next one", ATTENTION, "<= (i * block + jnp.arange(block))[None]",
     "<= (i * block + 1 + jnp.arange(block))[None]", T_ATTENTION),
    ("segments are not masked", ATTENTION, "    if segments is not None:", "    if False:", T_ATTENTION),
    ("online softmax does not rescale", ATTENTION, "shrink = jnp.exp(old_top - base)", "shrink = jnp.ones_like(base)",
     T_ATTENTION),
    ("attention backward misses delta", ATTENTION, "(dp - _part(delta, i, block, 2)[:, :, None])", "dp", T_ATTENTION),
    ("one key block too few", ATTENTION, "for j in range(i + 1)]", "for j in range(max(i, 1))]", T_ATTENTION),
    ("query latent is not normed", ATTENTION, 'linear(q_norm(q_BTQ), w["q_b"]', 'linear(q_BTQ, w["q_b"]',
     T_ATTENTION),
    ("rotary key is not rotated", ATTENTION, "rotate(kv_BTX[..., None, C:], rope)", "kv_BTX[..., None, C:]",
     T_ATTENTION),
    # rope
    ("YaRN ramp runs the other way", ROPE, "return freq * (1 - slow) + freq / cfg.yarn.factor * slow",
     "return freq * slow + freq / cfg.yarn.factor * (1 - slow)", T_ROPE),
    ("YaRN ramp starts at its end", ROPE, "math.floor(index_of(cfg.yarn.beta_fast))",
     "math.floor(index_of(cfg.yarn.beta_slow))", T_ROPE),
    ("mscale is not squared", ROPE, "cfg.yarn.mscale_all_dim) ** 2", "cfg.yarn.mscale_all_dim)", T_ROPE),
    ("RoPE rotates halves", ROPE, "even, odd = x_BTHR[..., 0::2], x_BTHR[..., 1::2]",
     "even, odd = jnp.split(x_BTHR, 2, axis=-1)", T_ROPE),
    ("RoPE turns the other way", ROPE, "[even * cos - odd * sin, even * sin + odd * cos]",
     "[even * cos + odd * sin, odd * cos - even * sin]", T_ROPE),
    # layers
    ("weight gradient is halved", LAYERS, "dw_IO = matmul(transpose(x_MI), dy_MO, w_IO.dtype)",
     "dw_IO = matmul(transpose(x_MI), dy_MO, w_IO.dtype) / 2", T_LAYERS),
    ("input gradient misses the transpose", LAYERS, "transpose(w_IO.astype(dy_MO.dtype))", "w_IO.astype(dy_MO.dtype)",
     T_LAYERS),
    ("weight gradient is rounded to bfloat16", LAYERS, "dy_MO, w_IO.dtype)  #",
     "dy_MO).astype(w_IO.dtype)  #", T_LAYERS),
    ("norm without eps", LAYERS, "keepdims=True) + eps)", "keepdims=True))", T_LAYERS),
    ("norm without its scale", LAYERS, "return (y * scale.reshape((1,) * (x.ndim - 1) + (-1,)))", "return y", T_LAYERS),
    ("the report remat keeps everything", TRANSFORMER, "save_only_these_names(*SAVED_NAMES)", "everything_saveable",
     T_LAYERS),
    ("the report remat keeps nothing", LAYERS,
     '("residual", "latent", "attention", "ffn_in", "routing", "dispatched")', '("nothing",)', T_LAYERS),
    ("experts' gradients rounded to bfloat16", EXPERTS, "dw_TDF = matmul(transpose(x_TMD), dy_TMF, wide(x_RD.dtype))",
     "dw_TDF = matmul(transpose(x_TMD), dy_TMF)", T_EXPERTS),
    # mtp
    ("MTP hidden half first", MTP,
     'RMSNorm(cfg, name="embedding_norm")(ahead_BTD), RMSNorm(cfg, name="hidden_norm")(hidden_BTD),',
     'RMSNorm(cfg, name="hidden_norm")(hidden_BTD), RMSNorm(cfg, name="embedding_norm")(ahead_BTD),', T_MTP),
    ("MTP takes the state before the final norm", TRANSFORMER, "h_BTD = hidden_BTD", "h_BTD = x_BTD", T_MTP),
    ("MTP looks one token too far", TRANSFORMER, "[ahead(tokens_BT, k)]", "[ahead(tokens_BT, k + 1)]", T_MTP),
    ("MTP depths do not chain", TRANSFORMER, "module(h_BTD, ahead_BTD", "module(hidden_BTD, ahead_BTD", T_MTP),
    ("MTP does not train the embedding", TRANSFORMER, "ahead_BTD = embedding_WD[",
     "ahead_BTD = jax.lax.stop_gradient(embedding_WD)[", T_MTP),
    ("all MTP depths share one bias", TRANSFORMER, "mtp_bias_KE[k - 1]", "mtp_bias_KE[0]", T_TRANSFORMER),
    # transformer
    ("positions are ignored", TRANSFORMER, "if positions is None:", "if True:", T_TRANSFORMER),
    ("all layers share the first bias", TRANSFORMER, "x_BTD, bias_LE, rope", "x_BTD, 0 * bias_LE + bias_LE[:1], rope",
     T_TRANSFORMER),
    ("no residual around attention", TRANSFORMER, "x_BTD = x_BTD + MLA(", "x_BTD = MLA(", T_TRANSFORMER),
    # losses
    ("the loss mask is ignored", LOSSES, "(lse_M - logits_MW[hit]) * weights_M,", "(lse_M - logits_MW[hit]),",
     T_LOSSES),
    ("the gradient ignores the loss mask", LOSSES, "* weights_M[:, None]\n", "\n", T_LOSSES),
    ("the gradient ignores what follows the loss", LOSSES, "dhead_DW * dloss", "dhead_DW", T_LOSSES),
    ("MTP targets are off by one", LOSSES, "return ahead(targets_BT, k),", "return ahead(targets_BT, k + 1),",
     T_LOSSES),
    ("MTP predicts one wrapped-around token", LOSSES, "< T - k)", "<= T - k)", T_LOSSES),
    ("MTP predicts across documents", LOSSES, "if segment_ids_BT is not None:", "if False:", T_LOSSES),
    ("MTP losses are summed over depths", LOSSES, "(mtp_D / mtp_normalizer_D).mean()",
     "(mtp_D / mtp_normalizer_D).sum()", T_LOSSES),
    ("all logits exist at once", LOSSES, "chunk = min(chunk, hidden_ND.shape[0])", "chunk = hidden_ND.shape[0]",
     T_LOSSES),
    # costs
    ("MTP's head is not counted", COSTS, "+ attention + moe + head)", "+ attention + moe)", T_COSTS),
    ("the shared expert is not counted", COSTS, "(c.experts_per_token + c.num_shared_experts)", "c.experts_per_token",
     T_COSTS),
    # step
    ("bias moved by the loads of one micro-batch", STEP, "jax.tree.map(jnp.add, total, one(m)), one(0))",
     "(lambda new: (jax.tree.map(jnp.add, total[0], new[0]), {k: total[1][k] if k == 'counts' else total[1][k] + v "
     "for k, v in new[1].items()}))(one(m)), one(0))", T_STEP),
    ("each micro-batch has its own normalizer", STEP, "objective(output, nats, mtp_nats, weight, mtp_weights,",
     'objective(output, nats, mtp_nats, count * batch["active"], mtp_count * batch["active"],', T_STEP),
    ("sequence loss counted once a micro-batch", STEP, 'share = 1 / batch["active"]', "share = 1.0", T_STEP),
    ("micro-batches that the ramp leaves out run", STEP, 'fori_loop(1, batch["active"],',
     "fori_loop(1, config.train.micro_batches,", T_STEP),
    ("micro-batches that the ramp leaves out weigh", STEP, 'jnp.where(counted_M[:, None, None], parts["weights"], 0)',
     'parts["weights"]', T_STEP),
    ("bias is decayed like a weight", STEP, "_update_router(config, state.router, sums",
     "_update_router(config, jax.tree.map(lambda b: b - 0.01 * config.optimizer.weight_decay * b, state.router), "
     "sums", T_STEP),
    ("bias is scaled by the learning rate", STEP, "speed.astype(bias.dtype)",
     "(speed * config.optimizer.learning_rate).astype(bias.dtype)", T_STEP),
    ("bias never freezes", STEP, "jnp.where(step < balance.bias_until * config.train.steps, balance.bias_speed, 0.0)",
     "jnp.float32(balance.bias_speed)", T_STEP),
    ("moving average forgets instead of keeping", STEP, "decay * old + (1 - decay) * new",
     "(1 - decay) * old + decay * new", T_STEP),
    ("the MTP weight drops a step late", STEP, "jnp.where(at >= start,", "jnp.where(at > start,", T_STEP),
    ("a document predicts the next", STEP, "targets_weight * (segment_ids[:, 1:] == segment_ids[:, :-1])",
     "targets_weight", T_STEP),
    ("positions run on across documents", STEP, "index_T - jax.lax.cummax(", "index_T + 0 * jax.lax.cummax(",
     T_STEP),
    # optimizer
    ("learning rate is a step late", OPTIMIZER, "at = (step + 1) / steps", "at = step / steps", T_OPTIMIZER),
    ("the cosine ends at zero", OPTIMIZER, "cfg.cosine_to + (1 - cfg.cosine_to) * 0.5", "0.5", T_OPTIMIZER),
    ("no second tail level", OPTIMIZER, "jnp.where(at > cfg.tail_from, cfg.tail_to, falling)", "falling", T_OPTIMIZER),
    ("norm scales are decayed", OPTIMIZER, 'path[-1].key != "scale"', "True", T_OPTIMIZER),
    ("moments stay in float32", OPTIMIZER, "return grads, cast(state, dtype)", "return grads, state", T_OPTIMIZER),
    ("gradients are not clipped", OPTIMIZER, "optax.clip_by_global_norm(cfg.clip_norm)", "optax.identity()",
     T_OPTIMIZER),
    # what survives
    ("rows after the resumed step stay", METRICS, 'read_metrics(path.parent) if row["step"] <= last]',
     "read_metrics(path.parent)]", T_METRICS),
    ("loads after the resumed step stay", METRICS, "records[records[:, 0] <= last, 0]", "records[:, 0]", T_METRICS),
    ("a flipped bit is restored", DURABLE, "if found[1] != crc:", "if False:", T_CHECKPOINT),
    ("a resumed run takes a batch twice", LOOP, "self.loader.iterate(start)", "self.loader.iterate(max(start - 1, 0))",
     T_LOOP),
    ("a loss that is no number goes on", LOOP, "if not all(math.isfinite(", "if False and not all(math.isfinite(",
     T_LOOP),
    ("SIGTERM does not save", LOOP, "or step == train.steps or stopping:", "or step == train.steps:", T_LOOP),
    ("a work directory takes any config", LOOP, "    if differences:", "    if False:", T_LOOP),
    # data
    ("FIM puts the middle before the suffix", EXAMPLES, "prefix, [fim.hole], suffix, [fim.end], middle,",
     "prefix, [fim.hole], middle, [fim.end], suffix,", T_EXAMPLES),
    ("sequences start one token late", EXAMPLES, "stream.read(j * length, length + 1)",
     "stream.read(j * length + 1, length + 1)", T_LOADER),
    ("prompts are learned", LOADER, "weights_MBT[m, row, 1:] = window.predicted_T[1:]", "weights_MBT[m, row, 1:] = 1",
     T_LOADER),
    # checkpoints of Hugging Face
    ("MTP hidden half first, beside transformers", MTP,
     'RMSNorm(cfg, name="embedding_norm")(ahead_BTD), RMSNorm(cfg, name="hidden_norm")(hidden_BTD),',
     'RMSNorm(cfg, name="hidden_norm")(hidden_BTD), RMSNorm(cfg, name="embedding_norm")(ahead_BTD),', T_PARITY),
    ("eh_proj comes in with its halves exchanged", HF, "theirs = self.rows(entry, start * unit, stop * unit, dtype)",
     "theirs = self.rows(entry, start * unit, stop * unit, dtype)\n"
     "        theirs = np.roll(theirs, theirs.shape[1] // 2, axis=1) if 'eh_proj' in entry.name else theirs", T_PARITY),
    ("enorm and hnorm are exchanged", NAMES, '"{mtp}/embedding_norm/scale", SAME, False),\n'
     '    (LAYER + "hnorm.weight", "{mtp}/hidden_norm/scale"', '"{mtp}/hidden_norm/scale", SAME, False),\n'
     '    (LAYER + "hnorm.weight", "{mtp}/embedding_norm/scale"', T_PARITY),
    ("routing is rounded to the dtype of the model", HF,
     'if path.startswith("router/") or path.endswith("router/weight"):',
     "if False:", T_CONVERSION),
    ("half-split rotary rows come in as they are", NAMES, "np.arange(halves).reshape(2, -1).T.reshape(-1)",
     "np.arange(halves)", T_NAMES),
    ("all rows take the scales of the first block", ARRAYS, "strip *= scales[block]", "strip *= scales[0]", T_NAMES),
    ("empty blocks have tiny scales", EXPORT, "np.float32(1e-4))", "np.float32(1e-30))", T_NAMES),
    ("copies of the head may differ", HF, "if not np.array_equal(here, there):", "if False:", T_BAD),
    ("unknown tensors are ignored", HF, '("unknown tensors", unknown)', '("unknown tensors", set())', T_BAD),
    ("missing tensors are ignored", HF, '("missing", expected - self.tensors.keys())', '("missing", set())', T_BAD),
    ("any far layer is an MTP module", HF, "        return depth - first\n",
     "        last = max(int(n.split('.')[2]) for n in self.tensors if n.startswith('model.layers.'))\n"
     "        return max(last + 1 - first, 0)\n", T_BAD),
    ("a model goes out cut off", EXPORT, "        _check_leaves(names.leaves(cfg), leaves)\n", "", T_BAD),
    ("an index may name any file", "deepseek_jax/interop/shards.py", "or os.path.basename(file) != file or",
     "or", T_BAD),
    ("tensors of a file may overlap", "deepseek_jax/interop/shards.py", "if tensor.offset != end:", "if False:", T_BAD),
    ("numbers may be words", HF_CONFIG, "if value is not None and (type(value) not in (int, float)",
     "if value is not None and (False", T_HF_CONFIG),
    ("a failed conversion leaves its half", EXPORT, "    finally:\n        shutil.rmtree(partial, ignore_errors=True)",
     "    finally:\n        pass", T_BAD),
    ("greedy routing looks at groups", HF_CONFIG, 'raw.get("topk_method") in ("greedy", None):',
     'raw.get("topk_method") in ():', T_HF_CONFIG),
    ("widened tensors go out wide", EXPORT, "before if narrower else held", "held", T_CONVERSION),
    ("a part of a matrix takes the scales of its corner", ARRAYS, "(first_column + np.arange(values.shape[1]))",
     "np.arange(values.shape[1])", T_NAMES),
]]
for _room in sorted(pathlib.Path(__file__).parent.glob("mutations_*.py")):
    MUTATIONS += [Mutation(*row) for row in runpy.run_path(str(_room))["MUTATIONS"]]


def run_tests(tree, tests):
    """The red tests' names (without their files), and pytest's own words if it could not run them."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "--maxfail=4", "-p", "no:cacheprovider",
               "-o", "addopts=--import-mode=importlib", *(f"tests/{test}" for test in tests.split())]
    environment = {"JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"), **os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    red = re.findall(r"^(?:FAILED|ERROR) \S*?::(\w+)", done.stdout, re.MULTILINE)
    if done.returncode not in (0, 1):
        return [], (done.stdout + done.stderr).strip()[-2000:]
    return list(dict.fromkeys(red)), ""


def judge(mutation, tree):
    """(noticed, what to print)."""
    path = tree / mutation.file
    source = path.read_text()
    if source.count(mutation.old) != 1:
        return False, f"STALE: its text stands {source.count(mutation.old)} times in {mutation.file}, not once"
    mutated = source.replace(mutation.old, mutation.new)
    compile(mutated, mutation.file, "exec")
    path.write_text(mutated)
    try:
        red, trouble = run_tests(tree, mutation.tests)
    finally:
        path.write_text(source)
    if trouble:
        return False, f"pytest could not run:\n{trouble}"
    return bool(red), ", ".join(red) or f"SURVIVED {mutation.tests}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="run the mutations whose name contains one of these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args()
    chosen = [m for m in MUTATIONS if not args.words or any(w.lower() in m.name.lower() for w in args.words)]
    if args.list or not chosen:
        print("\n".join(m.name for m in (chosen or MUTATIONS)))
        return 0 if args.list else 2
    with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
        tree = pathlib.Path(folder)
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (ROOT / name).exists():
                shutil.copy(ROOT / name, tree / name)
        tests = " ".join(dict.fromkeys(test for m in chosen for test in m.tests.split()))
        red, trouble = run_tests(tree, tests)
        if red or trouble:
            print(f"The tests are red before anything is broken: {', '.join(red)}{trouble}")
            return 1
        survived = 0
        for mutation in chosen:
            start = time.time()
            noticed, words = judge(mutation, tree)
            survived += not noticed
            verdict = f"{'red ' if noticed else 'LEFT'} {time.time() - start:4.0f} s"
            print(f"{verdict}  {mutation.name:48}  {words}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} mutations were noticed.")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
