"""The plain forms of the CPU backend: attention over a band, by PyTorch's CPU flash kernel alone.

`decode` hands the kernel folded rows: it reads K and V once per 32 rows of a (sequence, head), so the G heads of
a group, laid side by side as rows, read them once instead of G times. Splits become its batch dimension.
`prefill` hands it queries as they are: they fill its blocks without folding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headfold.backends.cpu_band import Band, Piece
from headfold.backends.cpu_sequences import Sequences, split_extent
from headfold.backends.cpu_states import NEG_INF, flash_state, merge_all, merge_into
from headfold.planner.plan import Plan


def decode(plan: Plan, q: torch.Tensor, scale: float, s: Sequences, band: Band) -> None:
    """Few queries: the group folded into rows, splits merged by their LSE at float32."""
    first, last = band.rows()
    q = q[:, first:last]
    states = _split_states(plan, q, scale, s, band)
    merged, total = merge_all(*next(states))
    for state in states:  # one call's states at a time, so that few are held at once
        merged = merged.float()
        merge_into(merged, total, merge_all(*state))
    hk, positions = merged.shape[1], last - first
    heads, rows = (hk, q.shape[2] // hk), (positions, q.shape[2] // hk)
    s.out[:, first:last].unflatten(2, heads).copy_(merged.unflatten(2, rows).transpose(1, 2))
    s.lse[:, :, first:last].unflatten(1, heads).copy_(total.unflatten(2, rows).transpose(2, 3))


def _split_states(
    plan: Plan, q: torch.Tensor, scale: float, s: Sequences, band: Band
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The states of q (n, positions, h, d): out (splits, n, hk, rows, dv) and LSE (splits, n, hk, rows)."""
    first, last = band.rows()
    start, end = band.keys(first, last)
    extent = split_extent(plan, end - start)
    while start < end:
        count = _full_splits(band, start, end, extent, plan.num_stages) if q.shape[0] == 1 else 0
        stop = start + count * extent if count else min(end, start + extent)
        seen = None
        if not band.is_full(first, last, start, stop):
            seen = band.visible(first, last, start, stop)
        yield _folded_states(q, *s.keys(start, stop), scale, seen, count)
        start = stop


def _folded_states(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (n, positions, h, d) folded, against k, v (n, e, hk, .) as one split, or as `count` equal ones.

    Only here are k and v held: gathered pages are gone before the next ones come.
    """
    hk = k.shape[2]
    group = q.shape[2] // hk
    folded = q.unflatten(2, (hk, group)).transpose(1, 2).flatten(2, 3)
    if seen is not None:
        seen = seen.repeat_interleave(group, 0)
    if count > 1:
        k, v = (t[0].unflatten(0, (count, -1)) for t in (k, v))
        folded = folded.expand(count, -1, -1, -1)
    out, lse = flash_state(folded, k.transpose(1, 2), v.transpose(1, 2), scale, seen)
    dim = 1 if count > 1 else 0
    return out.unsqueeze(dim), lse.unsqueeze(dim)


def _full_splits(band: Band, start: int, end: int, extent: int, most: int) -> int:
    """How many whole splits from `start` on one call can take: visible to every query, `most` at most."""
    first, last = band.rows()
    end = min(end, band.keys(first, first + 1)[1])
    if not band.is_full(first, last, start, start + 1):
        return 0
    return max(0, min((end - start) // extent, most))


def prefill(plan: Plan, q: torch.Tensor, scale: float, s: Sequences, band: Band) -> None:
    """Many queries: the kernel's own blocks, over pieces that need no mask or a small one."""
    first, last = band.rows()
    start, end = band.keys(first, last)
    extent = split_extent(plan, end - start)
    splits = [(a, min(a + extent, end)) for a in range(start, end, extent)]
    work = [list(band.pieces(plan.block_m, a, b)) for a, b in splits]
    depth = _depth([piece for pieces in work for piece in pieces])
    # Two states merge into the output's own dtype with a single rounding; more would round again and again.
    acc = s.out if depth <= 2 else torch.zeros(s.out.shape, dtype=torch.float32)
    if depth > 1:
        acc[:, first:last] = 0
        s.lse[:, :, first:last] = NEG_INF
    for (a, b), pieces in zip(splits, work, strict=True):
        k, v = (t.transpose(1, 2) for t in s.keys(a, b))
        hk = k.shape[1]
        group, step = q.shape[2] // hk, -(-hk // plan.head_units)
        for piece in pieces:
            keys, rows = slice(piece.start - a, piece.end - a), slice(piece.first, piece.last)
            seen = None
            if piece.kind == "masked":
                seen = band.visible(piece.first, piece.last, piece.start, piece.end)
            for head in range(0, hk, step):
                kv_heads, heads = slice(head, head + step), slice(head * group, (head + step) * group)
                state = flash_state(
                    q[:, rows, heads].transpose(1, 2),
                    k[:, kv_heads, keys],
                    v[:, kv_heads, keys],
                    scale,
                    seen,
                    piece.kind == "causal",
                )
                held = acc[:, rows, heads].transpose(1, 2), s.lse[:, heads, rows]
                if depth > 1:
                    merge_into(*held, state)
                else:
                    held[0].copy_(state[0])
                    held[1].copy_(state[1])
        del k, v  # gathered pages must not outlive their split
    if acc is not s.out:
        s.out[:, first:last] = acc[:, first:last]


def _depth(pieces: list[Piece]) -> int:
    """The largest number of pieces that any one query is part of."""
    return max(sum(p.first <= row < p.last for p in pieces) for row in {p.first for p in pieces})
