"""The commands of the README, as printed and in order, in a clean clone; only their sizes are smaller."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ("--config.train.batch_size=2 --config.train.sequence_length=64 --config.train.eval_batches=1 "
         "--config.train.final_eval_batches=1 --config.train.sample_tokens=4 --config.model.vocab_size=600 "
         "--config.data.sources=\"(('deepseek_jax',1.0),)\"")

pytestmark = pytest.mark.slow


def blocks(text, language=""):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands():
    """The lines of the README's shell blocks up to the library, apart from installations by pip."""
    shell = blocks((ROOT / "README.md").read_text().split("## As a library")[0])
    alone = re.compile(r"pip install \S+( +'?\S+'?)? *(#|$)")
    return [line for block in shell for line in block.splitlines() if not alone.match(line)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A clone of what is committed, in which `make` finds the environment of these tests."""
    folder = tmp_path_factory.mktemp("readme") / "clone"
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "python3"):
        (folder / ".venv" / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / ".venv" / "bin" / name).chmod(0o755)
    (folder / ".venv" / "bin" / "activate").write_text(f'export PATH="{folder}/.venv/bin:$PATH"\n')
    (folder / ".venv" / "stamp").touch()
    return folder


def shell(clone, lines, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["ARGS"] = f"--config.train.steps=4 {SMALL}"
    return subprocess.Popen(["bash", "-ec", "\n".join(lines)], cwd=clone, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def test_every_command_works_in_the_order_of_the_readme(clone):
    lines = commands()
    assert lines[:2] == [lines[0], ". .venv/bin/activate"] and lines[0].startswith("make train")
    assert "deepseek_jax.serve" in lines[-1] and len(lines) == 12
    for line in lines[2:-1]:
        small = line.replace("--config.train.steps=50", "--config.train.steps=4")
        if "-m deepseek_jax.train" in line and "--config tiny" in line:
            small += f" {SMALL}"
        lines[lines.index(line)] = small
    done = shell(clone, lines[:-1])
    said = done.communicate()[0]
    assert done.returncode == 0, said[-3000:]
    assert (clone / "dualpipe.png").exists() and (clone / "exported" / "model.safetensors").exists()
    left = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert left.stdout == ""  # what the commands write is ignored by git

    (example,) = blocks((ROOT / "README.md").read_text(), "python")
    done = shell(clone, [lines[1], f"python - <<'END'\n{example}\nEND"])
    said = done.communicate()[0]
    assert done.returncode == 0, said[-3000:]

    server = shell(clone, [lines[1], lines[-1].split("&&")[1].split("#")[0] + " --port 8123"], start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:8123/health", timeout=5).close()  # an error until it is ready
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, server.stdout.read()
                time.sleep(1)
        with urllib.request.urlopen("http://127.0.0.1:8123/", timeout=5) as page:
            assert b"<html" in page.read().lower()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=60)
