"""Mutations of serving: rows for tests/mutations.py (name, file, text, its replacement, tests that must go red)."""

NETWORK, CACHE, PAGES, SAMPLING, SPECULATIVE, DECODE, ENGINE, PLACEMENT, TEXT = (
    f"deepseek_jax/serving/{name}.py" for name in
    ("network", "cache", "pages", "sampling", "speculative", "decode", "engine", "placement", "text"))
T_NETWORK, T_CACHE, T_PAGES, T_SAMPLING, T_SPECULATIVE, T_GENERATION, T_ENGINE, T_PLACEMENT = (
    f"serving/test_{name}.py" for name in
    ("network", "cache", "pages", "sampling", "speculative", "generation", "engine", "placement"))

API, CHAT = (f"deepseek_jax/serving/{name}.py" for name in ("api", "chat_template"))
T_CHAT = "serving/test_chat_template.py"
ROW = "kernels_pallas/reference/mla_decode.py"  # of an FP8 cache

MUTATIONS = [
    ("cached keys are seen before their time", NETWORK, "<= rows.position_BT[:, :, None, None]",
     "<= rows.position_BT[:, :, None, None] + 1", T_NETWORK),
    ("attention reads one page too few", NETWORK, 'needed, side="right")', 'needed, side="left")', T_NETWORK),
    ("W_UK and W_UV are exchanged", NETWORK, 'kv_b[..., :cfg.nope_head_dim].transpose(1, 2, 0)',
     'kv_b[..., -cfg.nope_head_dim:].transpose(1, 2, 0)', T_NETWORK),
    ("padding counts as load", NETWORK, "chosen_NK = jnp.where(valid_BT.reshape(-1, 1), chosen_NK, cfg.num_experts)",
     "pass", T_NETWORK),
    ("the kernel does not see the newest token", NETWORK, "rows.position_BT, 0)[:, 0] + 1",
     "rows.position_BT, 0)[:, 0]", T_NETWORK),
    ("devices do not add up what their experts say", NETWORK, "if devices > 1:  # all", "if False:  # all",
     T_PLACEMENT),
    ("each device takes the first experts for its own", NETWORK, "place_NK - lax.axis_index(AXES[\"experts\"]) * here",
     "place_NK", T_PLACEMENT),
    ("few tokens by all experts are gated by the first choice alone", NETWORK,
     "* gates_NK[None]).sum(axis=2)[..., None]",
     "* gates_NK[None])[:, :, :1]", T_NETWORK),
    ("a module's layer is the main model's", NETWORK, "cfg.num_layers + k - 1", "k - 1", T_SPECULATIVE),
    ("all replicas but the first hold nothing", PLACEMENT, "np.flatnonzero(self.expert_LP[layer] == e)",
     "np.flatnonzero(self.expert_LP[layer] == e) % 7", T_PLACEMENT),
    ("packs may overflow", PLACEMENT, "if held[p] < N // packs", "if True", T_PLACEMENT),
    ("replicas of the largest load, not load per replica", PLACEMENT, "np.argmax(weight_N / count_N)",
     "np.argmax(weight_N)", T_PLACEMENT),
    ("invalid rows are written to the sequence's page", CACHE, "jnp.where(valid_BT, page_BT, 0)", "page_BT", T_CACHE),
    ("FP8 scales of one tile for all", ROW, "view(scales, jnp.float32, 4))",
     "0 * view(scales, jnp.float32, 4) + view(scales[..., :4], jnp.float32, 4))", T_CACHE),
    ("rotary numbers in FP8", ROW, "k_pe.astype(jnp.bfloat16))", "k_pe.astype(E4M3).astype(jnp.bfloat16))", T_CACHE),
    ("a prefix does not depend on what stands before it", PAGES, "hashlib.blake2b(parent + page,",
     "hashlib.blake2b(page,", T_PAGES),
    ("a released page is lost", PAGES, "                self._free.append(page)\n\n    def register",
     "                pass\n\n    def register", T_PAGES),
    ("top p leaves out the token that reaches it", SAMPLING, "before_BTW < sampling.top_p_B[:, None, None]",
     "before_BTW + p_BTW < sampling.top_p_B[:, None, None]", T_SAMPLING),
    ("top k is one too many", SAMPLING, "(k_B - 1)[:, None, None]", "jnp.minimum(k_B, W - 1)[:, None, None]",
     T_SAMPLING),
    ("all tokens draw the same number", SAMPLING, "jax.random.fold_in(jax.random.fold_in(jax.random.fold_in("
     "jax.random.key(seed), stream), index), use)", "jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), "
     "stream), use)", T_SAMPLING),
    ("every draft is accepted", SPECULATIVE, "leading(u_Bd * of_draft(drafts.q_BdW) < of_draft(p_BTW[:, :-1]))",
     "leading(u_Bd >= 0)", T_SPECULATIVE),
    ("after a rejection the draw is from p", SPECULATIVE, "rest_BW = jnp.maximum(p_BW - _row(q_BTW, accepted_B), 0)",
     "rest_BW = p_BW", T_SPECULATIVE),
    ("acceptance and draft share a random number", SPECULATIVE, "index_BT[:, :-1], choosing.ACCEPT",
     "index_BT[:, :-1], choosing.DRAFT", T_SPECULATIVE),
    ("drafts behind a wrong one are kept", SPECULATIVE, "jnp.cumprod((held_Bd & drafted_Bd).astype(jnp.int32), axis=1)",
     "(held_Bd & drafted_Bd).astype(jnp.int32)", T_SPECULATIVE),
    ("the module sees its position's own token", SPECULATIVE, "ahead, h, start_B, last_B = tokens_BT, hidden_BTD,",
     "ahead, h, start_B, last_B = jnp.roll(tokens_BT, 1, axis=1), hidden_BTD,", T_SPECULATIVE),
    ("drafts run over the end", DECODE, "jnp.minimum(drafts.count_B, room_B - 1)", "drafts.count_B", T_SPECULATIVE),
    ("another sequence's drafts are verified", DECODE, "jnp.where(batch.fresh_B, 0, mine.count_B)",
     "mine.count_B", T_SPECULATIVE),
    ("the end token does not end", ENGINE, "if token in request.stop_tokens:", "if False:", T_GENERATION),
    ("an ended sequence keeps its promise", ENGINE, "self.pool.break_promise(sequence.promised)",
     "self.pool.break_promise(0)", T_ENGINE),
    ("cancelled sequences run on", ENGINE, "if s.cancelled]", "if False]", T_ENGINE),
    ("logprobs are of the tempered distribution", DECODE, "jax.nn.log_softmax(logits_BTW.astype(jnp.float32), axis=-1)",
     "jax.nn.log_softmax(logits_BTW.astype(jnp.float32) / 2, axis=-1)", T_ENGINE),
    ("a stop string is given out", TEXT, "return text[:min(found)]", "return text", T_ENGINE),
    ("chats ignore the model's template", API, "if template is not None:", "if False:",
     T_CHAT),
    ("a template may reach into Python", CHAT, "jinja2.sandbox.ImmutableSandboxedEnvironment(",
     "jinja2.Environment(", T_CHAT),
    ("a template is not told to open the answer", CHAT, "add_generation_prompt=True",
     "add_generation_prompt=False", T_CHAT),
    ("the first of several templates is taken", CHAT, '.get("default")', '.get("tools")',
     T_CHAT),
    ("a kernel is asked for any pages", "deepseek_jax/serving/network.py", "T == 1 and rows and pages and",
     "T == 1 and rows and", "serving/test_network.py"),
    ("the warm-up leaves a batch size out", "deepseek_jax/serving/engine.py",
     "for size in _buckets(self.max_sequences):", "for size in _buckets(self.max_sequences)[1:]:",
     "serving/test_engine.py serving/test_placement.py"),
]
