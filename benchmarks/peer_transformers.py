"""Training throughput of transformers' DeepseekV3ForCausalLM on the CPU: the peer of `train_step.py`.

The shape is the preset `small` without multi-token prediction; a step is forward, backward, clipping and AdamW over
8 x 512 random tokens. The defaults are the fastest of the settings below, to be fair to the peer; each of them is a
flag on the command line. Prints one line of JSON per repeat.

    python -m benchmarks.peer_transformers --repeats 5 --steps-per-repeat 3 --warmup 2
"""

import argparse
import contextlib
import json
import platform
import time
from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports] (in .venv-peer)
import transformers  # pyright: ignore[reportMissingImports] (in .venv-peer)


def peer_config(attention: str, experts: str) -> transformers.DeepseekV3Config:
    """The preset `small` of this project as a config of transformers."""
    return transformers.DeepseekV3Config(
        vocab_size=8192, hidden_size=256, num_hidden_layers=6, first_k_dense_replace=1, intermediate_size=704,
        num_attention_heads=4, num_key_value_heads=4, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
        q_lora_rank=96, kv_lora_rank=64, n_routed_experts=32, moe_intermediate_size=128, num_experts_per_tok=4,
        n_shared_experts=1, n_group=4, topk_group=2, num_mtp_layers=0, max_position_embeddings=4096, use_cache=False,
        attn_implementation=attention, experts_implementation=experts,
    )


def make_optimizer(model: torch.nn.Module, kind: str) -> torch.optim.Optimizer:
    how = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}[kind]
    return torch.optim.AdamW(model.parameters(), lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, **how)


def make_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, dtype: str) -> Callable:
    """One training step as a closure over the model; returns the loss before the update."""
    cast = torch.autocast("cpu", torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()

    def step(tokens_BT):
        optimizer.zero_grad(set_to_none=True)
        with cast:
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="lines to print")
    parser.add_argument("--steps-per-repeat", type=int, default=3, help="steps timed together")
    parser.add_argument("--warmup", type=int, default=2, help="untimed steps at the start")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="bfloat16: autocast")
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--experts", default="grouped_mm", choices=("grouped_mm", "eager", "batched_mm"))
    parser.add_argument("--optimizer", default="fused", choices=("fused", "foreach", "loop"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, help="torch threads; by default torch's own choice")
    args = parser.parse_args()

    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = transformers.DeepseekV3ForCausalLM(peer_config(args.attention, args.experts)).float().train()
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = make_optimizer(model, args.optimizer)
    step = make_step(torch.compile(model) if args.compile else model, optimizer, args.dtype)
    draw = torch.Generator().manual_seed(1)
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    settings = {k: getattr(args, k) for k in ("attention", "experts", "optimizer", "compile")}

    def batch():
        return torch.randint(0, 8192, (args.batch, args.length), generator=draw)

    for _ in range(args.warmup):
        step(batch())
    for repeat in range(args.repeats):
        batches = [batch() for _ in range(args.steps_per_repeat)]
        start = time.perf_counter()
        for tokens_BT in batches:
            loss = step(tokens_BT)
        seconds = time.perf_counter() - start
        row = {"side": "transformers", "repeat": repeat, "seconds": round(seconds, 4), "loss": round(loss, 5),
               "tokens_per_second": round(args.batch * args.length * args.steps_per_repeat / seconds, 1),
               "dtype": args.dtype, "threads": torch.get_num_threads(), "parameters": parameters,
               "settings": settings, "versions": versions}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
