"""Counts of visible keys and pairs against the mask of the reference, drawn in full."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from headfold.planner.work import key_span, visible_pairs, visible_tokens
from headfold.reference import visible
from tests.planner.problems import problem

sides = st.none() | st.integers(0, 40)


@given(st.integers(1, 30), st.integers(1, 30), sides, sides, st.booleans(), st.integers(1, 3))
@example(30, 1, None, 0, True, 1)
@example(1, 30, 0, 0, False, 2)
@example(5, 3, 1, 0, True, 1)
@example(12, 4, 2, None, False, 1)
def test_counts_equal_the_mask_drawn_in_full(
    sq: int, sk: int, left: int | None, right: int | None, bottom_right: bool, batch: int
) -> None:
    """explain() and the roofline rest on these; the closed form has four kinds of edge."""
    p = problem(batch=batch, sq=sq, sk=sk, window_left=left, window_right=right, bottom_right=bottom_right)
    seen = visible(sq, sk, -1 if left is None else left, -1 if right is None else right, bottom_right)
    assert visible_pairs(p) == batch * int(seen.sum())
    assert visible_tokens(p) == batch * int(seen.any(0).sum())


@given(st.integers(1, 20), st.integers(1, 30), sides, sides, st.booleans(), st.data())
def test_key_span_holds_every_visible_key(
    sq: int, sk: int, left: int | None, right: int | None, bottom_right: bool, data: st.DataObject
) -> None:
    """Of any run of queries; half-open and never reversed."""
    first = data.draw(st.integers(0, sq - 1))
    last = data.draw(st.integers(first, sq - 1))
    p = problem(batch=1, sq=sq, sk=sk, window_left=left, window_right=right, bottom_right=bottom_right)
    start, end = key_span(p, first, last)
    seen = visible(sq, sk, -1 if left is None else left, -1 if right is None else right, bottom_right)
    keys = seen[first : last + 1].any(0).nonzero().flatten().tolist()
    assert 0 <= start <= end
    assert keys == list(range(start, end))


@given(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2))
def test_empty_problems_hold_no_work(batch: int, sq: int, sk: int) -> None:
    """Whichever of the three is missing."""
    p = problem(batch=batch, sq=sq, sk=sk)
    assert (visible_pairs(p) == 0) == (visible_tokens(p) == 0) == (batch * sq * sk == 0)


def test_counts_of_a_long_context_are_exact_integers() -> None:
    """A million causal queries: 5e11 pairs, beyond float32 and 32 bits."""
    n = 2**20
    p = problem(batch=2, sq=n, sk=n, window_right=0)
    assert visible_pairs(p) == 2 * n * (n + 1) // 2


def test_a_ragged_batch_counts_its_tokens_once() -> None:
    """Totals bound the sum: 4 sequences of up to 100 keys, 150 in all."""
    p = problem(batch=4, sq=1, sk=100, total_k=150, kv_layout="ragged")
    assert visible_tokens(p) == 150
