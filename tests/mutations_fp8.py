"""Mutations of FP8 training and of the kernels; `tests/mutations.py` joins them."""

FP8 = "deepseek_jax/fp8.py"
QUANTIZE = "kernels_pallas/reference/quantize.py"
MATMUL = "kernels_pallas/reference/fp8_matmul.py"
GROUPED = "kernels_pallas/reference/fp8_grouped_matmul.py"
DECODE = "kernels_pallas/reference/mla_decode.py"
H_QUANTIZE, H_MATMUL, H_GROUPED = (f"kernels_pallas/hopper/{name}.py"
                                   for name in ("quantize", "fp8_matmul", "fp8_grouped_matmul"))
H_ATTENTION, H_DECODE, H_RING = (f"kernels_pallas/hopper/{name}.py" for name in ("mla_attention", "mla_decode", "ring"))
TPU_MATMUL, TPU_GROUPED = (f"kernels_pallas/tpu/{name}.py" for name in ("fp8_matmul", "fp8_grouped_matmul"))
T_MLA, T_TPU = "kernels/test_hopper_mla.py", "kernels/test_tpu.py"
REPORT = "kernels_pallas/compile_report.py"
T_FP8, T_REFERENCE, T_HOPPER, T_TOOLS = ("test_fp8.py", "kernels/test_reference.py", "kernels/test_hopper.py",
                                         "kernels/test_tools.py")

DISPATCH, T_MOE_LAYER = "deepseek_jax/parallel/dispatch.py", "parallel/test_moe_layer.py"
MOE = "deepseek_jax/model/experts.py"
ATTENTION, R_ATTENTION = "deepseek_jax/model/attention.py", "kernels_pallas/reference/mla_attention.py"
MESH, T_KERNEL = "deepseek_jax/parallel/mesh.py", "model/test_attention_kernel.py"

