"""Mutations of counting, planning and reading compiled programs; rows as in mutations.py."""

COSTS, LAYOUT, TRAFFIC, TIMING, PLAN, DECODING, HLO, MEMORY, TARGETS = (
    f"deepseek_jax/scale/{name}.py" for name in
    ("costs", "layout", "traffic", "timing", "plan", "decoding", "hlo", "memory", "targets"))
T_COSTS, T_PLAN, T_HLO, T_MEMORY, T_TARGETS = (
    f"scale/test_{name}.py" for name in ("costs", "plan", "hlo", "memory", "targets"))

MUTATIONS = [
    # counting
    ("biases are not counted", COSTS, "+ c.num_moe_layers * bias", "+ 0 * bias", T_COSTS),
    ("all experts are active", COSTS, "(c.num_experts - c.experts_per_token)", "0", T_COSTS),
    ("the embedding stays among the active", COSTS, "main - idle - 2 * table", "main - idle - table", T_COSTS),
    ("an MTP module has two norms", COSTS, "block_norms + 3 * c.d_model", "block_norms + 2 * c.d_model", T_COSTS),
    ("the core's backward pass costs what its forward does", COSTS, '"input": 4 * weights["scores"]',
     '"input": 2 * weights["scores"]', T_COSTS),
    # traffic
    ("a copy that stays at home travels", TRAFFIC, "elsewhere = (mesh.node - 1) / mesh.node", "elsewhere = 1", T_PLAN),
    ("two hops send a copy a device", TRAFFIC, '"across": nodes * elsewhere', '"across": devices * elsewhere', T_PLAN),
    ("the node limit is forgotten", TRAFFIC, "kept = c.groups_kept if limited else c.num_groups",
     "kept = c.num_groups", T_PLAN),
    ("results come back in FP8", TRAFFIC, "copy_bytes(c, False)", "copy_bytes(c, layout.mesh.dispatch_fp8)", T_PLAN),
    # time
    ("moving tokens takes no SMs", TIMING, "work / (1 - m.reserved)", "work", T_PLAN),
    ("the network is free", TIMING, "max(work / (1 - m.reserved), network)", "work / (1 - m.reserved)", T_PLAN),
    ("the bubble is left out", TIMING, "sum(report.idle) / schedule.ranks, report.makespan",
     "0.0, report.makespan", T_PLAN),
    ("MFU counts MTP", TIMING, "counted = dataclasses.replace(c, mtp_depth=0)", "counted = c", T_PLAN),
    ("MFU of FP8's peak", TIMING, "layout.mesh.devices * hw.bf16", "layout.mesh.devices * (hw.fp8 or hw.bf16)",
     T_PLAN),
    ("gradients are not summed over replicas", TIMING, 'sent["gradients"] + sent["weights"]', 'sent["weights"]',
     T_PLAN),
    # search and advice
    ("layouts that do not fit are offered", PLAN, "if needed > hw.memory:", "if needed < 0:", T_PLAN),
    ("slowest first", PLAN, "fitting.sort(key=lambda found: found[1].hours)",
     "fitting.sort(key=lambda found: -found[1].hours)", T_PLAN),
    ("advice looks at the smallest group", PLAN, "largest = max(found.bytes", "largest = min(found.bytes", T_PLAN),
    ("a batch that does not divide is cut", LAYOUT, "if left or not microbatches:", "if not microbatches:", T_PLAN),
    # decoding
    ("the shared expert's copy is free", DECODING, "3 * tokens * (c.experts_per_token + c.num_shared_experts)",
     "3 * tokens * c.experts_per_token", T_PLAN),
    ("verifying is free", DECODING, "each = 1 if accepted is None else 2", "each = 1", T_PLAN),
    # reading programs
    ("what starts counts as hidden", HLO, 'row["hidden"] += bool(one.products)',
     'row["hidden"] += one.products is not None', T_HLO),
    ("loops run once", HLO, "times * step.trips", "times", T_HLO),
    ("branches are not marked", HLO, 'branch or step.key == "conditional"', "branch", T_HLO),
    ("groups are not transposed", HLO, "order = order or list(range(len(dims)))", "order = list(range(len(dims)))",
     T_HLO),
    ("axes are read from the wrong end", HLO, "places.append(place[::-1])", "places.append(place)", T_HLO),
    ("products inside fusions do not count", HLO, "each = [self.work(inner) for inner in _called(rest)]", "each = []",
     T_HLO),
    ("products in loops count once", HLO, "_trips(operation, rest) * sum(flops", "sum(flops", T_HLO),
    ("what is summed over does not count", HLO, "math.prod(_dims(shape)) * summed", "math.prod(_dims(shape))", T_HLO),
    ("what an async-start wraps is not read", HLO,
     'return (found, "start") if operation == "async-start" else (None, "")', 'return None, ""', T_HLO),
    # targets
    ("a TPU7x chip is one device", TARGETS, '(2 if name == "7x" else 1)', "1", T_TARGETS),
    ("half a host is fine", TARGETS, "number > 8 and number % 8", "number > 8 and number % 4", T_TARGETS),
    # attention's kernels and sums
    ("attention's kernels see the whole square", HLO, "return float(B * H * T * T * widths)",
     "return 2.0 * B * H * T * T * widths", T_HLO),
    ("logits are there beside the copies of rows", MEMORY, "max(0.0, passing(c, layout, loss_chunk) - copies)",
     "passing(c, layout, loss_chunk)", T_MEMORY),
    ("attention's sums are one layer's", MEMORY, "    return layers * layout.tokens * heads",
     "    return layout.tokens * heads", T_MEMORY),
    ("long stacks are unrolled too", MEMORY, "UNROLLED_LAYERS = 8", "UNROLLED_LAYERS = 99", T_MEMORY),
]
