"""transformers' generate on an exported checkpoint: the peer of `decode.py`. Prints one JSON object a line and repeat.

The defaults are the fastest of the settings below on a CPU, so that the peer is shown at its best.
"""

import argparse
import json
import time

import torch
import transformers
from decode import NEW, prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batches", type=int, nargs=1, default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    parser.add_argument("--experts", choices=("grouped_mm", "eager", "batched_mm"),
                        help="default: eager below batch 4, else grouped_mm, the fastest of the three")
    parser.add_argument("--cache", default="dynamic", choices=("dynamic", "static"))
    args = parser.parse_args()
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(
        args.folder, dtype=torch.float32, attn_implementation=args.attention,
        experts_implementation=args.experts or ("eager" if args.batches[0] < 4 else "grouped_mm")).eval()
    tokens_BT = torch.tensor(prompts(args.batches[0]))
    how = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, use_cache=True, eos_token_id=None,
               pad_token_id=0, attention_mask=torch.ones_like(tokens_BT))
    if args.cache == "static":
        how["cache_implementation"] = "static"
    with torch.inference_mode():
        model.generate(tokens_BT, **how)
        for _ in range(args.repeats):
            start = time.perf_counter()
            made = model.generate(tokens_BT, **how)
            seconds = time.perf_counter() - start
            print(json.dumps({"tokens_per_second": tokens_BT.shape[0] * NEW / seconds,
                              "tokens": made[:, tokens_BT.shape[1]:].tolist(),
                              "settings": {"attention": args.attention, "cache": args.cache,
                                           "experts": model.config._experts_implementation,
                                           "torch": torch.__version__, "transformers": transformers.__version__}}),
                  flush=True)


if __name__ == "__main__":
    main()
