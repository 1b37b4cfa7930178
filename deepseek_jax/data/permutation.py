"""A permutation as a function: the image of i, without storing a list.

A Feistel network permutes [0, 4^b), whatever its round function is; a value outside of [0, size) is permuted again
until it is inside ("cycle walking", Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), at most four
times on average.
"""

from __future__ import annotations

import functools

import numpy as np

ROUNDS = 8
_64 = (1 << 64) - 1


def permuted(i: int, size: int, *seed: int) -> int:
    """The image of i in a permutation of range(size), drawn by `seed`."""
    bits = max((size - 1).bit_length() + 1, 2) // 2
    keys = _keys(seed)
    while True:
        i = _feistel(i, bits, keys)
        if i < size:
            return i


@functools.lru_cache(maxsize=64)
def _keys(seed) -> tuple[int, ...]:
    return tuple(np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64).tolist())


def _feistel(i, bits, keys):
    left, right, mask = i >> bits, i & ((1 << bits) - 1), (1 << bits) - 1
    for key in keys:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << bits | right


def _mixed(x):
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every bit depends on every other."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64
    return x ^ x >> 31
