"""Every program of a checkout that is printed with options (experiments, benchmarks, kernels, notebooks, docs, tests)
exists and takes them; so do targets of make with their variables, extras of pip, and paths given to pytest.

Nothing runs: a program ends when its parser has accepted its options.
"""

import argparse
import importlib.util
import pathlib
import re
import runpy
import shlex
import sys
from unittest.mock import MagicMock

import pytest

from tests.docs import printed

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROOMS = "|".join(room for room in printed.ROOMS if room != "deepseek_jax")  # its commands are in test_commands.py
PROGRAM = re.compile(rf"python3? (?:-m ((?:(?:{ROOMS})\.[\w.]+|deepseek_jax\.(?:config|posttraining))(?<=\w))"
                     rf"|((?:{ROOMS})/[\w/]+(?:\.py)?))(?![\w.$])(?: ([^`\n]*))?")
END = re.compile(r"  +|[).]*$| && | &$| \|+ |(?:^| )2?> |; | #")
PLACEHOLDER = re.compile(r"\.\.\.|<|\$|NAME")
MAKE = re.compile(r"(?:`|: |^(?:# )? *)make ([a-z][\w-]*)((?: [A-Z_]+=(?:\"[^\"]*\"|\$\{\{.*?\}\}|[^\s`]*))*)"
                  r"(?=`| *$| +#|  | </dev/null)", re.MULTILINE)
EXTRAS = re.compile(r"""['"]\.\[(\w+(?:,\w+)*)\]['"]|[Ee]xtra `(\w+)`""")
TESTS = re.compile(r"\bpytest ([^`\n]*)")

PARSES = re.compile(r"^ *import argparse$|^from .* import (?:main|runner)$", re.MULTILINE)
# Scripts without a parser, which take words or nothing.
WORDS_ALONE = {"deepseek_jax.config", "experiments.studies.dense.timing", "experiments.studies.optimizers.timing",
               "tests.chat.published_templates", "tests.golden.check_export", "tests.golden.make_bfloat16",
               "tests.golden.make_hf_vectors", "tests.golden.make_tiktoken", "tests.interop.parity_table",
               "tests.serving.openai.chat_picture"}
ELSEWHERE = ("torch", "transformers", "nbformat", "nbclient")  # benchmarks/peer.txt, the extra `notebooks`
IMPORTS = re.compile(rf"^(?:import|from) ((?:{'|'.join(ELSEWHERE)})(?:\.\w+)*)\b", re.MULTILINE)


class Accepted(BaseException):
    """Raised instead of running, once a parser has accepted its options."""


def commands(text):
    """(program, its options) of each that is written out; what is in brackets counts as given."""
    text = re.sub(r"`((?:\w+=\S+ )*python3? [^`]+)`", lambda code: f"`{' '.join(code[1].split())}`", text)
    for match in PROGRAM.finditer(re.sub(r"\\\n\s*", "", text)):
        program, options = match[1] or match[2], END.split(match[3] or "")[0].strip()
        if not PLACEHOLDER.search(f"{program} {options}"):
            yield program, options.replace("[", "").replace("]", "")


ALL = sorted({command for text in printed.texts() for command in commands(text)})


def refusal(program, options):
    """Why a program refuses its options, None if it takes them."""
    path = ROOT / (program if "/" in program else program.replace(".", "/"))
    path = next((file for file in (path, path / "__main__.py", path.with_suffix(".py")) if file.is_file()), None)
    if path is None:
        return f"there is no {program}"
    if ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") in WORDS_ALONE:
        return next((f"{program} takes no {word}" for word in shlex.split(options) if word.startswith("-")), None)
    source = path.read_text(encoding="utf-8")
    if not PARSES.search(source):
        return f"{program} has no parser"
    with pytest.MonkeyPatch.context() as patch:
        _end_after_parsing(patch)
        patch.setattr(sys, "argv", [program, *shlex.split(options)])
        patch.setattr(sys, "path", list(sys.path))
        for name in absent(source):
            patch.setitem(sys.modules, name, MagicMock())
        try:
            runpy.run_path(str(path), run_name="__main__")
        except Accepted:
            return None
        except SystemExit as ended:
            return str(ended.code) if ended.code else f"{program} ended before it had read its options"
        except ModuleNotFoundError as error:
            if error.name not in ("lm_eval", *ELSEWHERE):
                raise
            pytest.skip(f"{error.name} is not installed, which the program imports first")
    return f"{program} ended before it had read its options"


def absent(source):
    """What a module imports of other environments and is not in this one, parents first."""
    names = [name for name in IMPORTS.findall(source) if importlib.util.find_spec(name.split(".")[0]) is None]
    return sorted({*names, *(name.split(".")[0] for name in names)})


def _end_after_parsing(patch):
    taken = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        taken(self, *args, **kwargs)
        raise Accepted

    def error(self, message):
        raise SystemExit(message)

    patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    patch.setattr(argparse.ArgumentParser, "error", error)


@pytest.mark.parametrize(("program", "options"), ALL, ids=[re.sub(r"\W+", "-", " ".join(one)) for one in ALL])
def test_a_program_takes_the_options_that_are_printed(program, options):
    assert refusal(program, options) is None


@pytest.mark.parametrize(("text", "why"), [
    ("`python -m benchmarks.loop --milisecond\n50`", "unrecognized arguments: --milisecond 50"),
    ("    python -m experiments.studies.mtp.run [--short]", "unrecognized arguments: --short"),
    ("python -m benchmarks.speculative", "are required: --workdir"),
    ("python -m docs.exploring --check | cat", "there is no docs.exploring"),
    ("`python tests/golden/make_tiktoken.py --write`", "takes no --write"),
    ("python -m kernels_pallas.tools.shapes", "has no parser")])
def test_one_that_would_be_refused_is_seen(text, why):
    assert len(ALL) > 100 and {re.split(r"\W", program)[0] for program, _ in ALL} == {
        "benchmarks", "deepseek_jax", "docs", "experiments", "kernels_pallas", "notebooks", "tests"}
    (command,) = commands(text)
    assert why in refusal(*command)


def test_targets_of_make_and_their_variables_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))
    said = [match for text in printed.texts() for match in MAKE.finditer(text)]
    assert targets == {*printed.TARGETS, "help"} and {match[1] for match in said} == set(printed.TARGETS)
    variables = {name for match in said for name in re.findall(r" ([A-Z_]+)=", match[2])}
    assert "ARGS" in variables and [name for name in variables if not re.search(rf"\$\({name}\b", makefile)] == []


def test_extras_of_pip_and_paths_given_to_pytest_exist():
    extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE))
    said = [match for text in printed.texts() for match in EXTRAS.finditer(text)]
    assert {extra for match in said for extra in (match[1] or match[2]).split(",")} == extras
    paths = {path for text in printed.texts() for path in paths_of(text)}
    assert len(paths) > 8 and [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    assert paths_of("`pytest -m slow tests/no.py tests/a/no_more.py -q`") == {"tests/no.py", "tests/a/no_more.py"}


def paths_of(text):
    """Files and folders of tests that pytest is given."""
    return {path for found in TESTS.finditer(text) for path in re.findall(r"tests/[\w/.]*\w", found[1])}


def test_scripts_without_a_parser_have_none():
    for name in WORDS_ALONE:
        path = ROOT / name.replace(".", "/")
        source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
        assert not PARSES.search(source), name
