"""The append on a CPU: new keys, rotated, and values into a cache in place, and the rotation of q and keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from headfold.append import AppendInputs


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x rotated by the angles of its positions, at float32, rounded once to x's dtype. A new tensor.

    Args:
        x: (..., h, d); columns from rotary_dim on stay as they are.
        cos, sin: (max_len, rotary_dim / 2).
        positions: x's shape without (h, d), any integers; a position that cos does not have gives NaN.
        interleaved: columns (0, 1), (2, 3) ... are pairs; else i and i + rotary_dim / 2.
    """
    known = ((positions >= 0) & (positions < cos.shape[0])).unsqueeze(-1)
    row = positions.clamp(0, cos.shape[0] - 1).long()
    c, s = (t[row].float().masked_fill_(~known, float("nan")).unsqueeze(-2) for t in (cos, sin))
    half = cos.shape[1]
    if interleaved:
        lower, upper = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        lower, upper = slice(0, half), slice(half, 2 * half)
    a, b = x[..., lower].float(), x[..., upper].float()
    out = x.clone()
    out[..., lower] = a * c - b * s
    out[..., upper] = b * c + a * s
    return out


def append_on_cpu(x: AppendInputs) -> torch.Tensor:
    """Append checked inputs; the lengths after it. All tokens of the batch at once."""
    sequences = torch.arange(x.batch)
    if x.cu_seqlens_k_new is None:
        counts, offsets = torch.full_like(sequences, x.k.shape[1]), sequences * x.k.shape[1]
        k, v = x.k.flatten(0, 1), x.v.flatten(0, 1)
    else:
        counts, offsets = x.cu_seqlens_k_new.long().diff(), x.cu_seqlens_k_new[:-1]
        k, v = x.k, x.v
    start = torch.zeros_like(counts) if x.cache_seqlens is None else x.cache_seqlens.long()
    slot = sequences if x.cache_batch_idx is None else x.cache_batch_idx.long()
    there = (slot >= 0) & (slot < x.cache_rows)
    lengths = (start.clamp(max=x.capacity) + counts).clamp(0, x.capacity) * there

    seq = sequences.repeat_interleave(counts)
    token = torch.arange(seq.shape[0]) - (counts.cumsum(0) - counts)[seq]
    place = start[seq] + token
    fits = there[seq] & (place >= 0) & (place < x.capacity)
    seq, token, place = seq[fits], token[fits], place[fits]
    row, spot = slot[seq], place
    if x.page_table is not None:
        pages, size = x.k_cache.shape[:2]
        row, spot = x.page_table[row, place // size].long(), place % size
        fits = (row >= 0) & (row < pages)
        seq, token, place, row, spot = (t[fits] for t in (seq, token, place, row, spot))
    k, v = (t.index_select(0, offsets[seq] + token) for t in (k, v))
    if x.rotary_cos is not None and x.rotary_sin is not None:
        positions = place if x.rotary_seqlens is None else x.rotary_seqlens[seq] + token
        k = rotate(k, x.rotary_cos, x.rotary_sin, positions, x.rotary_interleaved)
    x.k_cache[row, spot] = k
    x.v_cache[row, spot] = v
    return lengths.int()


def rotated_queries(x: AppendInputs) -> torch.Tensor:
    """q of checked inputs, which hold angles too, rotated: a contiguous tensor of its shape."""
    assert x.q is not None
    assert x.rotary_cos is not None
    assert x.rotary_sin is not None
    at = x.cache_seqlens if x.rotary_seqlens is None else x.rotary_seqlens
    first = torch.zeros(x.batch, dtype=torch.long) if at is None else at.long()
    if x.cu_seqlens_q is None:
        steps = torch.arange(x.q.shape[1])
        positions = first.unsqueeze(1) + steps * int(x.rotary_advances)
    else:
        # Rows of no sequence are nobody's: they stay where they are.
        counts = x.cu_seqlens_q.long().diff()
        seq = torch.arange(x.batch).repeat_interleave(counts)
        steps = torch.arange(seq.shape[0]) - x.cu_seqlens_q[:-1].long()[seq]
        positions = torch.zeros(x.q.shape[0], dtype=torch.long)
        positions[: seq.shape[0]] = first[seq] + steps * int(x.rotary_advances)
    return rotate(x.q, x.rotary_cos, x.rotary_sin, positions, x.rotary_interleaved).contiguous()
