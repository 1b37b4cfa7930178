"""Which tensors of a checkpoint's files the model is made of, and what they are called here.

Files hold more: rotary frequencies that config.json gives, a vision model (the names of the language model then begin
with `language_model.`), an MTP module that is not wanted. What is left out is counted, and said.
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
    """without_from: the first layer that is left out, with all after it; None: none is."""

    without_from: int | None = None

    def named(self, name: str) -> str | None:
        """The name here of a tensor in the files; None: it is left out."""
        return None if self.left_out_as(name) else name.removeprefix(_LANGUAGE)

    def left_out_as(self, name: str) -> str | None:
        """What a tensor is that is left out; None of one that is not."""
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
