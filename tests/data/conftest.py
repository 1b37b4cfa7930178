"""Small corpora, and configs around them."""

import numpy as np
import pytest

from deepseek_jax.config import default_config, freeze
from deepseek_jax.data.loader import Loader
from deepseek_jax.data.prepare import prepare
from deepseek_jax.data.tokenizer import train_tokenizer

WORDS = ("def", "return", "import", "class", "self", "value", "other", "print", "range", "while", "None", "lambda")


def make_text(seed, lines=40):
    """Text that looks a little like Python: words, indentation, punctuation before line breaks."""
    rng = np.random.default_rng(seed)
    pick = lambda: WORDS[rng.integers(len(WORDS))]
    return "".join(f"{'    ' * rng.integers(3)}{pick()}_{pick()}({pick()}, {rng.integers(2000)}):\n"
                   for _ in range(lines))


@pytest.fixture(scope="session")
def trained():
    """A tokenizer of 400 tokens."""
    return train_tokenizer([make_text(i) for i in range(20)], 400)


@pytest.fixture(scope="session")
def texts():
    return [make_text(100 + i) for i in range(20)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Forty text files of different lengths."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (root / f"file{i:02}.txt").write_text(make_text(i, lines=5 + 3 * i))
    return str(root)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_config(cache):
    """A frozen config of a tiny vocabulary; keyword arguments are fields of `train` or `data`."""
    def make(*sources, vocab_size=400, **fields):
        config = default_config("tiny")
        config.model.vocab_size = vocab_size
        config.data.sources = tuple(s if isinstance(s, tuple) else (str(s), 1.0) for s in sources)
        config.data.cache_dir = cache
        config.data.validation_fraction = 0.2
        config.train.sequence_length, config.train.steps = 64, 20
        for key, value in fields.items():
            section = config.data if key in config.data else config.train
            assert key in section
            section[key] = value
        return freeze(config)
    return make


@pytest.fixture
def make_loader(make_config, tmp_path):
    def make(*sources, host=0, hosts=1, **fields):
        config = make_config(*sources, **fields)
        return Loader(config, prepare(config, str(tmp_path / "work")), host, hosts)
    return make


@pytest.fixture
def own(make_config, folder, tmp_path):
    """The config of a run with two sources that each have separate held-out text."""
    for name in ("other", "held"):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.txt").write_text(f"{name}\n" + make_text(900 + i, lines=100))
    return make_config(folder, tmp_path / "other", validation=str(tmp_path / "held"))
