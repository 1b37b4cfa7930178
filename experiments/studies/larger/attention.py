"""Full attention (MHA) with as many weights as `small` has in MLA: 114,688 a layer, against MLA's 112,640."""

import functools

from experiments.studies.mla.attention import GroupedAttention

HEADS, WIDTH = 4, 28
MHA = functools.partial(GroupedAttention, kv_heads=HEADS, width=WIDTH)
# Numbers that a token leaves in a layer's cache: MLA's latent and its rotary key, or keys and values.
CACHE = {"recipe": 64 + 16, "MHA": 2 * HEADS * WIDTH}


def attention_of(arm: str) -> dict[str, str]:
    """The config keys of the arm's attention."""
    return {"model.attention": f"{__name__}:MHA"} if arm == "MHA" else {}
