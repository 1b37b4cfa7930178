"""Other names of our keys: those in Hugging Face's config.json with the same meaning, and common short names."""

HUGGING_FACE = {
    "vocab_size": "vocab_size", "hidden_size": "d_model", "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers", "num_attention_heads": "num_heads", "q_lora_rank": "q_rank",
    "kv_lora_rank": "kv_rank", "qk_nope_head_dim": "nope_head_dim", "qk_rope_head_dim": "rope_head_dim",
    "v_head_dim": "v_head_dim", "intermediate_size": "dense_ffn_dim", "moe_intermediate_size": "expert_ffn_dim",
    "n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "experts_per_token", "n_group": "num_groups", "topk_group": "groups_kept",
    "routed_scaling_factor": "route_scale", "norm_topk_prob": "normalize_gates", "rms_norm_eps": "norm_eps",
    "initializer_range": "init_std",
}
INDEXER = {"index_topk": "index_topk", "index_n_heads": "index_heads", "index_head_dim": "index_head_dim"}  # of V3.2
OTHERS = HUGGING_FACE | INDEXER | {
    "top_k": "experts_per_token", "n_experts": "num_experts", "num_shared": "num_shared_experts",
    "n_layers": "num_layers", "n_heads": "num_heads", "hidden_dim": "d_model", "dim": "d_model",
    "lr": "learning_rate", "grad_clip": "clip_norm", "max_grad_norm": "clip_norm", "wd": "weight_decay",
    "seq_len": "sequence_length", "context_length": "sequence_length", "max_steps": "steps", "num_steps": "steps",
    "gradient_accumulation_steps": "accumulation_steps", "grad_accum": "accumulation_steps",
    "global_batch_size": "batch_size",
}
