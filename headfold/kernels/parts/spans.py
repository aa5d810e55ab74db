"""Spans: which rows of q and which keys belong to a sequence, and which of them a tile touches."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(tile, cu_seqlens_q, batch, fold, BLOCK_M: tl.constexpr):
    """The sequence a tile of a ragged batch belongs to, and the tile's number in it.

    Sequence i owns the tiles from cu_seqlens_q[i] * fold // BLOCK_M + i on: at least as many as it needs, and
    total_q * fold // BLOCK_M + batch altogether, a bound the host knows without reading a length.
    """
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(cu_seqlens_q + middle).to(tl.int64) * fold // BLOCK_M + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(cu_seqlens_q + low).to(tl.int64) * fold // BLOCK_M + low
    return low, (tile - start).to(tl.int32)


@triton.jit
def sequence_span(seq, cu_seqlens, seqused, capacity, stride_batch, stride_row):
    """Offset of a sequence's first row (int64 elements) and its length, whatever the layout."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + seq)
        length = tl.load(cu_seqlens + seq + 1) - first
        offset = first.to(tl.int64) * stride_row
    else:
        length = capacity
        offset = seq.to(tl.int64) * stride_batch
    if seqused is not None:
        length = tl.load(seqused + seq)
    return offset, length


@triton.jit
def visible_keys(position, shift, window_left, window_right, chunk, sk, CHUNKED: tl.constexpr):
    """Half-open range [low, high) of keys that a query position sees. Works on scalars and tensors.

    An open side comes as 2**30, which is above any length, so one kernel serves every mask of this kind. Both
    ends never decrease with the position: a tile's keys follow from its first and last row.
    """
    low = tl.maximum(position + shift - window_left, 0)
    high = tl.minimum(position + shift + window_right + 1, sk)
    if CHUNKED:
        # A query before the first key has no chunk that a key could share.
        start = tl.maximum(position + shift, 0) // chunk * chunk
        low = tl.maximum(low, start)
        high = tl.where(position + shift < 0, 0, tl.minimum(high, start + chunk))
    return low, high
