"""Generates text with a trained model: continues prompts, or answers in a chat.

    python -m deepseek_jax.generate --workdir run --prompt "def " --max-new-tokens 64 --temperature 0.8
    python -m deepseek_jax.generate --hf checkpoint --chat --prompt "Why is the sky blue?"
    python -m deepseek_jax.generate --hf checkpoint --chat --prompt "2 + 2?" --chat-template-kwargs '{"thinking": true}'
    python -m deepseek_jax.generate --workdir run --prompts questions.jsonl --stop $'\\n\\n' > answers.jsonl
"""

import argparse
import json
import math
import sys

from deepseek_jax import cli
from deepseek_jax.config import ConfigError


def parse() -> argparse.Namespace:
    parser = cli.Parser("generate", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="a run of deepseek_jax.train, or what deepseek_jax.convert from-hf made")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face checkpoint: config.json, tokenizer.json, weights")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt")
    prompt.add_argument("--prompts", metavar="FILE", help='a prompt a line; or .jsonl rows with "prompt" or '
                        '"messages". Each continuation is printed as a line of JSON')
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says; only the answer is printed")
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="of chats: names of the checkpoint's template, "
                        "such as enable_thinking; reasoning is printed on stderr, or as reasoning_content of a line")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="samples: the likeliest tokens up to this probability")
    parser.add_argument("--top-k", type=int, default=0, help="samples: this many of the likeliest tokens; 0: all")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the text; may be repeated")
    parser.add_argument("--speculative", action="store_true", help="draft with the MTP module; the text is the same")
    parser.add_argument("--deterministic", action="store_true", help="in bfloat16 too, no text depends on the others")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at a temperature above 0")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest)")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that are invalid for any model, before the model is loaded."""
    if args.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens={args.max_new_tokens} must be positive.")
    if not 0 <= args.temperature < math.inf:
        raise ConfigError(f"--temperature={args.temperature} must be 0 (the likeliest token) or a positive number.")
    if not 0 < args.top_p <= 1:
        raise ConfigError(f"--top-p={args.top_p} must lie in (0, 1].")
    if not 0 <= args.top_k < 2**31:
        raise ConfigError(f"--top-k={args.top_k} must be 0 (all tokens) or positive, and less than 2^31.")
    if args.temperature == 0 and (args.top_p, args.top_k) != (1, 0):
        raise ConfigError("--top-p and --top-k change nothing at --temperature 0; add --temperature 1, or omit them.")
    if "" in args.stop:
        raise ConfigError("--stop is empty; give the text that ends a continuation.")
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"--seed={args.seed} must lie in [0, 2^32).")
    if args.prompt is not None and args.prompt.encode(errors="replace").decode() != args.prompt:  # a wrong encoding
        raise ConfigError("--prompt is not UTF-8; check the encoding of your terminal.")


def main() -> None:
    args = parse()
    check(args)
    from deepseek_jax.chat.template import of_folder
    from deepseek_jax.serving import Request, run_requests
    from deepseek_jax.serving.openai.prompts import Continuation, check_room, prompt_ids, read_options, read_prompts
    from deepseek_jax.workdir import load, most_positions

    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    if args.chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    options, folder = read_options(args.chat_template_kwargs, prompts), args.hf or args.workdir
    cfg, variables, tokenizer = load(folder, args.ema, args.step, hf=args.hf is not None, on_host=True)
    text = of_folder(folder, tokenizer, any(isinstance(prompt, list) for prompt in prompts))
    ids = [prompt_ids(prompt, tokenizer, text, options) for prompt in prompts]
    check_room(ids, args.max_new_tokens, most_positions(folder))
    requests = [Request(tuple(prompt), args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                        stream=i, stop_tokens=text.ends) for i, prompt in enumerate(ids)]
    said = [Continuation(tokenizer, tuple(args.stop), row if isinstance(prompt, list) else None)
            for prompt, row in zip(prompts, ids)]
    made = run_requests(cfg, variables, requests, args.speculative, said, args.deterministic)
    if args.prompts is None:
        print(said[0].reasoning, file=sys.stderr, end="\n" if said[0].reasoning else "")
        print(said[0].text if args.chat else args.prompt + said[0].text)
    else:
        for prompt, answer in zip(prompts, said):
            print(json.dumps(answer.row(prompt), ensure_ascii=False))
    print(made.speed(), file=sys.stderr)
    if args.speculative:
        accepted, drafted = (sum(getattr(s, name) for s in made.sequences) for name in ("accepted", "drafted"))
        print(f"{accepted} of {drafted} drafted tokens were accepted.", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
