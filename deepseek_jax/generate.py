"""Lets a trained model continue a prompt.

    python -m deepseek_jax.generate --workdir run --prompt "def " --max-new-tokens 64 --temperature 0.8
"""

import argparse
import os

from deepseek_jax import command


def parse():
    parser = argparse.ArgumentParser(prog="python -m deepseek_jax.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a run of deepseek_jax.train")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    return parser.parse_args()


def main():
    args = parse()

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
