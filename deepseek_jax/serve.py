"""Serves a trained model over HTTP, to clients of the OpenAI API and to a browser.

    python -m deepseek_jax.serve --workdir run --port 8000
"""

from __future__ import annotations

import argparse
import os
import socket

from deepseek_jax import cli
from deepseek_jax.config import ConfigError


def parse() -> argparse.Namespace:
    parser = cli.Parser("serve", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workdir", help="a run of deepseek_jax.train, or what deepseek_jax.convert from-hf made")
    model.add_argument("--hf", metavar="DIR", help="a Hugging Face checkpoint: config.json, tokenizer.json, weights")
    parser.add_argument("--ema", action="store_true", help="use the moving average of the weights")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; then set a key")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api-key", default=os.environ.get("DEEPSEEK_JAX_API_KEY"),
                        help="what clients must send; by default DEEPSEEK_JAX_API_KEY, or none")
    parser.add_argument("--name", help="of the model; by default that of its folder")
    parser.add_argument("--depth", type=int, help="tokens that MTP drafts in each step (default: 1 where there is a "
                        "module; 0: plain decoding)")
    parser.add_argument("--max-sequences", type=int, default=16, help="that run at once")
    parser.add_argument("--max-waiting", type=int, default=64, help="that wait in addition; more are refused with 429")
    parser.add_argument("--max-length", type=int, default=2048, help="tokens of prompt and answer")
    parser.add_argument("--allow-origin", action="append", default=[], metavar="URL",
                        help="a page elsewhere that may ask, such as https://chat.example; * for all; may be repeated")
    parser.add_argument("--grace", type=int, default=30, help="seconds that running requests have after SIGTERM")
    parser.add_argument("--expert-metrics", action="store_true", help="the load of each expert, at /metrics")
    parser.add_argument("--deterministic", action="store_true",
                        help="in bfloat16 too, no answer depends on what else runs")
    parser.add_argument("--cache", choices=("float32", "bfloat16", "fp8"), help="how latents are kept")
    return parser.parse_args()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded, which takes minutes. Raises ConfigError if that is
    impossible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        why = str(error.strerror).partition(" (")[0]  # Python's message includes the address
        raise ConfigError(f"cannot listen at {host}:{port} ({why}); take another --port or --host.") from None


def check(args: argparse.Namespace) -> None:
    """Raises ConfigError for an invalid option."""
    for name in ("max_sequences", "max_length"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} must be positive.")
    for name in ("max_waiting", "depth", "grace"):
        if (getattr(args, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(args, name)} cannot be negative.")
    if not 0 <= args.port < 2**16:
        raise ConfigError(f"--port={args.port} must lie in [0, 65535].")
    if args.api_key == "":
        raise ConfigError("the API key is empty; unset DEEPSEEK_JAX_API_KEY, or say what clients must send.")


def main() -> None:
    args = parse()
    check(args)
    listening = listen(args.host, args.port)
    try:
        from deepseek_jax.serving.openai.server import Options, serve
    except ModuleNotFoundError as error:
        raise ConfigError(f"serving needs {error.name}; pip install 'deepseek-jax[serve]'.") from None
    from deepseek_jax.chat.template import of_folder
    from deepseek_jax.serving.engine import Engine, EngineConfig
    from deepseek_jax.serving.openai.stream import Service
    from deepseek_jax.workdir import load

    folder = args.hf or args.workdir
    name = args.name or os.path.basename(os.path.abspath(folder))

    def service(report):
        cfg, variables, tokenizer = load(folder, args.ema, hf=args.hf is not None, on_host=True)
        text = of_folder(folder, tokenizer)
        depth = min(1, cfg.mtp_depth) if args.depth is None else args.depth
        engine = Engine(cfg, variables, EngineConfig(args.max_sequences, args.max_length, depth, cache=args.cache,
                                                     deterministic=args.deterministic))
        print("compiling ...", flush=True)
        engine.warm_up(lambda done, of: report(f"compiled {done} of {of} programs"))
        print(f"serving {name} at http://{args.host}:{listening.getsockname()[1]}", flush=True)
        return Service(engine, tokenizer, name, args.max_waiting, text)

    serve(service, name, listening, Options(args.api_key, tuple(args.allow_origin), args.grace, args.expert_metrics))


if __name__ == "__main__":
    cli.run(main)
