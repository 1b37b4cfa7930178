"""What the command modules share: mistakes end in one line and exit code 2, and a CPU process allocates well."""

import argparse
import ctypes
import json
import logging
import os
import sys

from deepseek_jax.config import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose --help is the module's docstring, and whose complaints are a ConfigError like all others."""

    def __init__(self, name: str, doc: str):
        super().__init__(prog=f"python -m deepseek_jax.{name}", description=doc, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise ConfigError(f"{message}; see {self.prog} --help.")


def run(main):
    """Calls main(); a mistake of the user's becomes one line on stderr and exit code 2, an interrupt 130.

    So does what the machine refuses: a full disk, a directory without permission.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.WARNING)
    reuse_memory()
    tune_xla()
    try:
        code = main() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except OSError as error:
        what = error.strerror or str(error) or type(error).__name__
        print(f"error: {error.filename}: {what}" if error.filename else f"error: {what}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def write_json(path: str, result):
    """Writes what --json asks for: whole or not at all."""
    beside = path + ".new"
    with open(beside, "w") as f:
        json.dump(result, f, indent=2)
    os.replace(beside, path)


def reuse_memory():
    """Tells glibc to keep freed memory.

    By default it maps and unmaps every large buffer of every step, and the kernel clears the pages each time: up to
    half of a JAX CPU process. The options are M_MMAP_MAX (-4), M_TRIM_THRESHOLD (-1; set to the largest size) and
    M_ARENA_MAX (-8).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return
    for option, value in ((-4, 0), (-1, -1), (-8, 1)):
        mallopt(option, value)


def tune_xla():
    """Lets XLA:CPU use whole vector registers, plain min and max, and order operations for both cores.

    Worth a tenth of a training step. Before jax starts; what XLA_FLAGS already says of these wins.
    """
    ours = {"--xla_cpu_prefer_vector_width": "512", "--xla_cpu_enable_fast_min_max": "true",
            "--xla_cpu_enable_concurrency_optimized_scheduler": "true"}
    theirs = os.environ.get("XLA_FLAGS", "").split()
    named = {flag.split("=")[0] for flag in theirs}
    added = [f"{name}={value}" for name, value in ours.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join(theirs + added)
