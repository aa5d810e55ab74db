"""The schedule that a streamed decode computes on the device, in PyTorch: the same formulas, for any lengths.

A batch is a list of sequences. A sequence is as long as it has blocks that a tile sees, at least 1 (a row without a
key has a result too), and costs `gap` more. Ranges cut the list into shares that differ by one position at most.
All integers; tensors may have any leading dimensions.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from headfold.planner.work import key_span
from headfold.problem import Problem


def tile_keys(p: Problem, fold: int, block_m: int, length: int, tile: int) -> tuple[int, int]:
    """The keys, half-open, that a tile's rows see in a sequence of `length` keys and as many queries as there may be."""
    first = tile * block_m // fold
    last = min((tile + 1) * block_m - 1, p.max_seqlen_q * fold - 1) // fold
    low, high = key_span(replace(p, max_seqlen_k=length), first, last)
    if p.attention_chunk:
        at = max(0, first + (length - p.max_seqlen_q if p.bottom_right else 0))
        low = max(low, at // p.attention_chunk * p.attention_chunk)
    return min(low, high), high


def count_blocks(low: torch.Tensor, high: torch.Tensor, block_n: int, extent: int = 0) -> torch.Tensor:
    """Blocks of keys low..high; with extent > 0 as many as an extent holds for each that is begun, but the last."""
    blocks = -(-(high - low) // block_n)
    if extent:
        last = (high - 1).clamp(min=0) // extent
        blocks = (last - low // extent) * -(-extent // block_n) - (-(high - last * extent) // block_n)
    return torch.where(high > low, blocks.clamp(min=1), 1)


def list_of(blocks: torch.Tensor, gap: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(where each sequence starts in the list (..., batch + 1), the list's length last; the gap in force (..., 1)).

    `blocks` (..., batch) is 0 for a sequence in which the tile has no row; equal sequences have no gap.
    """
    gaps = torch.where((blocks == blocks[..., :1]).all(-1, keepdim=True), 0, gap)
    ends = (blocks + torch.where(blocks > 0, gaps, 0)).cumsum(-1)
    return torch.nn.functional.pad(ends, (1, 0)), gaps


def range_starts(total: torch.Tensor, ranges: int) -> torch.Tensor:
    """First positions (..., ranges + 1) of all ranges of lists of lengths `total` (...), and their ends last."""
    number = torch.arange(ranges + 1)
    return number * (total // ranges)[..., None] + torch.minimum(number, (total % ranges)[..., None])


def range_of(x: torch.Tensor, total: torch.Tensor, ranges: int) -> torch.Tensor:
    """The range that holds position x of a list of length `total`."""
    quotient, rest = total // ranges, total % ranges
    longer = rest * (quotient + 1)
    return torch.where(x < longer, x // (quotient + 1), rest + (x - longer) // quotient.clamp(min=1))


def shares(
    blocks: torch.Tensor, ranges: int, gap: int, extent_blocks: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(first block, end) of what every range owns of every sequence, (..., ranges, batch); equal where it owns nothing.

    With extent_blocks > 0 cuts move to the nearest multiple of it.
    """
    starts, _ = list_of(blocks, gap)
    cuts = range_starts(starts[..., -1], ranges)
    at = (cuts[..., :, None] - starts[..., None, :-1]).clamp(min=0)
    at = torch.minimum(at, blocks[..., None, :])
    if extent_blocks:
        nearest = (at + extent_blocks // 2) // extent_blocks * extent_blocks
        at = torch.where(at == blocks[..., None, :], at, torch.minimum(nearest, blocks[..., None, :]))
    return at[..., :-1, :], at[..., 1:, :]
