"""Every command of the package that is printed is one that the program takes: its options are there, and the run that
it describes is accepted. Other programs are in test_checkout_commands.py."""

import importlib
import json
import pathlib
import re
import shlex
import sys

import pytest

from deepseek_jax.__main__ import COMMANDS
from deepseek_jax.config import ConfigError, as_dict, freeze, load_config
from deepseek_jax.configs import tiny
from tests.docs import printed

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = re.compile(rf"(?:python3? -m deepseek_jax\.|\bdeepseek-jax )({'|'.join(COMMANDS)}) +(.*)")
END = re.compile(r"`|  +[#(]|\)?$| && | &$| \|+ | 2?> |; ")
PLACEHOLDER = re.compile(r"\.\.\.|my_|\[-|<|\bconfig\.py")
FROM = ("--config.init.from=", "--config.distill.from=")


def commands(text):
    """(name, what follows it) of each command that is written out; without those that only hint at one."""
    joined = re.sub(r"\\\n\s*", "", re.sub(r"`(python -m [^`]+)`", lambda code: " ".join(code[0].split()), text))
    found = [(match[1], END.split(match[2])[0].rstrip()) for match in START.finditer(joined)]
    return [(name, options) for name, options in found if "-" in options and not PLACEHOLDER.search(options)]


ALL = sorted({command for text in printed.texts() for command in commands(text)})


def refusal(name, options, folder):
    """Why the command is refused, None if it is not. Runs that it begins from are made of `tiny` in `folder`."""
    words = shlex.split(options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *words])
        module = importlib.import_module(f"deepseek_jax.{name}")
        if not hasattr(module, "parse"):
            module = importlib.import_module(f"deepseek_jax.{name}.__main__")
        try:
            args = module.parse()
            if isinstance(args, tuple):  # with overrides of the config named in it
                _load(args[0].config, args[1], folder)
        except ConfigError as error:
            return str(error)
        except SystemExit as asked_for_help:
            return None if not asked_for_help.code else str(asked_for_help)


def _load(config, overrides, folder):
    named = [word.split("=", 1)[1].split("@")[0] for word in overrides if word.startswith(FROM)]
    for run in [*named, *([config.removesuffix("/config.json")] if config.endswith("/config.json") else [])]:
        (folder / run).mkdir(parents=True, exist_ok=True)
        (folder / run / "config.json").write_text(json.dumps(as_dict(freeze(tiny.get_config()))), encoding="utf-8")
    load_config(str(ROOT / config) if (ROOT / config).is_file() else config, overrides)


@pytest.mark.parametrize(("name", "options"), ALL, ids=[re.sub(r"\W+", "-", f"{name} {options}")
                                                        for name, options in ALL])
def test_a_command_that_is_written_out_is_accepted(name, options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(name, options, tmp_path) is None


@pytest.mark.parametrize(("text", "why"), [
    ("python -m deepseek_jax.train --config tiny --workdir a \\\n --config.data.packing=whole\nnext", "mask_documents"),
    ("`python -m deepseek_jax.generate --workdir\nrun --prompt a --chats`", "unrecognized arguments: --chats"),
    ("deepseek-jax pipeline --schedule 1f1b && ls", "--ranks, --microbatches")])
def test_one_that_would_be_refused_is_seen(text, why, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(ALL) > 100 and {name for name, _ in ALL} >= set(COMMANDS) - {"check", "compare"}
    assert why in refusal(*commands(text)[0], tmp_path)
