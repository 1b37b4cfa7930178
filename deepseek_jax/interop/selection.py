"""The selection and naming of the tensors in a checkpoint's files that belong to the model.

Files hold more: rotary frequencies, which follow from config.json, a vision model (the names of the language model then
begin with `language_model.`), an unwanted MTP module. Tensors that are left out are counted and reported.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable
from typing import NamedTuple

_LANGUAGE = "language_model."
_VISION = ("vision_tower.", "mm_projector.", "multi_modal_projector.")
_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


class Selection(NamedTuple):
    """without_from: the first layer to leave out, with all later ones; None: no layer is."""

    without_from: int | None = None

    def named(self, name: str) -> str | None:
        """The name here of a tensor in the files; None: it is left out."""
        return None if self.left_out_as(name) else name.removeprefix(_LANGUAGE)

    def left_out_as(self, name: str) -> str | None:
        """A description of a tensor that is left out; None for others."""
        layer = _LAYER.match(name.removeprefix(_LANGUAGE))
        if name.startswith(_VISION):
            return "of the vision model"
        if self.without_from is not None and layer and int(layer[1]) >= self.without_from:
            return "of the MTP module"
        return "rotary_emb.inv_freq, which config.json gives" if name.endswith(".rotary_emb.inv_freq") else None

    def notes(self, folder: str, names: Iterable[str]) -> list[str]:
        """A line for each kind of tensor that is left out of `names`."""
        counts = collections.Counter(filter(None, map(self.left_out_as, names)))
        return [f"{folder}: left out {count:,} tensor{'s' * (count > 1)} {kind}." for kind, count in counts.items()]
