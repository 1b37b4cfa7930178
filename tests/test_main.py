"""The console script, and a wheel with all files that a run needs."""

import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import yaml

import deepseek_jax
from deepseek_jax import __main__ as main

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "deepseek_jax", *arguments], capture_output=True, text=True)


def test_every_command_is_listed_and_runs():
    listed = run("--help")
    assert listed.returncode == 0 and run().stdout == listed.stdout
    for name in main.COMMANDS:
        assert f"  {name}" in listed.stdout
    found = run("pipeline", "--schedule", "1f1b", "--ranks", "2", "--microbatches", "4")
    assert found.returncode == 0 and found.stdout


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == f"deepseek-jax {deepseek_jax.__version__}\n"


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    repository = re.search(r'^REPOSITORY = "(.*?)"', (ROOT / "setup.py").read_text(), re.M)[1]
    assert deepseek_jax.__version__ == cited["version"] == newest[1]
    assert (str(cited["date-released"]), cited["repository-code"]) == (newest[2], repository)


def test_an_unknown_command_and_a_bad_option_are_one_line():
    for arguments, part in ((["trian"], "there is no command trian; take one of train"), (["train"], "--config")):
        done = run(*arguments)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and part in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_platform_that_this_jax_lacks_is_one_line():
    code = "from deepseek_jax import cli; import jax; cli.run(lambda: len(jax.devices()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cuda"})
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: this jax has no backend for")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_wheel_trains_tiny_from_another_folder(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    assert not (tmp_path / "site" / "tests").exists()
    (about,) = (tmp_path / "site").glob("*.dist-info")
    assert (about / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    assert "\nLicense-Expression: Apache-2.0\n" in (about / "METADATA").read_text()
    sizes = ["--config.train.steps=2", "--config.train.batch_size=2", "--config.train.sequence_length=32",
             "--config.train.eval_batches=1", "--config.train.sample_tokens=0",
             "--config.data.sources=(('text', 1.0),)", "--config.data.validation_fraction=0.5",
             "--config.model.vocab_size=300"]
    (tmp_path / "text").mkdir()
    for i in range(4):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} of a few that are read. " * 40)
    command = [sys.executable, "-P", "-m", "deepseek_jax", "train", "--config", "tiny", "--workdir", "run", *sizes]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


@pytest.mark.slow
def test_the_source_distribution_has_the_tests(tmp_path):
    pytest.importorskip("build")
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout is built")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    subprocess.run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", str(tmp_path), str(clone)],
                   check=True, capture_output=True)
    (path,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"tests/conftest.py", "tests/runs.py", "experiments/configs/tiny.py", "Makefile", "docs/config.md",
            "examples/own_router.py", "deepseek_jax/configs/tiny.py", "LICENSE"} <= names
    assert path.stat().st_size < 10 << 20  # mostly pictures, notebooks and small models of tests
    assert {".pre-commit-config.yaml", ".github/workflows/ci.yml", ".ci/run"} <= names  # which tests read
    shown = re.findall(r"\]\(\.\./([\w/.]+\.png)\)", "".join(page.read_text() for page in (ROOT / "docs").glob("*.md")))
    assert shown and set(shown) <= names
