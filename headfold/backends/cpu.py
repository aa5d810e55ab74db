"""The CPU backend: a Plan run with PyTorch's CPU flash kernel over K and V where they lie.

Both forms call `aten::_scaled_dot_product_flash_attention_for_cpu`, which keeps scores and sums in float32,
takes strided K and V, serves a group from its one KV head without expanding it, and returns the LSE.

`decode` hands it folded rows: it reads K and V once per 32 rows of a (sequence, head), so the G heads of a
group, laid side by side as rows, read them once instead of G times. Splits become its batch dimension.
`prefill` hands it queries as they are: they fill its blocks without folding.

How a Plan reads here: `block_n` keys are a split, or 0: `num_splits` equal parts of each sequence.
`num_stages` sequences (when one split holds a sequence) or splits (when it does not) go into one call; a prefill
makes `head_units` calls to cover the KV heads, and `block_m` of its query positions share a mask.

What the kernel returns for a row that a mask hides wholly is output 0 and LSE 0; `_states` mends that LSE.
Causal calls of the kernel mask before they scale, which breaks for a scale <= 0; `_scaled` mends that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from headfold.backends.cpu_band import Band, Piece
from headfold.planner.plan import Plan
from headfold.problem import Inputs

_NEG_INF = float("-inf")
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# (start, end) -> those keys and values, (n, end - start, hk, d) and (n, end - start, hk, dv)
KeysOf = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class _Sequences:
    """n sequences of equal lengths: q (n, sq, h, d), out (n, sq, h, dv), lse (n, h, sq), and their keys."""

    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sk: int
    keys: KeysOf


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compute attention of checked inputs into `out` and `lse`.

    Args:
        plan: a plan of the CPU backend for the problem of x; its kernel is "decode" or "prefill".
        x: checked inputs; shapes as `Inputs` says.
        out: x.out_shape in the dtype of q, any strides whose last one is 1; its content is overwritten.
        lse: x.lse_shape in float32, any strides; the natural logarithm of the sum of exponentials.
    """
    form = _decode if plan.kernel == "decode" else _prefill
    for s in _sequences(plan, x, out, lse):
        band = Band.of(x, s.q.shape[1], s.sk)
        first, last = band.rows()
        for dead in (slice(0, first), slice(last, None)):
            s.out[:, dead] = 0
            s.lse[:, :, dead] = _NEG_INF
        if first < last:
            q, scale = _scaled(s.q, x.scale)
            form(plan, q, scale, s, band)
            if x.scale == 0:
                # The kernel's half-precision exp(0) is 1 - 5e-5, and here the exact LSE costs nothing.
                s.lse[:, :, first:last] = band.counts(first, last).log()


