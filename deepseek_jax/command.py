"""What the command modules share: mistakes end in one line and exit code 2, and a CPU process allocates well."""

import ctypes
import logging
import sys

from deepseek_jax.config import ConfigError


def run(main):
    """Calls main(); a mistake of the user's becomes one line on stderr and exit code 2, an interrupt 130."""
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.WARNING)
    reuse_memory()
    try:
        code = main() or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


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
