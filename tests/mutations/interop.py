"""Mutations of interop: each breaks one operation, and the tests named must go red."""

from tests.mutations.row import Mutation

MUTATIONS = [
    Mutation(
        name="four bits are read from the high half of a byte",
        file="deepseek_jax/interop/int4.py",
        old="np.stack([nibbles & 15, nibbles >> 4], axis=-1)",
        new="np.stack([nibbles >> 4, nibbles & 15], axis=-1)",
        tests="interop/test_family.py::test_four_bit_experts_are_value_times_scale_in_bfloat16",
    ),
    Mutation(
        name="rope_parameters counts before rope_scaling",
        file="deepseek_jax/interop/hf_config.py",
        old='rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}',
        new='rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}',
        tests="interop/test_hf_config.py::test_of_two_dialects_of_rope_the_released_one_counts_and_goes_out_alone",
    ),
    Mutation(
        name="other quantizations are read as FP8",
        file="deepseek_jax/interop/hf_config.py",
        old='    if method == "fp8":',
        new='    if method not in ("compressed-tensors",):',
        tests="interop/test_hf_config.py::test_what_is_not_supported_is_named_in_one_line",
    ),
    Mutation(
        name="of two checkpoints the index is read silently",
        file="deepseek_jax/interop/safetensors_io.py",
        old="        if not self.chosen and SINGLE not in",
        new="        if False and SINGLE not in",
        tests="interop/test_family.py::test_a_folder_with_two_checkpoints_asks_which",
    ),
    Mutation(
        name="an unwanted MTP module stays",
        file="deepseek_jax/interop/selection.py",
        old="int(layer[1]) >= self.without_from",
        new="int(layer[1]) > self.without_from",
        tests="interop/test_family.py::test_a_stale_copy_names_the_way_out_which_leaves_the_module_out",
    ),
    Mutation(
        name="rounded float16 goes out as float16",
        file="deepseek_jax/interop/save.py",
        old="np.can_cast(before, held):",
        new="before.itemsize <= held.itemsize:",
        tests="interop/test_family.py::test_float16_comes_in_as_bfloat16_with_a_line_or_exactly_as_float32",
    ),
    Mutation(
        name="scales of V3.1 go out as any number",
        file="deepseek_jax/interop/save.py",
        old="    if power_of_two:",
        new="    if False:",
        tests="interop/test_family.py::test_an_fp8_export_of_a_power_of_two_checkpoint_has_powers_of_two_again",
    ),
    Mutation(
        name="names that transformers does not know go out",
        file="deepseek_jax/interop/hf_config.py",
        old='if not ALIASES.get(raw["model_type"], True):',
        new="if False:",
        tests="interop/test_hf_config.py::test_a_name_that_transformers_does_not_know_goes_out_as_deepseek_v3",
    ),
    Mutation(
        name="the text part of a vision model goes out without an architecture",
        file="deepseek_jax/interop/hf_config.py",
        old='if raw["model_type"] in FAMILIES and not raw.get("architectures"):',
        new="if False:",
        tests="interop/test_hf_config.py::test_an_export_names_its_architecture_and_has_floats_where_transformers_takes"
              "_nothing_else",
    ),
    Mutation(
        name="a whole scaling factor goes out as an int",
        file="deepseek_jax/interop/hf_config.py",
        old="for name in FLOATS if type(raw.get(name)) is int}",
        new="for name in FLOATS if False}",
        tests="interop/test_hf_config.py::test_an_export_names_its_architecture_and_has_floats_where_transformers_takes"
              "_nothing_else",
    ),
    Mutation(
        name="positions of a model with vision are not found",
        file="deepseek_jax/workdir.py",
        old="(within if isinstance(within, dict) else source)",
        new="source",
        tests="test_workdir.py::test_a_model_has_as_many_positions_as_its_checkpoint_or_its_yarn_says",
    ),
    Mutation(
        name="the reference's experts are not forced on the model",
        file="deepseek_jax/interop/agreement.py",
        old='capture=("chosen",), chosen=chosen_LBTK)',
        new='capture=("chosen",))',
        tests="interop/test_agreement.py::test_pinning_the_routes_takes_flipped_experts_out_of_the_divergence",
    ),
    Mutation(
        name="the divergence is weighted by the wrong side",
        file="deepseek_jax/interop/agreement.py",
        old="(np.exp(theirs) * (theirs - ours))",
        new="(np.exp(ours) * (theirs - ours))",
        tests="interop/test_agreement.py::test_the_divergence_is_that_of_the_definition",
    ),
    Mutation(
        name="a pair of tiktoken is merged in any order",
        file="deepseek_jax/interop/ranks.py",
        old="    for token in ranks:\n        pairs",
        new="    for token in reversed(ranks):\n        pairs",
        tests="interop/test_ranks.py::test_ids_are_those_of_tiktoken_and_text_comes_back",
    ),
    Mutation(
        name="an added token may have another id",
        file="deepseek_jax/interop/ranks.py",
        old='        if made.token_to_id(token["content"]) != i:',
        new="        if False:",
        tests="interop/test_ranks.py::test_added_tokens_that_fit_no_model_are_one_line",
    ),
    Mutation(
        name="a fine-tuned run ends at one token alone",
        file="deepseek_jax/interop/convert.py",
        old='(stated, origin) if isinstance',
        new='(stated,) if isinstance',
        tests="interop/test_conversion.py::test_all_tokens_that_end_a_text_go_out_with_a_fine_tuned_run",
    ),
    Mutation(
        name="eh_proj comes in with its halves exchanged",
        file="deepseek_jax/interop/load.py",
        old="theirs = self.rows(entry, start * unit, stop * unit, dtype)",
        new=(
            "theirs = self.rows(entry, start * unit, stop * unit, dtype)\n"
            "        theirs = np.roll(theirs, theirs.shape[1] // 2, axis=1) if 'eh_proj' in entry.name "
            "else theirs"),
        tests="interop/test_parity.py",
    ),
    Mutation(
        name="enorm and hnorm are exchanged",
        file="deepseek_jax/interop/tensor_map.py",
        old=(
            '"{mtp}/embedding_norm/scale", SAME, False),\n'
            '    (LAYER + "hnorm.weight", "{mtp}/hidden_norm/scale"'),
        new=(
            '"{mtp}/hidden_norm/scale", SAME, False),\n'
            '    (LAYER + "hnorm.weight", "{mtp}/embedding_norm/scale"'),
        tests="interop/test_parity.py",
    ),
    Mutation(
        name="routing is rounded to the dtype of the model",
        file="deepseek_jax/interop/load.py",
        old='if path.startswith("router/") or path.endswith("router/weight"):',
        new="if False:",
        tests="interop/test_conversion.py",
    ),
    Mutation(
        name="half-split rotary rows come in as they are",
        file="deepseek_jax/interop/tensor_map.py",
        old="np.arange(halves).reshape(2, -1).T.reshape(-1)",
        new="np.arange(halves)",
        tests="interop/test_tensor_map.py",
    ),
    Mutation(
        name="empty blocks have tiny scales",
        file="deepseek_jax/interop/save.py",
        old="np.float32(1e-4))",
        new="np.float32(1e-30))",
        tests="interop/test_tensor_map.py",
    ),
    Mutation(
        name="copies of the head may differ",
        file="deepseek_jax/interop/load.py",
        old="if not np.array_equal(here, there):",
        new="if False:",
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="unknown tensors are ignored",
        file="deepseek_jax/interop/load.py",
        old='("unknown tensors", unknown)',
        new='("unknown tensors", set())',
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="missing tensors are ignored",
        file="deepseek_jax/interop/load.py",
        old='("missing", expected - self.tensors.keys())',
        new='("missing", set())',
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="any far layer is an MTP module",
        file="deepseek_jax/interop/load.py",
        old="        return depth - first\n",
        new=(
            "        last = max(int(n.split('.')[2]) for n in self.tensors if "
            "n.startswith('model.layers.'))\n"
            "        return max(last + 1 - first, 0)\n"),
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="a model goes out cut off",
        file="deepseek_jax/interop/save.py",
        old="        _check_leaves(tensor_map.leaves(cfg), leaves)\n",
        new="",
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="an index may name any file",
        file="deepseek_jax/interop/safetensors_io.py",
        old="or os.path.basename(file) != file or",
        new="or",
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="tensors of a file may overlap",
        file="deepseek_jax/interop/safetensors_io.py",
        old="if tensor.offset != end:",
        new="if False:",
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="numbers may be words",
        file="deepseek_jax/interop/hf_config.py",
        old="if value is not None and (type(value) not in (int, float)",
        new="if value is not None and (False",
        tests="interop/test_hf_config.py",
    ),
    Mutation(
        name="a failed conversion leaves its half",
        file="deepseek_jax/io.py",
        old=(
            "    finally:\n"
            "        shutil.rmtree(partial, ignore_errors=True)"),
        new=(
            "    finally:\n"
            "        pass"),
        tests="interop/test_bad_input.py",
    ),
    Mutation(
        name="greedy routing looks at groups",
        file="deepseek_jax/interop/hf_config.py",
        old='raw.get("topk_method") in ("greedy", None):',
        new='raw.get("topk_method") in ():',
        tests="interop/test_hf_config.py",
    ),
    Mutation(
        name="widened tensors go out wide",
        file="deepseek_jax/interop/save.py",
        old="                held = before\n",
        new="                pass\n",
        tests="interop/test_conversion.py",
    ),
    Mutation(
        name="routing biases go out narrow",
        file="deepseek_jax/interop/save.py",
        old='held = np.dtype(np.float32) if entry.path.startswith("router/") else self.dtype',
        new='held = self.dtype',
        tests="interop/test_conversion.py::test_a_run_of_ours_goes_out_in_bfloat16_where_that_is_asked_for",
    ),
    Mutation(
        name="config.json keeps the old type",
        file="deepseek_jax/interop/save.py",
        old="        if source.dtype is not None or narrowed:\n            raw |=",
        new="        if False:\n            raw |=",
        tests="interop/test_conversion.py::test_a_converted_checkpoint_goes_out_in_the_type_that_is_asked_for",
    ),
    Mutation(
        name="kept FP8 goes out as it is",
        file="deepseek_jax/interop/save.py",
        old=" and (self.dtype is None or self.fp8)",
        new="",
        tests="interop/test_conversion.py::test_kept_fp8_is_dequantized_where_another_type_is_asked_for",
    ),
    Mutation(
        name="a fine-tuned run forgets its origin",
        file="deepseek_jax/interop/convert.py",
        old='.init.from_ or ""',
        new='.init.from_ and ""',
        tests="interop/test_conversion.py::test_a_fine_tuned_run_goes_out_in_the_type_of_the_checkpoint_that_it_began_from",
    ),
    Mutation(
        name="a header may be longer than its file",
        file="deepseek_jax/interop/safetensors_io.py",
        old="if not 0 < length <= min(size - 8, io.MOST_JSON):",
        new="if not 0 < length:",
        tests="interop/test_hostile.py::test_a_header_longer_than_its_file_is_not_read",
    ),
    Mutation(
        name="an empty tensor may have any other size",
        file="deepseek_jax/interop/safetensors_io.py",
        old="        if 0 in shape:",
        new="        if False:",
        tests="interop/test_hostile.py",
    ),
    Mutation(
        name="a stack may have any number of experts",
        file="deepseek_jax/interop/safetensors_io.py",
        old="    if experts > MOST_EXPERTS:",
        new="    if False:",
        tests="interop/test_hostile.py::test_a_stack_of_more_experts_than_there_may_be_is_not_taken_apart",
    ),
    Mutation(
        name="a model may have any number of experts in all",
        file="deepseek_jax/config/model.py",
        old="    if matrices > MOST_MATRICES:",
        new="    if False:",
        tests="config/test_config.py::test_an_impossible_model_says_what_would_work",
    ),
    Mutation(
        name="a tokenizer may name any id",
        file="deepseek_jax/data/tokenizer.py",
        old="        if self.vocab_size > _MOST_IDS:",
        new="        if self.vocab_size > 2**32:",
        tests="interop/test_hostile.py::test_an_id_that_no_model_has_is_refused_before_tables_of_ids_are_made",
    ),
    Mutation(
        name="a named pipe is waited for",
        file="deepseek_jax/io.py",
        old="    if not stat.S_ISREG(mode):",
        new="    if False:",
        tests="data/test_files.py",
    ),
    Mutation(
        name="a key that is there twice counts once",
        file="deepseek_jax/io.py",
        old="        if name in found:",
        new="        if False:",
        tests="test_io.py::test_json_that_no_reader_should_trust_is_refused",
    ),
    Mutation(
        name="a converted checkpoint forgets its positions",
        file="deepseek_jax/workdir.py",
        old='.get("config", own)',
        new='.get("nothing", own)',
        tests="test_workdir.py",
    ),
    Mutation(
        name="a V3.2 without index_topk is read as dense",
        file="deepseek_jax/interop/hf_config.py",
        old="(name in INDEXER or name not in null | ONLY.keys())",
        new="name not in null | ONLY.keys()",
        tests="interop/test_hf_config.py",
    ),
    Mutation(
        name="a sparse model goes out as V3",
        file="deepseek_jax/interop/hf_config.py",
        old='"deepseek_v32" if sparse else "deepseek_v3"',
        new='"deepseek_v3"',
        tests="interop/test_hf_config.py",
    ),
]
