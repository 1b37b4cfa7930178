"""A picture with sliders for notebooks, redrawn when a slider is released.

The picture is an Image widget. `ipywidgets.interact` instead captures a function's display output, which makes an
executor of notebooks (nbclient) answer the kernel in the middle of a cell; that answer can hide the end of the cell
from it.
"""

import base64
import io
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure


def with_sliders(draw: Callable[..., Figure], **sliders: Any) -> None:
    """Displays the sliders above the picture.

    Args:
      draw: returns a figure; it gets the value of each slider under that slider's name.
      sliders: ipywidgets with a `value`. Without a kernel (on a static page), the first picture stays.
    """
    import ipywidgets  # pyright: ignore[reportMissingImports] (extra notebooks)
    from IPython.display import display  # pyright: ignore[reportMissingImports] (extra notebooks)
    from matplotlib import pyplot

    picture = ipywidgets.Image(format="png")

    def draw_again(change=None):
        figure = draw(**{name: slider.value for name, slider in sliders.items()})
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=90)
        pyplot.close(figure)
        picture.value = png.getvalue()

    for name, slider in sliders.items():
        slider.description = slider.description or name.replace("_", " ")
        slider.style.description_width = "initial"
        slider.continuous_update = False
        slider.observe(draw_again, "value")
    draw_again()
    box = ipywidgets.VBox([*sliders.values(), picture])
    display({"application/vnd.jupyter.widget-view+json": {"version_major": 2, "version_minor": 0,
                                                          "model_id": box.model_id},
             "image/png": base64.b64encode(picture.value).decode(), "text/plain": "a picture with sliders"}, raw=True)
