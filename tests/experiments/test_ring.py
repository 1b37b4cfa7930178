"""What split sequences send, compiled for H100s: the committed hops are those of the formula, and hidden."""

import json

from experiments.studies.long_context import ring


def test_a_hop_of_128k_tokens_over_eight_devices_carries_19_megabytes_and_waits_for_nothing():
    result = json.loads(ring.OUT.read_text())
    latents, gradients = ring.hop_bytes(False), ring.hop_bytes(True)
    hops = {True: [], False: []}
    for hop in result["hops"]:
        assert hop["axes"] == ["context"] and hop["products"], hop
        hops[hop["bytes"] > latents].append((hop["bytes"], hop["times"]))

    # Seven forward and six backward, whose first is that of the forward pass; XLA rounds gradients on their way home.
    home = gradients // 2
    assert (latents, gradients) == (18_939_904, 37_748_736)
    assert sorted(hops[False]) == [(home, 1), (latents, 1), (latents, 6), (latents, 6)]
    assert sorted(hops[True]) == [(gradients, 1), (gradients, 6)]
