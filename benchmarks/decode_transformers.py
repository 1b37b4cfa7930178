"""transformers' generate on an exported checkpoint: the peer of `decode.py`, which asks it for rows over stdin.

The defaults are the fastest of the settings below on a CPU, to be fair to the peer; float32 was faster than bfloat16
with each of them.
"""

import argparse
from typing import Any

import torch  # pyright: ignore[reportMissingImports] (in .venv-peer)
import transformers  # pyright: ignore[reportMissingImports] (in .venv-peer)

from benchmarks.decode import NEW, answer, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--attention", default="eager", choices=("sdpa", "eager"))
    parser.add_argument("--experts", choices=("grouped_mm", "eager", "batched_mm"),
                        help="default: eager below batch 4, else grouped_mm, the fastest of the three")
    parser.add_argument("--cache", default="dynamic", choices=("dynamic", "static"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        args.folder, dtype=getattr(torch, args.dtype), attn_implementation=args.attention).eval()

    def generate(batch):
        model.set_experts_implementation(args.experts or ("eager" if batch < 4 else "grouped_mm"))
        tokens_BT = torch.tensor(prompts(batch))
        how: dict[str, Any] = dict(
            max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones_like(tokens_BT))
        if args.cache == "static":
            how["cache_implementation"] = "static"
        with torch.inference_mode():
            return model.generate(tokens_BT, **how)[:, tokens_BT.shape[1]:].tolist()

    answer(generate)


if __name__ == "__main__":
    main()
