"""All commands under one name: `deepseek-jax train ...` is `python -m deepseek_jax.train ...`."""

import runpy
import sys

from deepseek_jax import __version__

COMMANDS = {
    "train": "trains a model, or resumes a run",
    "prepare": "tokenizes a corpus ahead of a run, on many machines",
    "reinforce": "trains a run further, by rewards that rules decide",
    "posttraining": "writes problems with answers, for reinforce and what comes before it",
    "check": "reads complete checkpoints, and names what is damaged",
    "evaluate": "scores a run: loss, bits per byte, balance",
    "compare": "puts runs side by side: configs, losses, a picture",
    "generate": "continues prompts, answers in a chat",
    "serve": "answers the OpenAI API, with a page to chat on",
    "convert": "Hugging Face's checkpoints, in and out",
    "plan": "what a model takes on a machine: memory, time, dollars",
    "compile": "compiles a step for hardware you don't have",
    "pipeline": "draws and proves a pipeline schedule",
}
USAGE = "\n".join(["usage: deepseek-jax COMMAND [options]      deepseek-jax COMMAND --help", "",
                   *(f"  {name:12} {what}" for name, what in COMMANDS.items())])


def main() -> None:
    """Runs the command that the first argument names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(USAGE)
    elif name == "--version":
        print(f"deepseek-jax {__version__}")
    elif name not in COMMANDS:
        print(f"error: there is no command {name}; take one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    else:
        del sys.argv[1]
        runpy.run_module(f"deepseek_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
