"""How much work a Problem holds at its bounds: visible keys and visible (query, key) pairs."""

from __future__ import annotations

from headfold.problem import Problem


def diagonal(p: Problem) -> int:
    """How far the diagonal of the mask is moved to the right: sk - sq for bottom-right alignment, else 0."""
    return p.max_seqlen_k - p.max_seqlen_q if p.bottom_right else 0


def key_span(p: Problem, first_query: int, last_query: int) -> tuple[int, int]:
    """Half-open range of keys that some query of first_query..last_query sees, at the bounds."""
    shift = diagonal(p)
    start, end = 0, p.max_seqlen_k
    if p.window_left is not None:
        start = max(0, first_query + shift - p.window_left)
    if p.window_right is not None:
        end = min(end, last_query + shift + p.window_right + 1)
    return start, max(start, end)


def visible_tokens(p: Problem) -> int:
    """Keys that at least one query of their sequence sees, over the whole batch."""
    if p.is_empty:
        return 0
    start, end = key_span(p, 0, p.max_seqlen_q - 1)
    return min(p.total_k, p.batch * (end - start))


def visible_pairs(p: Problem) -> int:
    """(query, key) pairs that the mask leaves alive, over the whole batch, for one head."""
    if p.is_empty:
        return 0
    shift, sk = diagonal(p), p.max_seqlen_k
    if p.window_left is None and p.window_right is None:
        return p.total_q * sk
    pairs = (
        _sum_clamped(p.max_seqlen_q, shift + 1 + p.window_right, sk) if p.window_right is not None else None
    )
    ends = p.max_seqlen_q * sk if pairs is None else pairs
    starts = 0 if p.window_left is None else _sum_clamped(p.max_seqlen_q, shift - p.window_left, sk)
    if p.window_left is not None and p.window_right is not None:
        ends = max(ends, starts)
    return max(0, ends - starts) * p.total_q // p.max_seqlen_q


def _sum_clamped(n: int, offset: int, top: int) -> int:
    """Sum over i in 0..n-1 of min(max(i + offset, 0), top), in closed form."""
    first = min(max(-offset, 0), n)  # rows below this one clamp to 0
    full = min(max(top - offset, first), n)  # rows from this one on clamp to top
    middle = full - first
    return middle * (first + full - 1) // 2 + middle * offset + (n - full) * top
