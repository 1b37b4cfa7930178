"""A server in a separate process, shared by the tests that send requests to it."""

import contextlib
import pathlib
import socket
import subprocess
import sys
import time

import pytest

# Serves a random model with a tokenizer of bytes, so that no run is needed.
PROGRAM = """
import sys
from tests.model import naive
from deepseek_jax.data.tokenizer import train_tokenizer
from deepseek_jax.serve import listen
from deepseek_jax.serving.engine import Engine, EngineConfig
from deepseek_jax.serving.openai.server import Options, serve
from deepseek_jax.serving.openai.stream import Service

def load(report):
    tokenizer = train_tokenizer(["some text"] * 3, 262)
    cfg = naive.tiny(num_layers=2, vocab_size=262)
    engine = Engine(cfg, naive.variables_of(cfg), EngineConfig(
        max_sequences=2, max_length=512, depth=1, page_size=8, chunk=16))
    engine.warm_up()
    return Service(engine, tokenizer, "org/random", max_waiting=70)

serve(load, "org/random", listen("127.0.0.1", int(sys.argv[1])), Options("secret", per_expert=True, grace=60))
"""

# A server whose model never finishes loading.
LOADING = """
import sys, time
from deepseek_jax.serve import listen
from deepseek_jax.serving.openai.server import Options, serve

def load(report):
    report("compiled 1 of 7 programs")
    time.sleep(1000)

serve(load, "late", listen("127.0.0.1", int(sys.argv[1])), Options(grace=1))
"""

# A server whose engine is idle.
IDLE = """
import sys, types
from deepseek_jax.serve import listen
from deepseek_jax.serving.openai.server import Options, serve
from deepseek_jax.serving.openai.turns import Turns

def load(report):
    return types.SimpleNamespace(engine=None, failure=None, step_seconds=0.0, turns=Turns(1), start=lambda: None,
                                 stop=lambda seconds: True)

serve(load, "idle", listen("127.0.0.1", int(sys.argv[1])), Options(grace=GRACE))
"""


@contextlib.contextmanager
def running(program=PROGRAM, status="ok"):
    """(process, its address) once /health returns `status`."""
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", program, str(port)], cwd=pathlib.Path(__file__).parents[3])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").json()["status"] == status:
                    break
            assert process.poll() is None
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def url():
    with running() as (_, url):
        yield url
