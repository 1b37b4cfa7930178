"""Sliders of notebooks: the output before and after moving one."""

import base64

import pytest

from deepseek_jax.plots.sliders import with_sliders
from deepseek_jax.plots.style import new_figure

ipywidgets = pytest.importorskip("ipywidgets", reason="extra notebooks")


@pytest.fixture
def shown(monkeypatch):
    """The outputs that the notebook displays."""
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: bundles.append(data))
    return bundles


def test_a_released_slider_draws_again_with_all_values(shown):
    drawn, x, y = [], ipywidgets.FloatSlider(1.0, min=0, max=5), ipywidgets.IntSlider(2, 0, 5)

    def draw(**values):
        drawn.append(values)
        return new_figure(len(drawn), 1)

    with_sliders(draw, x=x, how_many=y)
    x.value = 3.0
    assert drawn == [{"x": 1.0, "how_many": 2}, {"x": 3.0, "how_many": 2}]
    assert not x.continuous_update and y.description == "how many"


def test_a_page_without_a_kernel_keeps_the_first_picture(shown):
    with_sliders(lambda x: new_figure(1, 1), x=ipywidgets.IntSlider(1, 0, 5))
    (bundle,) = shown
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_nothing_is_captured(shown):
    """Under nbclient, an Output widget can lose the end of a cell."""
    with_sliders(lambda x: new_figure(1, 1), x=ipywidgets.IntSlider(1, 0, 5))
    assert not [w for w in ipywidgets.widgets.widget._instances.values()
                if isinstance(w, ipywidgets.Output)]
