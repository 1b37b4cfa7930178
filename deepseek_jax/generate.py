"""Lets a trained model continue a prompt.

    python -m deepseek_jax.generate --workdir run --prompt "def " --max-new-tokens 64 --temperature 0.8
"""

import math
import sys

from deepseek_jax import cli
from deepseek_jax.config import ConfigError


def parse():
    parser = cli.Parser("generate", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="a run of deepseek_jax.train, or what deepseek_jax.convert from-hf made")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face checkpoint: config.json, tokenizer.json, weights")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP module; the text is the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    return parser.parse_args()


def main():
    args = parse()
    if args.prompt.encode(errors="replace").decode() != args.prompt:  # half characters, from a wrong encoding
        raise ConfigError("--prompt is not UTF-8; check the encoding of your terminal.")
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={args.max_new_tokens} must be positive.")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature={args.temperature} must be 0 (the likeliest token) or a positive number.")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed={args.seed} must lie in [0, 2^32).")
    if args.hf and (args.ema or args.step is not None):
        raise ConfigError("a Hugging Face checkpoint holds no moving average and no steps; omit --ema and --step.")

    from deepseek_jax.serving import generate
    from deepseek_jax.workdir import load_model

    cfg, variables, tokenizer = load_model(args.workdir, args.hf, args.ema, args.step)
    prompt = [tokenizer.bos, *tokenizer.encode(args.prompt)]
    made = generate(cfg, variables, [prompt], args.max_new_tokens, speculative=args.speculative,
                    temperature=args.temperature, seed=args.seed, eos_id=tokenizer.eos)
    print(tokenizer.decode([*prompt[1:], *made.tokens[0]]))
    if args.speculative:
        print(f"{made.accepted} of {made.drafted} drafted tokens were accepted.", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
