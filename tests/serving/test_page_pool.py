"""Page bookkeeping: every page is free, owned or kept; none is lost, and none is used twice."""

import numpy as np
import pytest

from deepseek_jax.serving.page_pool import Pages, digests


def test_a_prefix_is_found_page_by_page_and_only_after_the_same_beginning():
    pool = Pages(4, 2)
    pool.reserve(2)
    first, second = pool.take(), pool.take()
    for page, digest in zip((first, second), digests([1, 2, 3, 4], 2)):
        pool.register(page, digest)

    assert pool.find([1, 2, 3, 4, 9]) == [first, second]
    assert pool.find([1, 2, 9, 4]) == [first]
    assert pool.find([3, 4]) == []


def test_a_released_prefix_is_kept_until_its_room_is_needed_the_longest_unused_first():
    pool = Pages(2, 1)
    pool.reserve(2)
    pages = [pool.take(), pool.take()]
    for page, token in zip(pages, (7, 8)):
        pool.register(page, next(iter(digests([token], 1))))
    for page in pages:
        pool.release(page)

    assert pool.available == 2 and pool.find([7]) and pool.find([8])
    pool.reserve(1)
    assert pool.take() == pages[0]
    assert pool.find([7]) == [] and pool.find([8]) == [pages[1]]


def test_a_released_page_of_no_known_prefix_is_free_again():
    pool = Pages(1, 2)
    pool.reserve(1)
    page = pool.take()

    pool.release(page)

    assert (pool.available, pool.owned) == (1, 0)
    pool.reserve(1)
    assert pool.take() == page


def test_more_than_there_is_cannot_be_promised():
    pool = Pages(3, 1)
    pool.reserve(2)
    with pytest.raises(ValueError, match="1 are available"):
        pool.reserve(2)


def test_random_use_loses_no_page():
    rng, pool, held = np.random.default_rng(0), Pages(20, 2), []
    for _ in range(3000):
        if held and rng.random() < 0.5:
            for page in held.pop(rng.integers(len(held))):
                pool.release(page)
        else:
            tokens = rng.integers(0, 2, 2 * rng.integers(1, 6)).tolist()
            shared = pool.find(tokens)
            new = len(tokens) // 2 - len(shared)
            if new + sum(map(pool.idle, shared)) <= pool.available:
                for page in shared:
                    pool.share(page)
                pool.reserve(new)
                held.append(shared + [pool.take() for _ in range(new)])
                for page, digest in zip(held[-1], digests(tokens, 2)):
                    pool.register(page, digest)
        owned = {page for pages in held for page in pages}
        assert pool.owned == len(owned) and pool.available == 20 - len(owned) and pool.reserved == 0
    for pages in held:
        for page in pages:
            pool.release(page)
    pool.clear()
    assert pool.available == 20 and sorted(pool._free) == list(range(1, 21))
