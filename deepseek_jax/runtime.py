"""Process-wide settings: memory allocator, XLA flags, compilation cache, logs. Commands call `prepare`; importing has
no effect."""

import ctypes
import io
import logging
import os
import sys

# Together these save a tenth of a training step on a CPU: full vector registers, plain min and max, a schedule for all
# cores.
CPU_FLAGS = {"--xla_cpu_prefer_vector_width": "512", "--xla_cpu_enable_fast_min_max": "true",
             "--xla_cpu_enable_concurrency_optimized_scheduler": "true"}

CACHE_BYTES = 4 << 30  # bytes of compiled programs; the least recently used are removed


def prepare() -> None:
    """Sets up the process of a command. Call it before jax starts."""
    reuse_memory()
    tune_xla()
    keep_compiled_programs()
    quiet_logs()
    print_everything()


def reuse_memory() -> None:
    """Tells glibc to keep freed memory.

    By default it maps and unmaps every large buffer of every step, and the kernel clears the pages each time: up to
    half of the time of a JAX CPU process. The options are M_MMAP_MAX (-4), M_TRIM_THRESHOLD (-1; set to the largest
    size) and M_ARENA_MAX (-8).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; the last on Windows
        return
    for option, value in ((-4, 0), (-1, -1), (-8, 1)):
        mallopt(option, value)


def tune_xla() -> None:
    """Adds CPU_FLAGS to XLA_FLAGS; flags set by the user win, and a file of flags is not changed."""
    theirs = os.environ.get("XLA_FLAGS", "").split()
    if theirs and not theirs[0].startswith("-"):
        return
    named = {flag.split("=")[0] for flag in theirs}
    added = [f"{name}={value}" for name, value in CPU_FLAGS.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join(theirs + added)


def keep_compiled_programs() -> None:
    """Turns on jax's persistent compilation cache, in the user's cache folder; the user's settings win.

    A program that has been compiled before then starts at once. JAX_ENABLE_COMPILATION_CACHE=false turns it off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(caches, "deepseek-jax", "compiled")
    new = not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:  # no home, or a read-only one
        return
    os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(CACHE_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    if new:
        print(f"Compiled programs are kept in {folder} (up to {CACHE_BYTES >> 30} GB), so that the next start is "
              "faster; JAX_COMPILATION_CACHE_DIR names another folder.", file=sys.stderr, flush=True)


def quiet_logs() -> None:
    """Shows messages as plain lines, and only warnings of libraries.

    Orbax logs every phase of a save, and a failure several times with tracebacks; the checkpoint manager raises
    failures as one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)
    logging.getLogger("jax").setLevel(logging.WARNING)
    for name in ("absl", "asyncio"):
        if _not_from_orbax not in logging.getLogger(name).filters:
            logging.getLogger(name).addFilter(_not_from_orbax)
    if sys.unraisablehook is not _unraisable:
        sys.unraisablehook = _unraisable


def _not_from_orbax(record: logging.LogRecord) -> bool:
    inside = os.path.join("orbax", "checkpoint")
    return inside not in record.pathname and inside not in record.getMessage()


def _unraisable(unraisable):
    # When one write fails, TensorStore still reports the others, to an event loop that Orbax has closed by then.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def print_everything() -> None:
    """Makes characters outside the terminal's encoding, such as in a file name that is not UTF-8, print with
    backslashes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
