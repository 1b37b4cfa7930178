"""Mutations of sequences split over devices: their order, the ring, what is shifted across seams."""

from tests.mutations.row import Mutation

RING, CONTEXT = "deepseek_jax/model/ring_attention.py", "deepseek_jax/parallel/context.py"
WHOLE = "model/test_ring_attention.py::test_parts_in_a_ring_attend_as_the_complete_sequence_does"
HOP = "model/test_ring_attention.py::test_a_hop_carries_the_latents_of_its_tokens_and_nothing_else"
PAIRS = ("model/test_ring_attention.py::"
         "test_every_pair_of_blocks_that_attends_is_on_one_device_and_all_have_the_same_work")
PART = "parallel/test_context.py::test_a_part_is_an_early_block_and_the_late_one_that_balances_it"
STEP = ("parallel/test_context.py::"
        "test_in_float64_losses_gradients_and_loads_are_those_of_complete_sequences")

MUTATIONS = [
    Mutation(
        name="a sequence is cut into consecutive parts",
        file=CONTEXT,
        old="return part, 2 * parts - 1 - part",
        new="return 2 * part, 2 * part + 1",
        tests=f"{PAIRS} {PART}",
    ),
    Mutation(
        name="every device has the first part",
        file=CONTEXT,
        old="blocks_of(lax.axis_index(CONTEXT), parts)",
        new="blocks_of(0, parts)",
        tests=PART,
    ),
    Mutation(
        name="the balance loss is that of parts",
        file=CONTEXT,
        old="lax.pmean(x_B, CONTEXT)",
        new="x_B",
        tests="parallel/test_context.py::test_a_mean_over_parts_is_that_of_the_sequence",
    ),
    Mutation(
        name="what comes from after is attended to as from before",
        file=RING,
        old="hop <= lax.axis_index(CONTEXT)",
        new="hop < lax.axis_index(CONTEXT)",
        tests=WHOLE,
    ),
    Mutation(
        name="all queries attend to what comes from after",
        file=RING,
        old="pairs(second, every))",
        new="pairs(every, first))",
        tests=f"{WHOLE} {PAIRS}",
    ),
    Mutation(
        name="hops see rows as if they were the own ones",
        file=RING,
        old="Blocks(size, pairs, False)",
        new="Blocks(size, pairs)",
        tests=WHOLE,
    ),
    Mutation(
        name="segments stay at home",
        file=RING,
        old="k, v, _pair(segments, ids), softmax_scale(cfg), blocks)\n\n    o, lse",
        new="k, v, _pair(segments, segments), softmax_scale(cfg), blocks)\n\n    o, lse",
        tests=WHOLE,
    ),
    Mutation(
        name="gradients of latents stay where they were made",
        file=RING,
        old="_onward(dlatent).astype(latent_BTX.dtype)",
        new="dlatent.astype(latent_BTX.dtype)",
        tests=WHOLE,
    ),
    Mutation(
        name="gradients of latents do not follow them",
        file=RING,
        old="sums[1], _onward(sums[2]))",
        new="sums[1], sums[2])",
        tests=WHOLE,
    ),
    Mutation(
        name="W_UKV learns from the last hop alone",
        file=RING,
        old="dw + dw_here",
        new="dw_here",
        tests=WHOLE,
    ),
    Mutation(
        name="W_UKV's gradient is one device's",
        file=RING,
        old='summed=(None, "heads", "batch"))',
        new='summed=(None, "heads", None))',
        tests=WHOLE,
    ),
    Mutation(
        name="what has arrived is sent twice",
        file=RING,
        old="    (arrived, sums), _ = lax.scan(step, (arriving, sums), jnp.arange(1, parts - 1))\n",
        new=("    (arrived, sums), _ = lax.scan(step, (arriving, sums), jnp.arange(1, parts - "
             "1))\n    arrived = _onward(_onward(arrived))\n"),
        tests=f"{WHOLE} {HOP}",
    ),
    Mutation(
        name="keys travel instead of latents",
        file=RING,
        old=("lambda x: lax.ppermute(x, CONTEXT, [(n, (n + 1) % parts) for n in range(parts)])"
             ", tree)"),
        new=("lambda x: lax.ppermute(jnp.repeat(x, 4, -1), CONTEXT, [(n, (n + 1) % parts) for "
             "n in range(parts)])[..., ::4], tree)"),
        tests=HOP,
    ),
    Mutation(
        name="pairs of a pipeline's ring turn the other way",
        file=RING,
        old="% 2 == 1, from_even_or_odd(0), from_even_or_odd(1))",
        new="% 2 == 0, from_even_or_odd(0), from_even_or_odd(1))",
        tests=STEP + "[1f1b]",
    ),
    Mutation(
        name="MTP reads the tokens ahead inside a part",
        file="deepseek_jax/model/transformer.py",
        old="in_parts(ahead(tokens_BT, k))",
        new="ahead(in_parts(tokens_BT), k)",
        tests=STEP + "[context=2]",
    ),
    Mutation(
        name="positions are those of parts",
        file="deepseek_jax/model/transformer.py",
        old="in_parts(tokens_BT), in_parts(positions)",
        new=("in_parts(tokens_BT), jnp.broadcast_to(jnp.arange(in_parts(positions).shape[1]), "
             "in_parts(positions).shape)"),
        tests=STEP + "[context=4]",
    ),
    Mutation(
        name="MTP's targets are shifted inside a part",
        file="deepseek_jax/training/losses.py",
        old="[(in_parts(targets_BT), in_parts(weights_BT)) for",
        new="[(ahead(in_parts(batch.targets_BT), 1), in_parts(weights_BT)) for",
        tests=STEP + "[context=4]",
    ),
    Mutation(
        name="an odd number of parts enters a pipeline",
        file="deepseek_jax/config/mesh.py",
        old="mesh.pipe > 1 and mesh.parts % 2",
        new="False",
        tests="parallel/test_context.py::test_a_pipeline_takes_an_even_number_of_parts",
    ),
    Mutation(
        name="sequences are cut wherever it happens",
        file="deepseek_jax/config/mesh.py",
        old="            (length % blocks,",
        new="            (False,",
        tests="parallel/test_context.py::test_what_cannot_be_split_is_refused_with_what_would",
    ),
    Mutation(
        name="nodes of experts see complete sequences",
        file="deepseek_jax/parallel/mesh.py",
        old='CONTEXT = ("context", "context_node")',
        new='CONTEXT = ("context",)',
        tests=("parallel/test_context.py::"
               "test_parts_go_over_copies_of_the_experts_and_over_nodes_that_share_them"),
    ),
    Mutation(
        name="nodes with parts of sequences are none of the experts'",
        file="deepseek_jax/config/mesh.py",
        old="return self.context_node * self.node\n",
        new="return self.node\n",
        tests="parallel/test_context.py::test_what_cannot_be_split_is_refused_with_what_would",
    ),
    Mutation(
        name="what a recomputation leaves without results is sorted into a pipeline's cells",
        file="deepseek_jax/pipeline/split.py",
        old="if not equation.outvars:",
        new="if False:",
        tests=("pipeline/test_split.py::"
               "test_a_choice_by_platform_that_a_recomputation_does_not_read_is_no_piece"),
    ),
    Mutation(
        name="parts go over copies of the experts first",
        file="deepseek_jax/scale/layout.py",
        old="context_node = math.gcd(split.parts, nodes)",
        new="context_node = 1",
        tests=("scale/test_plan.py::"
               "test_parts_of_sequences_go_over_the_nodes_of_experts_and_then_over_copies_of_them"),
    ),
    Mutation(
        name="a pipeline's hops carry as much as others",
        file="deepseek_jax/scale/traffic.py",
        old="hop = layout.tokens * (2 if layout.mesh.pipe > 1 else 1)",
        new="hop = layout.tokens",
        tests="scale/test_plan.py::test_latents_go_around_and_their_gradients_after_them_and_home",
    ),
    Mutation(
        name="masters of split sequences are those of their rows",
        file="deepseek_jax/scale/memory.py",
        old="(mesh.pipe * mesh.token_shards)",
        new="(mesh.pipe * mesh.data_shards)",
        tests="scale/test_plan.py::test_a_part_of_a_long_sequence_takes_what_a_short_one_does",
    ),
    Mutation(
        name="keys of other parts are free",
        file="deepseek_jax/scale/costs.py",
        old="table[\"attention\"][what] += 2 * (parts - 1) * keys",
        new="pass",
        tests="scale/test_costs.py::test_each_of_the_parts_of_a_sequence_makes_the_keys_of_all",
    ),
    Mutation(
        name="a ring is planned as if it had a kernel",
        file="deepseek_jax/scale/timing.py",
        old="moved += _looped(c, hw, m, layout, what)",
        new="pass",
        tests="scale/test_plan.py::test_without_a_kernel_the_scores_of_long_sequences_are_written",
    ),
    Mutation(
        name="attention around a ring takes no memory",
        file="deepseek_jax/scale/memory.py",
        old="overlapped(c, layout) + around(c, layout)",
        new="overlapped(c, layout)",
        tests="scale/test_plan.py::test_long_sequences_in_parts_are_planned_within_ten_percent_of_what_xla_takes",
    ),
]
