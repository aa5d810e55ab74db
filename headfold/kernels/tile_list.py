"""The tiles of a ragged prefill: how many each sequence has, and in which order sequences are worked off."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import pointer
from headfold.kernels.parts.spans import sequence_span

CHUNK: tl.constexpr = tl.constexpr(128)
TILE_LIST_ARGUMENTS = "List cu_seqlens_q cu_seqlens_k seqused_q seqused_k sq sk batch tile_rows".split()


@triton.jit
def look_at(seq, lengths, tile_rows, batch):
    """(tiles, keys) of sequences; 0 and -1 of one without a query, which then comes last."""
    _, rows = sequence_span(tl.minimum(seq, batch - 1), lengths[0], lengths[2], lengths[4])
    _, keys = sequence_span(tl.minimum(seq, batch - 1), lengths[1], lengths[3], lengths[5])
    tiles = tl.where(seq < batch, tl.cdiv(rows, tile_rows), 0)
    return tiles, tl.where(tiles > 0, keys, -1)


@triton.jit(do_not_specialize=TILE_LIST_ARGUMENTS)
def tile_list_kernel(
    List: tl.int64,
    cu_seqlens_q: tl.int64,
    cu_seqlens_k: tl.int64,
    seqused_q: tl.int64,
    seqused_k: tl.int64,
    sq: tl.int32,
    sk: tl.int32,
    batch: tl.int32,
    tile_rows: tl.int32,
):
    """Grid: one program for 128 sequences. Most keys first: what ends a launch should be short.

    List (2 * batch + 1,) int32: the tiles of one head before the first, second ... sequence of that order and of all, then
    the numbers of the sequences in it.
    """
    lengths = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, sq, sk)
    mine = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    _, keys = look_at(mine, lengths, tile_rows, batch)
    rank = tl.zeros([CHUNK], tl.int32)
    before = tl.zeros([CHUNK], tl.int32)
    total = 0
    for first in range(0, batch, CHUNK):
        other = first + tl.arange(0, CHUNK)
        tiles, other_keys = look_at(other, lengths, tile_rows, batch)
        same = other_keys[None, :] == keys[:, None]
        ahead = (other_keys[None, :] > keys[:, None]) | (same & (other[None, :] < mine[:, None]))
        ahead = ahead & (other < batch)[None, :]
        rank += tl.sum(ahead.to(tl.int32), 1)
        before += tl.sum(tl.where(ahead, tiles[None, :], 0), 1)
        total += tl.sum(tiles, 0)
    starts = pointer(List, tl.int32, 1)
    live = mine < batch
    tl.store(starts + rank, before, mask=live)
    tl.store(starts + batch + 1 + rank, mine, mask=live)
    if tl.program_id(0) == 0:
        tl.store(starts + batch, total)