MUTATIONS = [
    ("attention: what the kernel gave is not kept", ATTENTION, 'lambda x: checkpoint_name(x, "attention")',
     "lambda x: x", T_KERNEL),
    ("attention: a kernel is taken for any dtype", ATTENTION, "q_BTHA.dtype == jnp.bfloat16 and ", "", T_KERNEL),
    ("attention: the kernel is not told of segments", ATTENTION, "(WIDE, LONG), q, k, v, segments)",
     "(WIDE, LONG), q, k, v, None)", T_KERNEL),
    ("attention: every device attends to all rows and heads", MESH,
     "jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arrays)", "f(*arrays)", T_KERNEL),
    ("attention's twin: gradients miss delta", R_ATTENTION, "(dp_BHTS - delta_BHT[..., None])", "dp_BHTS", T_KERNEL),
    ("hopper attention: log-sum-exps stay natural", H_ATTENTION, "lse * math.log2(math.e)", "lse * 1.0", T_MLA),
    ("hopper decode: all columns have the first scale", H_DECODE,
     "lax.div(column, 2) == lax.div(number, BLOCK // PANEL)", "lax.div(column, 2) == 0", T_MLA),
    ("hopper decode: FP8 rows that were never written stay", H_DECODE,
     "jnp.where(row < count, values * rows(scale, values.shape), 0.0)", "values * rows(scale, values.shape)", T_MLA),
    ("hopper decode: a block is multiplied before it is there", H_DECODE,
     "length - first, group))\n                meet()", "length - first, group))", T_MLA),
    ("hopper: on the interpreter NaN is skipped", H_QUANTIZE, "if not interpret:", "if True:", T_HOPPER),
    ("report: maxima that skip NaN are no fault", REPORT, 'if "quantize" in operation and row["nan_skipped"]:',
     "if False:", T_TOOLS),
    ("fp8: what arrived at the experts is kept wide", DISPATCH, "wire.decode(kept(parts), x_ND.dtype)",
     "kept(wire.decode(parts, x_ND.dtype))", T_MOE_LAYER),
    ("a capacity is that of the whole mesh", MOE, "chosen_NK.size // (data_shards() * mesh.tensor)", "chosen_NK.size",
     T_MOE_LAYER),
    ("fp8: 448 is a plain constant, which XLA inverts", QUANTIZE,
     "lax.optimization_barrier(jnp.full_like(amax, largest))", "largest", T_FP8),
    ("fp8: the divisor is a plain broadcast, which XLA inverts", QUANTIZE,
     "jnp.where(jnp.isnan(x), x, spread(scales, x.shape, rows, columns))", "spread(scales, x.shape, rows, columns)",
     T_FP8),
    ("fp8: magnitudes are compared with their sign", QUANTIZE, " & 0x7FFFFFFF", "", T_FP8),
    ("fp8: amax is not clamped", QUANTIZE, "SMALLEST_AMAX = 1e-4", "SMALLEST_AMAX = 1e-30", T_FP8),
    ("fp8: powers of two round down", QUANTIZE, "(bits + jnp.uint32(0x7FFFFF))", "bits", T_FP8),
    ("fp8: the transposed copy keeps 1 x 128 tiles of x", QUANTIZE, "tile_amax(x, BLOCK, 1)", "tile_amax(x, 1, BLOCK)",
     T_FP8),
    ("fp8: E5M6 rounds halves up", FP8, " + ((bits >> 17) & 1)", " + 1", T_FP8),
    ("fp8: E5M6 loses its subnormals", FP8, "jnp.round(x * 2.0**20) * 2.0**-20", "x * 0", T_FP8),
    ("fp8: o_proj keeps nothing of its input", FP8, "(to_e5m6(x_MK) if kept", "(to_e5m6(0 * x_MK) if kept",
     T_FP8),
    ("fp8: one scale serves a whole array", FP8,
     'share="tensor" if recipe.tiles == "tensor" else share, implementation', 'share="tensor", implementation', T_FP8),
    ("fp8: the gradient's format is ignored", FP8, "GRADIENT_FORMATS[recipe.gradient_format]", "jnp.float8_e4m3fn",
     T_FP8),
    ("fp8: the experts' inputs are scaled by any number", FP8, 'None if sizes is None else "power_of_two"', "None",
     T_FP8),
    ("fp8: SwiGLU's inputs are kept as they were", FP8, "[_activation(x, recipe) for x in (gate_MF, up_MF)]",
     "[Quantized(x, jnp.ones((len(x), x.shape[1]))) for x in (gate_MF, up_MF)]", T_FP8),
    ("fp8: gate and up change places in the backward pass", FP8, "jax.vjp(_swiglu, dequantize(gate), dequantize(up))",
     "jax.vjp(_swiglu, dequantize(up), dequantize(gate))", T_FP8),
    ("accumulation: promotion never comes", MATMUL, "accumulator.promote_every // group", "0", T_FP8),
    ("grouped: rows past the last group are multiplied", GROUPED,
     "jnp.where((expert_T < len(sizes_E))[:, None, None], y_TMN, 0)", "y_TMN + 1", T_REFERENCE),
    ("decode: reads past the length", DECODE, "< lengths_B[:, None, None]", "<= lengths_B[:, None, None]", T_REFERENCE),
    ("hopper: shared memory is filled again before it was read", H_MATMUL, "@pl.when(step >= stages)",
     "@pl.when(step >= 10**6)", T_HOPPER),
    ("hopper: a column's scale is left out", H_MATMUL,
     "part *= lax.broadcast_in_dim(scale_b, (64, tile_n), (1,))", "pass", T_HOPPER),
    ("hopper: the second warpgroup takes the first one's rows", H_MATMUL, "(group * 64, 0)", "(0, 0)", T_HOPPER),
    ("hopper: an expert's slices start at zero", H_GROUPED, "first_E = jnp.cumsum(steps_E) - steps_E",
     "first_E = 0 * steps_E", T_HOPPER),
    ("hopper: the transposed copy is not transposed", H_QUANTIZE,
     ".transpose((1, 0)), layout=WGMMA)", ", layout=WGMMA)", T_HOPPER),
    ("hopper: powers of two round down", H_QUANTIZE, "(bits + 0x7FFFFF)", "bits", T_HOPPER),
    ("report: spills are no fault", REPORT, 'if row["spill_bytes"] else []', "if False else []", T_TOOLS),
    ("hopper attention: a query sees the next key", H_ATTENTION, "iota(q_axis) + (query - key) >=",
     "iota(q_axis) + (query - key) + 1 >=", T_MLA),
    ("hopper attention: segments are not masked", H_ATTENTION, "    if segments_ref is not None:\n        def ids",
     "    if False:\n        def ids", T_MLA),
    ("hopper attention: the old output is not rescaled", H_ATTENTION, "o = o * rows(shrink, o.shape)", "o = o * 1.0",
     T_MLA),
    ("hopper attention: dq misses delta", H_ATTENTION, "ds = p * (dp - rows(delta, s.shape))", "ds = p * dp", T_MLA),
    ("hopper attention: dk starts at the first query", H_ATTENTION,
     "at = (batch, pl.ds((start + n) * width, width), head)", "at = (batch, pl.ds(n * width, width), head)", T_MLA),
    ("hopper attention: a slot is filled again before it was read", H_RING, "@pl.when(n >= self.slots[0].shape[0])",
     "@pl.when(n >= 10**6)", T_MLA),
    ("hopper decode: tokens past the length are read", H_DECODE, "jnp.where(token < length, s, -jnp.inf)", "s", T_MLA),
    ("hopper decode: what was never written stays", H_DECODE, "@pl.when(first + TOKENS > length)",
     "@pl.when(first > length)", T_MLA),
    ("hopper decode: the groups keep their own maxima", H_DECODE, "jnp.maximum(*both(said_smem))", "s.max(axis=1)",
     T_MLA),
    ("hopper decode: shares weigh the same", H_DECODE, "weights_BSH /= ", "weights_BSH = 0 * weights_BSH + 1 / ",
     T_MLA),
    ("tpu: a column's scale is left out", TPU_MATMUL, " * sb_ref[k:k + 1, :]", "", T_TPU),
    ("tpu: the total is never cleared", TPU_MATMUL, "@pl.when(first)", "@pl.when(first & False)", T_TPU),
    ("tpu: rows of no expert are written", TPU_GROUPED, "jnp.where(expert_T[pl.program_id(0)] < E, scaled_product(",
     "jnp.where(expert_T[pl.program_id(0)] <= E, scaled_product(", T_TPU),
    ("tpu: experts without rows keep what was there", TPU_GROUPED, "jnp.where((sizes_E > 0)[:, None, None], dw_EMN, 0)",
     "dw_EMN", T_TPU),
]