def _scaled(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0: the kernel's causal form multiplies its -inf by the scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)


def _sequences(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Iterator[_Sequences]:
    """Cut the batch into runs of sequences that one call can take."""
    if x.cu_seqlens_q is None and x.seqused_q is None and _dense_keys(x):
        step = plan.num_stages if plan.num_splits == 1 else 1
        for i in range(0, x.batch, step):
            run_of = slice(i, i + step)
            keys = _keys_between(x.k[run_of], x.v[run_of])
            yield _Sequences(x.q[run_of], out[run_of], lse[run_of], x.k.shape[1], keys)
        return
    if x.cu_seqlens_q is not None or x.seqused_q is not None:
        # Rows of no sequence are undefined; zeros keep NaN from an uninitialised buffer out of later sums.
        out.zero_()
        lse.fill_(_NEG_INF)
    q_starts, q_lens = _spans(x.cu_seqlens_q, x.seqused_q, x.batch, x.q.shape[1])
    k_starts, k_lens = _spans(x.cu_seqlens_k, x.seqused_k, x.batch, x.k.shape[1])
    for i in range(x.batch):
        rows = slice(q_starts[i], q_starts[i] + q_lens[i])
        if x.cu_seqlens_q is None:
            q, o, s = x.q[i, rows], out[i, rows], lse[i, :, rows]
        else:
            q, o, s = x.q[rows], out[rows], lse[:, rows]
        yield _Sequences(
            q.unsqueeze(0), o.unsqueeze(0), s.unsqueeze(0), k_lens[i], _keys_of(x, i, k_starts[i], k_lens[i])
        )


def _dense_keys(x: Inputs) -> bool:
    return x.page_table is None and x.cu_seqlens_k is None and x.seqused_k is None


def _spans(
    offsets: torch.Tensor | None, used: torch.Tensor | None, batch: int, capacity: int
) -> tuple[list[int], list[int]]:
    """Where each sequence starts in a ragged tensor (0 in any other), and how many tokens of it count."""
    starts, lens = [0] * batch, [capacity] * batch
    if offsets is not None:
        ends = offsets.tolist()
        starts, lens = ends[:-1], [b - a for a, b in pairwise(ends)]
    return starts, lens if used is None else used.tolist()


def _keys_of(x: Inputs, i: int, start: int, length: int) -> KeysOf:
    """The keys of sequence i, whatever the layout; nothing past `length` can be reached."""
    if x.page_table is not None:
        return _keys_in_pages(x.k, x.v, x.page_table[i])
    if x.cu_seqlens_k is not None:
        rows = slice(start, start + length)
        return _keys_between(x.k[rows].unsqueeze(0), x.v[rows].unsqueeze(0))
    return _keys_between(x.k[i : i + 1, :length], x.v[i : i + 1, :length])


def _keys_between(k: torch.Tensor, v: torch.Tensor) -> KeysOf:
    return lambda start, end: (_with_rows(k[:, start:end]), _with_rows(v[:, start:end]))


def _with_rows(t: torch.Tensor) -> torch.Tensor:
    """t, copied where its tokens overlap (stride 0, say): a BLAS takes no row stride below the width."""
    return t if t.shape[1] < 2 or t.stride(1) >= t.shape[-1] else t.contiguous()


def _keys_in_pages(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> KeysOf:
    """Gather the pages that hold the asked keys; no other entry of the table is read."""
    size = k.shape[1]

    def between(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = table[start // size : -(-end // size)]
        tokens = slice(start % size, start % size + end - start)
        return (
            k.index_select(0, pages).flatten(0, 1)[tokens].unsqueeze(0),
            v.index_select(0, pages).flatten(0, 1)[tokens].unsqueeze(0),
        )

    return between


def _state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One kernel call: q (n, heads, rows, d), k (n, hk, e, d), v (n, hk, e, dv), seen bool (rows, e).

    Returns:
        out (n, heads, rows, dv) in q's dtype and LSE (n, heads, rows) in float32; 0 and -inf for a row that
        sees none of these keys.
    """
    d, dv = q.shape[-1], v.shape[-1]
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, _NEG_INF)
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if seen is not None:
        lse = lse.masked_fill(~seen.any(1), _NEG_INF)
    return out[..., :dv], lse


def _decode(plan: Plan, q: torch.Tensor, scale: float, s: _Sequences, band: Band) -> None:
    """Few queries: the group folded into rows, splits merged by their LSE at float32."""
    first, last = band.rows()
    q = q[:, first:last]
    states = _split_states(plan, q, scale, s, band)
    merged, total = _merge_all(*next(states))
    for state in states:  # one call's states at a time, so that few are held at once
        merged = merged.float()
        _merge_into(merged, total, _merge_all(*state))
    hk, positions = merged.shape[1], last - first
    heads, rows = (hk, q.shape[2] // hk), (positions, q.shape[2] // hk)
    s.out[:, first:last].unflatten(2, heads).copy_(merged.unflatten(2, rows).transpose(1, 2))
    s.lse[:, :, first:last].unflatten(1, heads).copy_(total.unflatten(2, rows).transpose(2, 3))


def _split_states(
    plan: Plan, q: torch.Tensor, scale: float, s: _Sequences, band: Band
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The states of q (n, positions, h, d): out (splits, n, hk, rows, dv) and LSE (splits, n, hk, rows)."""
    first, last = band.rows()
    start, end = band.keys(first, last)
    extent = _extent(plan, end - start)
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
    out, lse = _state(folded, k.transpose(1, 2), v.transpose(1, 2), scale, seen)
    dim = 1 if count > 1 else 0
    return out.unsqueeze(dim), lse.unsqueeze(dim)


def _extent(plan: Plan, keys: int) -> int:
    """Keys of one split of a sequence of which `keys` are visible."""
    return plan.block_n or max(1, -(-keys // plan.num_splits))


def _full_splits(band: Band, start: int, end: int, extent: int, most: int) -> int:
    """How many whole splits from `start` on one call can take: visible to every query, `most` at most."""
    first, last = band.rows()
    if band.right >= 0:
        end = min(end, first + band.diagonal + band.right + 1)
    if not band.is_full(first, last, start, start + 1):
        return 0
    return max(0, min((end - start) // extent, most))


def _prefill(plan: Plan, q: torch.Tensor, scale: float, s: _Sequences, band: Band) -> None:
    """Many queries: the kernel's own blocks, over pieces that need no mask or a small one."""
    first, last = band.rows()
    start, end = band.keys(first, last)
    extent = _extent(plan, end - start)
    splits = [(a, min(a + extent, end)) for a in range(start, end, extent)]
    work = [list(band.pieces(plan.block_m, a, b)) for a, b in splits]
    depth = _depth([piece for pieces in work for piece in pieces])
    # Two states merge into the output's own dtype with a single rounding; more would round again and again.
    acc = s.out if depth <= 2 else torch.zeros(s.out.shape, dtype=torch.float32)
    if depth > 1:
        acc[:, first:last] = 0
        s.lse[:, :, first:last] = _NEG_INF
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
                state = _state(
                    q[:, rows, heads].transpose(1, 2),
                    k[:, kv_heads, keys],
                    v[:, kv_heads, keys],
                    scale,
                    seen,
                    piece.kind == "causal",
                )
                held = acc[:, rows, heads].transpose(1, 2), s.lse[:, heads, rows]
                if depth > 1:
                    _merge_into(*held, state)
                else:
                    held[0].copy_(state[0])
                    held[1].copy_(state[1])
        del k, v  # gathered pages must not outlive their split
    if acc is not s.out:
        s.out[:, first:last] = acc[:, first:last]


def _depth(pieces: list[Piece]) -> int:
    """The largest number of pieces that any one query is part of."""
    return max(sum(p.first <= row < p.last for p in pieces) for row in {p.first for p in pieces})


def _merge_all(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states along the first dimension, at float32; a single one stays as it is."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    total = torch.logsumexp(lse, 0)
    return (out * torch.exp(lse - total).unsqueeze(-1)).sum(0), total


def _merge_into(out: torch.Tensor, lse: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Merge a state (out (n, heads, rows, dv), LSE (n, heads, rows)) into the one held, at float32."""
    new_out, new_lse = state
    total = torch.logaddexp(lse, new_lse)
    base = total.masked_fill(total == _NEG_INF, 0.0)  # neither saw a key: exp(-inf + inf) would be NaN
    held = out * torch.exp(lse - base).unsqueeze(-1)
    out.copy_(held.addcmul_(new_out.float(), torch.exp(new_lse - base).unsqueeze(-1)))
    lse.copy_(total)
