"""Lets a trained model continue a prompt.

    python -m deepseek_jax.generate --workdir run --prompt "def " --max-new-tokens 64 --temperature 0.8
"""

import math
import os

from deepseek_jax import command
from deepseek_jax.config import ConfigError


def parse():
    parser = command.Parser("generate", __doc__)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    return parser.parse_args()


def main():
    args = parse()
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={args.max_new_tokens} must be positive.")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature={args.temperature} must be 0 (the likeliest token) or a positive number.")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed={args.seed} must lie in [0, 2^32).")

    from deepseek_jax.data.tokenizer import Tokenizer
    from deepseek_jax.serving import generate
    from deepseek_jax.training.report import load_trained

    config, variables, _ = load_trained(args.workdir, args.ema)
    tokenizer = Tokenizer.load(os.path.join(args.workdir, "tokenizer.json"), config.model.vocab_size)
    prompt = [tokenizer.bos, *tokenizer.encode(args.prompt)]
    made = generate(config.model, variables, [prompt], args.max_new_tokens, temperature=args.temperature,
                    seed=args.seed, eos_id=tokenizer.eos)
    print(tokenizer.decode([*prompt[1:], *made.tokens[0]]))


if __name__ == "__main__":
    command.run(main)
