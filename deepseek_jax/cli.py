"""Shared by the command modules: a parser, mistakes as one line with exit code 2, and the set-up of the process."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from deepseek_jax import runtime, stop, storage
from deepseek_jax.config import ConfigError, did_you_mean, usable_path

PATHS = ("workdir", "hf", "config", "data", "out", "prompts", "json", "plot", "teacher", "task_folder", "src", "dst",
         "checkpoint")
ON_DISK = ("prompts", "task_folder")  # those of them that only support files


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of each option that has one, unless its help already does."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        known = action.option_strings and action.default not in (None, False, argparse.SUPPRESS, [])
        return said if not known or "default" in said else f"{said} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """A parser whose --help is the module's docstring, and whose errors are ConfigErrors like all others."""

    def __init__(self, name: str, doc: str | None):
        super().__init__(prog=f"python -m deepseek_jax.{name}", description=doc, allow_abbrev=False,
                         formatter_class=_Help)

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        found, rest = super().parse_known_args(*args, **options)
        for name in PATHS:
            if isinstance(value := getattr(found, name, None), str):
                option = "--" + name.replace("_", "-")
                said = option if option in self._option_string_actions else name
                setattr(found, name, usable_path(said, value, name in ON_DISK))
        return found, rest

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):  # perhaps one was misspelled
            words = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
            wrong = [word for word in words if word not in self._option_string_actions and "." not in word]
            if wrong:
                raise ConfigError(f"there is no {wrong[0]}; {did_you_mean(wrong[0], self._option_string_actions)}")
        raise ConfigError(f"{message}; see {self.prog} --help.")


def run(main: Callable[[], int | None], resumes: bool = False) -> NoReturn:
    """Sets up the process (`runtime.prepare`), calls main(), and exits.

    A mistake of the user's becomes one line on stderr and exit code 2, an interrupt 130. The same holds for errors of
    the machine (a full disk, a directory without permission) and a missing package.

    Args:
      resumes: the command saves and resumes; SIGTERM and SIGUSR1 end it with `stop.STOPPED` from here on, SIGQUIT
        prints its threads' stacks, and SIGUSR2 does nothing until the loop handles it.
    """
    if resumes:
        stop.show_stacks()
        stop.ignore_requests_for_traces()
    with stop.ended_by_signals() if resumes else contextlib.nullcontext():
        code = _run(main)
        if code and stop.before_exit:  # other processes wait for this one, and must be told how it ends
            stop.leave(code)
    sys.exit(code)


def _run(main):
    runtime.prepare()
    try:
        return main() or 0
    except (ConfigError, storage.StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return stop.exit_code(error)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package in ("", "deepseek_jax", "kernels_pallas"):
            raise
        print(f"error: the Python package {package} is missing in {sys.prefix}; activate the environment that has it "
              "(. .venv/bin/activate), or install it with the others: pip install -e .", file=sys.stderr)
        return stop.MISTAKE
    except (AssertionError, RuntimeError) as error:
        if not _lacks_backend(error):
            raise
        print(f"error: this jax has no backend for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}; install jax for it "
              "(pip install -e '.[cuda12]', '.[cuda13]' or '.[tpu]'), or unset JAX_PLATFORMS.", file=sys.stderr)
        return stop.MISTAKE
    except MemoryError as error:
        print(f"error: the memory of this machine is too small ({str(error) or 'no more can be allocated'}).",
              file=sys.stderr)
        return stop.MISTAKE
    except OSError as error:
        what = error.strerror or str(error) or type(error).__name__
        print(f"error: {error.filename}: {what}" if error.filename else f"error: {what}", file=sys.stderr)
        return stop.MISTAKE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return stop.INTERRUPTED


def _lacks_backend(error):
    """Whether it comes from jax's search for devices, which may fail with an assertion without a message."""
    return os.path.basename(traceback.extract_tb(error.__traceback__)[-1].filename) == "xla_bridge.py"
