"""The permutation that sorts choices into rows: every choice once, aligned groups, and its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_jax.model import permute

N, K, E = 12, 3, 8

# name -> the experts of each of N tokens
ROUTINGS = {
    "mixed": np.random.default_rng(0).permuted(np.tile(np.arange(E), (N, 1)), axis=1)[:, :K],
    "all_to_the_first": np.tile([0, 1, 2], (N, 1)),
    "all_to_the_last": np.tile([7, 6, 5], (N, 1)),
    "one_has_none": 1 + np.random.default_rng(1).permuted(np.tile(np.arange(E - 1), (N, 1)), axis=1)[:, :K],
    "one_token_apart": np.array([[0, 2, 4]] * (N - 1) + [[5, 3, 1]]),
}
ALIGNMENTS = (1, 8, 16)
sort_by_expert = jax.jit(permute.sort_by_expert, static_argnums=(1, 2, 3))


def routings():
    """Any N choices of K different experts, few or many of them in use."""
    def of(used):
        return st.lists(st.permutations(used).map(lambda p: p[:K]), min_size=N, max_size=N)

    return st.lists(st.integers(0, E - 1), min_size=K, max_size=E, unique=True).flatmap(of).map(np.array)


def check(chosen_NK, align, even=False):
    p = jax.tree.map(np.asarray, sort_by_expert(chosen_NK.astype(np.int32), E, align, even))
    choices = chosen_NK.reshape(-1)
    counts = np.bincount(choices, minlength=E)
    ends = np.cumsum(p.sizes_E)

    # Conservation: every choice has one row, which names it; every other row is marked empty.
    assert np.array_equal(p.choice_R[p.row_NK.reshape(-1)], np.arange(N * K))
    assert (p.choice_R < N * K).sum() == N * K and p.choice_R.max() <= N * K
    # Groups: contiguous, in the order of the experts, aligned, filled from the start; all equal, or of minimal size.
    room = len(p.choice_R) // E
    equal = even and counts.max() <= room
    assert np.array_equal(p.sizes_E, [room] * E if equal else -(-counts // align) * align)
    assert len(p.choice_R) >= ends[-1] and len(p.choice_R) % align == 0
    for e in range(E):
        rows = p.choice_R[ends[e] - p.sizes_E[e]:ends[e]]
        # Stable: the tokens of an expert stay in order.
        assert np.array_equal(rows[:counts[e]], np.flatnonzero(choices == e))
        assert (rows[counts[e]:] == N * K).all()
    assert (p.choice_R[ends[-1]:] == N * K).all()
    assert equal or ends[-1] - N * K <= E * (align - 1)


@pytest.mark.parametrize("align", ALIGNMENTS)
@settings(max_examples=40)
@given(chosen_NK=routings())
def test_the_permutation_gives_every_choice_one_row_and_sorts_rows_by_expert(align, chosen_NK):
    check(chosen_NK, align)


@pytest.mark.parametrize(("align", "even"), [(1, False), (8, False), (2, True), (8, True)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_permutation_holds_under_skew(routing, align, even):
    check(ROUTINGS[routing], align, even)


def test_groups_are_equal_where_no_expert_needs_more_than_the_mean_load_and_the_alignment():
    assert (sort_by_expert(ROUTINGS["mixed"], E, 8, True).sizes_E == 16).all()
    assert len(set(np.asarray(sort_by_expert(ROUTINGS["all_to_the_first"], E, 2, True).sizes_E))) > 1


def test_a_token_is_in_each_of_its_rows_and_empty_rows_are_zero():
    p = sort_by_expert(ROUTINGS["mixed"], E, 8)
    x_ND = jnp.asarray(np.random.default_rng(2).standard_normal((N, 5)), jnp.float32)

    x_RD = np.asarray(permute.to_rows(x_ND, p))

    np.testing.assert_array_equal(x_RD[p.row_NK], np.repeat(x_ND[:, None], K, axis=1))
    assert not x_RD[np.asarray(p.choice_R) == N * K].any()


def test_the_gradient_of_a_token_is_the_sum_over_its_rows_and_over_no_empty_one():
    p = sort_by_expert(ROUTINGS["one_token_apart"], E, 8)
    dx_RD = np.random.default_rng(3).standard_normal((len(p.choice_R), 5)).astype(np.float32)

    dx_ND, = jax.vjp(lambda x_ND: permute.to_rows(x_ND, p), jnp.zeros((N, 5)))[1](jnp.asarray(dx_RD))

    np.testing.assert_allclose(dx_ND, dx_RD[p.row_NK].sum(1), rtol=1e-5)
