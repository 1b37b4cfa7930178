"""Mutations of the pipeline; see mutations.py."""

_FILES = ("orders", "ticks", "validate", "split", "tables", "execute", "draw")
ORDERS, TICKS, VALIDATE, SPLIT, TABLES, EXECUTE, DRAW = (f"deepseek_jax/pipeline/{name}.py" for name in _FILES)
T_SCHEDULE, T_VALIDATE, T_SPLIT, T_EXECUTE, T_DRAW = (
    f"pipeline/test_{name}.py" for name in ("schedule", "validate", "split", "execute", "draw"))
PIPELINED, LOSSES = "deepseek_jax/training/pipelined.py", "deepseek_jax/training/losses.py"
MESH = "deepseek_jax/parallel/mesh.py"
OVERLAP, T_OVERLAP = "experiments/studies/pipeline/overlap.py", "experiments/test_overlap.py"
T_PIPELINED, T_LOSSES, T_MESH = "training/test_pipelined.py", "training/test_losses.py", "parallel/test_mesh.py"
T_ONE_STEP = f"{T_PIPELINED}::test_in_float64_losses_gradients_and_loads_are_those_without_a_pipeline[1f1b]"
T_SLOTS = f"{T_PIPELINED}::test_every_layer_has_one_slot_and_stages_differ_by_one_layer"
T_REFUSED = f"{T_PIPELINED}::test_what_does_not_fit_the_pipeline_is_refused_with_what_would"

