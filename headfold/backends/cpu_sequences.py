"""The batch as the CPU backend walks it: runs of sequences of equal lengths, with their keys where they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from headfold.backends.cpu_append import rotate
from headfold.backends.cpu_states import NEG_INF
from headfold.planner.plan import Plan
from headfold.problem import Inputs

# (start, end) -> those keys and values, (n, end - start, hk, d) and (n, end - start, hk, dv)
KeysOf = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(slots=True)
class Sequences:
    """n sequences of equal lengths: q (n, sq, h, d), out (n, sq, h, dv), lse (n, h, sq), and their keys.

    `batch` are their places in the batch; key 0 is the first one that counts.
    """

    batch: slice
    q: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    sk: int
    keys: KeysOf


def split_extent(plan: Plan, keys: int) -> int:
    """Keys of one split of a sequence of which `keys` are visible."""
    return plan.block_n or max(1, -(-keys // plan.num_splits))


def sequences(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Iterator[Sequences]:
    """Cut the batch into runs of sequences that one call can take."""
    if x.cu_seqlens_q is None and x.seqused_q is None and _dense_keys(x):
        step = plan.num_stages if plan.num_splits == 1 else 1
        for i in range(0, x.batch, step):
            run_of = slice(i, i + step)
            q = _rotated(x, x.q[run_of], run_of)
            keys = _keys_between(x.k[run_of], x.v[run_of])
            yield Sequences(run_of, q, out[run_of], lse[run_of], x.k.shape[1], keys)
        return
    if x.cu_seqlens_q is not None or x.seqused_q is not None:
        # Rows of no sequence are undefined; zeros keep NaN from an uninitialised buffer out of later sums.
        out.zero_()
        lse.fill_(NEG_INF)
    q_starts, q_lens = _spans(x.cu_seqlens_q, x.seqused_q, x.batch, x.q.shape[1])
    k_starts, k_ends = _spans(x.cu_seqlens_k, x.seqused_k, x.batch, x.k.shape[1])
    places = list(range(x.batch)) if x.cache_batch_idx is None else x.cache_batch_idx.tolist()
    pads = [0] * x.batch if x.cache_leftpad is None else x.cache_leftpad.tolist()
    for i in range(x.batch):
        rows = slice(q_starts[i], q_starts[i] + q_lens[i])
        if x.cu_seqlens_q is None:
            q, o, s = x.q[i, rows], out[i, rows], lse[i, :, rows]
        else:
            q, o, s = x.q[rows], out[rows], lse[:, rows]
        one = slice(i, i + 1)
        keys = _keys_of(x, places[i], k_starts[i], pads[i], k_ends[i])
        length = max(0, k_ends[i] - pads[i])
        yield Sequences(one, _rotated(x, q.unsqueeze(0), one), o.unsqueeze(0), s.unsqueeze(0), length, keys)


def _rotated(x: Inputs, q: torch.Tensor, batch: slice) -> torch.Tensor:
    """q (n, sq, h, d) of those sequences under rotary position embedding; q itself where none was given."""
    if x.rotary_cos is None or x.rotary_sin is None or x.rotary_positions is None:
        return q
    steps = torch.arange(q.shape[1]) * int(x.rotary_advances)
    positions = x.rotary_positions[batch].unsqueeze(1) + steps
    return rotate(q, x.rotary_cos, x.rotary_sin, positions, x.rotary_interleaved)


def _dense_keys(x: Inputs) -> bool:
    plain = x.page_table is None and x.cu_seqlens_k is None and x.seqused_k is None
    return plain and x.cache_batch_idx is None and x.cache_leftpad is None


def _spans(
    offsets: torch.Tensor | None, used: torch.Tensor | None, batch: int, capacity: int
) -> tuple[list[int], list[int]]:
    """Where each sequence starts in a ragged tensor (0 in any other), and how many tokens of it count."""
    starts, lens = [0] * batch, [capacity] * batch
    if offsets is not None:
        ends = offsets.tolist()
        starts, lens = ends[:-1], [b - a for a, b in pairwise(ends)]
    return starts, lens if used is None else used.tolist()


def _keys_of(x: Inputs, place: int, start: int, pad: int, end: int) -> KeysOf:
    """The keys pad..end-1 of one sequence, whatever the layout; nothing else can be reached.

    Args:
        place: its row of a dense cache or of the page table.
        start: where it begins in ragged keys.
    """
    if x.page_table is not None:
        return _keys_in_pages(x.k, x.v, x.page_table[place], pad)
    if x.cu_seqlens_k is not None:
        rows = slice(start + pad, start + max(pad, end))
        return _keys_between(x.k[rows].unsqueeze(0), x.v[rows].unsqueeze(0))
    one, tokens = slice(place, place + 1), slice(pad, max(pad, end))
    return _keys_between(x.k[one, tokens], x.v[one, tokens])


def _keys_between(k: torch.Tensor, v: torch.Tensor) -> KeysOf:
    return lambda start, end: (_with_rows(k[:, start:end]), _with_rows(v[:, start:end]))


def _with_rows(t: torch.Tensor) -> torch.Tensor:
    """t, copied where its tokens overlap (stride 0, say): a BLAS takes no row stride below the width."""
    return t if t.shape[1] < 2 or t.stride(1) >= t.shape[-1] else t.contiguous()


def _keys_in_pages(k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, pad: int) -> KeysOf:
    """Gather the pages that hold the asked keys; no other entry of the table is read."""
    size = k.shape[1]

    def between(start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        first, last = start + pad, end + pad
        pages = table[first // size : -(-last // size)]
        tokens = slice(first % size, first % size + end - start)
        return (
            k.index_select(0, pages).flatten(0, 1)[tokens].unsqueeze(0),
            v.index_select(0, pages).flatten(0, 1)[tokens].unsqueeze(0),
        )

    return between
