"""Mutations of meshes, dispatch and processes; rows as in mutations.py."""

DISPATCH, MESH = "deepseek_jax/parallel/dispatch.py", "deepseek_jax/parallel/mesh.py"
EXPERTS, LAYERS, LOSSES = (f"deepseek_jax/{name}.py" for name in ("model/experts", "model/layers", "training/losses"))
SIZES, PROCESSES, LOOP = ("deepseek_jax/mesh_config.py", "deepseek_jax/training/processes.py",
                          "deepseek_jax/training/loop.py")
T_DISPATCH, T_MESH, T_LAYER, T_TRAINING, T_PROCESSES = (
    f"parallel/test_{name}.py" for name in ("dispatch", "mesh", "moe_layer", "training", "processes"))

MUTATIONS = [
    # dispatch
    ("a node gets a copy for each choice", DISPATCH, "& ~earlier_RK & (rank_RK", "& (rank_RK", T_DISPATCH),
    ("the last slot of a buffer stays empty", DISPATCH, "moves, sent_P = None, jnp.minimum(wanted_P, room)",
     "moves, sent_P = None, jnp.minimum(wanted_P, room - 1)", T_DISPATCH),
    ("copies of a place share a slot", DISPATCH, "rank_RP = jnp.cumsum(goes_RP, axis=0, dtype=jnp.int32) - goes_RP",
     "rank_RP = 0 * jnp.cumsum(goes_RP, axis=0, dtype=jnp.int32)", T_DISPATCH),
    ("results of one copy are lost", DISPATCH, "for slot_R in hop.slot_RK.T).astype(y.dtype)",
     "for slot_R in hop.slot_RK.T[:-1]).astype(y.dtype)", T_DISPATCH),
    ("a device serves its neighbour's experts", DISPATCH, "send(id_RK, hop) - lax.axis_index(axis) * size",
     "send(id_RK, hop) - (lax.axis_index(axis) ^ 1) * size", T_DISPATCH),
    ("choices of other nodes are served again", DISPATCH,
     "id_RK = jnp.where((id_RK > 0) & (id_RK <= size), id_RK, 0)",
     "id_RK = jnp.where(id_RK > 0, (id_RK - 1) % size + 1, 0)", T_DISPATCH),
    ("hops come back in the order they went", DISPATCH, "for hop in reversed(hops):", "for hop in hops:", T_DISPATCH),
    ("a ragged receiver lets copies overlap", DISPATCH, "landing_QP = jnp.cumsum(wanted_QP, axis=0) - wanted_QP",
     "landing_QP = jnp.maximum(jnp.cumsum(wanted_QP, axis=0) - wanted_QP - 1, 0)", T_DISPATCH),
    ("a ragged receiver is overrun", DISPATCH, "jnp.clip(room - landing_QP, 0, wanted_QP)", "wanted_QP", T_DISPATCH),
    ("what rows land in is a constant", DISPATCH, "jnp.minimum(arriving_P[0], 0).astype(x.dtype)",
     "jnp.zeros((), x.dtype)", T_DISPATCH),
    ("dropped choices count as computed", EXPERTS, "rows - 1), sizes_E), kept_NK.sum()",
     "rows - 1), sizes_E), (id_NK > 0).sum()", T_LAYER),
    ("what a capacity cuts off is read from a full row", EXPERTS, "jnp.where(kept_NK, p.row_NK, rows - 1)",
     "jnp.where(kept_NK, p.row_NK, 0)", T_LAYER),
    ("tokens travel again in the backward pass", LAYERS, '"routing", "dispatched")', '"routing")', T_LAYER),
    ("gradients of outputs travel in full", DISPATCH, "lambda wire, hops, dx: (dispatch(dx, hops, wire), None)",
     "lambda wire, hops, dx: (dispatch(dx, hops), None)", T_DISPATCH),
    ("bytes forget the scales", DISPATCH, "model.d_model + 4 * -(-model.d_model // 128) if", "model.d_model if",
     T_DISPATCH),
    ("counters wrap", DISPATCH, "jnp.asarray(n, jnp.float32) for name", "jnp.asarray(n, jnp.int32) for name",
     T_DISPATCH),
    ("counters stay on their device", DISPATCH, 'return y_ND, lax.psum(traffic, AXES["tokens"])',
     "return y_ND, traffic", T_DISPATCH),
    # mesh
    ("experts are whole on every device", MESH, '"experts": ("node", "local"),', '"experts": (),', T_MESH),
    ("masters are whole on every device", MESH, "        if axes and fits:", "        if False:", T_MESH),
    ("axes that do not divide one dimension split nothing", MESH, "for axes in (free, *((axis,) for axis in free)):",
     "for axes in (free,):", T_MESH),
    ("masters split over axes that they already use", MESH, "if axis not in sum(split, ()) and mesh.shape[axis] > 1",
     "if mesh.shape[axis] > 1", T_MESH),
    ("a leaf without a rule is whole", MESH, '    raise ValueError(f"no rule says where',
     '    return (None,) * rank\n    raise ValueError(f"no rule says where', T_MESH),
    ("two dimensions may share an axis", MESH, "if clash := used.intersection(axes):", "if clash := ():", T_MESH),
    ("any number of devices will do", MESH, "if cfg.devices != len(devices):", "if cfg.devices > len(devices):",
     T_MESH),
    ("groups may straddle nodes", SIZES, "groups = c.num_groups if c.num_groups > 1 else c.num_experts",
     "groups = c.num_experts", T_MESH),
    # training
    ("a device's loss leaves out the others' tokens", LOSSES, "nats = jax.vmap(each)(*tokens).sum() if",
     "nats = jax.vmap(each)(*tokens)[0] if", T_TRAINING),
    # processes
    ("nobody says farewell", PROCESSES, "            connection.sendall(FAREWELL)\n", "            pass\n",
     T_PROCESSES),
    ("a stranger is taken for a process", PROCESSES, "if 0 < process < self.group.processes:", "if True:", T_PROCESSES),
    ("processes are not compared", LOOP, "    check_same(repr(config))\n", "", T_PROCESSES),
    ("the others wait as long as gloo does", PROCESSES,
     "ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=LONGEST_WORK * 1000)",
     "multihost_utils.sync_global_devices(name)", T_PROCESSES),
    ("a process that is gone is not missed", PROCESSES, "if last == FAREWELL:", 'if last in (FAREWELL, b""):',
     T_PROCESSES),
    ("the table of bytes forgets the pipeline", "deepseek_jax/parallel/mesh.py", "-(-part[0] // ranks)", "part[0]",
     "parallel/test_mesh.py"),
]
