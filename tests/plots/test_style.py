"""Pictures are written in the format given by the file name's suffix, or not at all."""

import pytest

from deepseek_jax.config import ConfigError
from deepseek_jax.plots.style import new_figure, save_figure


@pytest.mark.parametrize(("name", "first"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a", b"\x89PNG")])
def test_the_format_follows_the_name(tmp_path, name, first):
    save_figure(new_figure(1, 1), tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(first)


def test_an_unknown_format_is_named_and_nothing_is_written(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot draw .*a.xyz: .xyz is no format of pictures; take one of .*png"):
        save_figure(new_figure(1, 1), tmp_path / "a.xyz")
    assert not list(tmp_path.iterdir())