MUTATIONS = [
    # schedules
    ("1f1b runs one forward pass fewer ahead", ORDERS,
     'ahead = min(ranks - 1 - rank, microbatches)\n    for kind in ["F"] * ahead + ["F", "B"]',
     'ahead = max(min(ranks - 2 - rank, microbatches), 0)\n    for kind in ["F"] * ahead + ["F", "B"]', T_SCHEDULE),
    ("zb1p defers one weight gradient more", ORDERS,
     "if out.deferred > rank:", "if out.deferred > rank + 1:", T_SCHEDULE),
    ("weight gradients: the newest instead of the oldest", ORDERS,
     "self._deferred.popleft()", "self._deferred.pop()", T_SCHEDULE),
    ("dualpipe overlaps in the middle too", ORDERS, "if i == 0 and inner == 0:", "if False:", T_SCHEDULE),
    ("dualpipe defers one later in step 6", ORDERS, '"Bi" if i > depth', '"Bi" if i > depth + 1', T_SCHEDULE),
    ("ticks run everything at once", TICKS,
     "for longest in set(ready.values()):", "for longest in [max(ready.values())]:", T_SCHEDULE),
    ("slots are freed a tick early", TICKS, "ends[0][0] < first", "ends[0][0] <= first", T_SCHEDULE),
    ("a message's slot is taken a tick late", TICKS,
     "tick[sender] + 1, begin)", "tick[sender] + 2, begin)", T_SCHEDULE),
    # the validator
    ("operations may be missing", VALIDATE,
     '("is missing", expected - set(ticks))', '("is missing", set())', T_VALIDATE),
    ("operations may run twice", VALIDATE, "if key in ticks:", "if False:", T_VALIDATE),
    ("inputs from the same tick", VALIDATE, "if ticks[source] >= tick:", "if ticks[source] > tick:", T_VALIDATE),
    ("slots may be shared for a tick", VALIDATE, "if first <= last:", "if first < last:", T_VALIDATE),
    ("messages arrive a tick later", VALIDATE,
     "(ticks[source] + 1, tick, op)", "(ticks[source] + 2, tick, op)", T_VALIDATE),
    ("a wrong slot may be read", VALIDATE, "if slot != filled:", "if False:", T_VALIDATE),
    ("any two operations overlap", VALIDATE, "if kind_of(cell) not in CELLS:", "if False:", T_VALIDATE),
    ("Bi takes as long as B", VALIDATE, '"Bi": costs["b"] - costs["w"]', '"Bi": costs["b"]', T_VALIDATE),
    ("a waiting rank is forgotten", VALIDATE,
     "for need, ranks in waiting.items():", "for need, ranks in ():", T_VALIDATE),
    ("peaks count what ends before what begins", VALIDATE,
     "for op in cell), reverse=True)", "for op in cell))", T_SCHEDULE),
    # the picture
    ("the lower picture is free-running too", DRAW,
     "(locked, _ticks(schedule, time))", "(locked, list(starts(schedule, costs))[1:])", T_DRAW),
    # the split
    ("what is recomputed for W stays in Bi", SPLIT, "                in_w.add(i)\n", "                pass\n", T_SPLIT),
    ("W recomputes whatever it alone needs", SPLIT,
     "if _bytes(_structs(more)) <= _bytes(_structs(made & read)):", "if True:", T_SPLIT),
    ("Bi does what W could", SPLIT, "back - self._needed(self.dx), on_x, on_dy)", "set(), on_x, on_dy)", T_SPLIT),
    ("what depends on parameters alone is kept", SPLIT,
     "on_x - self._made(range(", "set(self._made(range(self.num_ahead))) | on_x - self._made(range(", T_SPLIT),
    ("checkpoints stay whole", SPLIT, '"checkpoint", "remat", "remat2", ', "", T_SPLIT),
    # the executor
    ("messages do not turn around in a V", EXECUTE,
     "if self.schedule.route.v_shaped:  # the turn", "if False:", T_EXECUTE),
    ("mirror gradients are not summed", EXECUTE,
     "lambda a: a[:1] + self._mirrored(a[1:]), tree)", "lambda a: a[:1], tree)", T_EXECUTE),
    ("the mirror copy is the own stage", EXECUTE, "own + [self._mirrored(own[0])]", "own + [own[0]]", T_EXECUTE),
    ("gradients of one direction go to the other copy", EXECUTE,
     "_add_at(result.params, backward, done.dparams)", "_add_at(result.params, forward, done.dparams)", T_EXECUTE),
    ("the stages' own losses are lost", EXECUTE, "loss=result.loss + done.loss", "loss=result.loss", T_EXECUTE),
    ("the stages' own losses have no gradient", EXECUTE, "dloss = jnp.ones(", "dloss = jnp.zeros(", T_EXECUTE),
    ("the last stage's output reaches its own rank only", EXECUTE,
     "y = lax.psum(_where(self.rank == rank, y), self.axis)", "y = _where(self.rank == rank, y)", T_EXECUTE),
    ("each rank's part of the output's gradient stays there", EXECUTE,
     "dshared, lax.psum(dy, self.axis)", "dshared, dy", T_EXECUTE),
    ("every rank's dx goes into the embedding", EXECUTE, "vjp(_where(self.rank == rank, dx))", "vjp(dx)", T_EXECUTE),
    ("W takes the inputs of the forward micro-batch", EXECUTE,
     'cell.forward if kind == "F" else cell.backward', "cell.forward", T_EXECUTE),
    ("gradients are not summed over data", EXECUTE, "lax.psum(g, axes) if axes else g", "g", T_EXECUTE),
    ("both halves use the slot that is taken", TABLES,
     "ranks.activation_out[at] = op.microbatch, op.activation",
     "ranks.activation_out[at] = op.microbatch, 0", T_EXECUTE),
    ("activations and gradients swap channels", TABLES, "2 * (not from_before)", "2 * from_before", T_EXECUTE),
    # the model on it
    ("what padding computes is passed on", PIPELINED, 'jnp.where(at["real"], y_BTD, x_BTD)', "y_BTD", T_ONE_STEP),
    ("layers are sought in the first slots", PIPELINED, "[found_L]\n", "[:len(found_L)]\n", T_ONE_STEP),
    ("padding has a balance loss", PIPELINED,
     'jnp.where(at["real"], stats["sequence_loss"], 0)', 'stats["sequence_loss"]', T_ONE_STEP),
    ("stages have no balance loss", PIPELINED, "return x_BTD, balance, jax", "return x_BTD, 0 * balance, jax",
     T_ONE_STEP),
    ("MTP's balance loss counts once a rank", PIPELINED, "x_BTD.shape[:2], -1)) / ranks", "x_BTD.shape[:2], -1))",
     T_ONE_STEP),
    ("the balance loss counts once a data shard", PIPELINED,
     "/ (micro * config.mesh.data_shards)", "/ micro", T_ONE_STEP),
    ("every rank counts the weights", PIPELINED, '"weight": weight * first', '"weight": weight', T_ONE_STEP),
    ("each rank keeps its own heads", PIPELINED,
     "return x_BTD + lax.psum(part, PIPE)", "return x_BTD + part", T_ONE_STEP),
    ("MTP's experts see the first tokens only", PIPELINED,
     "lax.axis_index(PIPE) * tokens, tokens)", "0, tokens)", T_ONE_STEP),
    ("the first stages are filled up", PIPELINED,
     "np.arange(stages + 1) * layers // stages", "np.minimum(np.arange(stages + 1) * -(-layers // stages), layers)",
     T_SLOTS),
    ("stages lie in natural order in a V", PIPELINED, "order = rows(schedule)", "order = list(range(stages))",
     f"{T_PIPELINED}::test_layers_follow_each_other_along_the_pipeline"),
    ("any number of sequences is cut up", PIPELINED, "if sequences % parts:", "if False:", T_REFUSED),
    ("heads need not divide", PIPELINED, "cfg.num_heads if heads else 0", "0", T_REFUSED),
    ("every device counts the normalizer", LOSSES, "lax.axis_index(axis) == 0, weights_M, 0)", "True, weights_M, 0)",
     T_LOSSES),
    ("each device has a softmax of its own", LOSSES,
     "jax.nn.logsumexp(lax.all_gather(lse_M, axis), axis=0)", "lse_M", T_LOSSES),
    ("targets that lie elsewhere are hit", LOSSES, "weights_hit_M = jnp.where(mine_M, weights_M, 0)",
     "weights_hit_M = weights_M", T_LOSSES),
    ("masters are whole along the pipeline", MESH, 'in ("pipe", *DATA) if axis', "in DATA if axis", T_MESH),
    # what is read off compiled programs
    ("transfers happen at the same time", OVERLAP, "max(now, network) + seconds", "now + seconds", T_OVERLAP),
    ("waiting takes no time", OVERLAP, "now = max(now, ends)", "pass", T_OVERLAP),
    ("products of all rows by every expert count in full", OVERLAP,
     "flops * LOCAL / MODEL.num_experts if expanded else flops", "flops", T_OVERLAP),
]
