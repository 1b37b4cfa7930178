"""Latent attention against full, grouped and single keys and values, at equal parameters (report section 2.1.1).

30,720 attention weights a layer in each arm (MHA 32,768: its width comes in even steps).
"""

from experiments.studies.framework.study import Claim, Study

# arm -> (heads of keys and values, width of a head); MLA is the model's own.
VARIANTS = {"MHA": (4, 16), "GQA": (2, 20), "MQA": (1, 24)}
# Numbers a token leaves in the cache of a layer: keys and values, or MLA's latent and its rotary key.
CACHE = {"MLA": 32 + 16, **{arm: 2 * heads * width for arm, (heads, width) in VARIANTS.items()}}
STUDY = Study(
    name="mla",
    arms={"MLA": {}, **{arm: {} for arm in VARIANTS}},
    quick_arms=("MLA", "GQA"),
    network="experiments.studies.mla.attention:attention_of",
    claims=(
        Claim("MLA learns better than MHA, from a cache of 48 numbers instead of 128.", "loss", "MLA", "MHA", "lower"),
        Claim("MLA learns better than GQA, from a cache of 48 numbers instead of 80.", "loss", "MLA", "GQA", "lower"),
        Claim("MLA learns better than MQA, from a cache of the same size.", "loss", "MLA", "MQA", "lower"),
    ))
