"""Spans: which rows of q and which keys belong to a sequence, and which of them a tile touches."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import load_index, pointer

# An open window side and no chunk, as the host gives them: above any length, and a sum with one fits 32 bits.
OPEN: tl.constexpr = tl.constexpr(2**30)


@triton.jit
def find_sequence(tile, cu_seqlens_q, batch, fold, BLOCK_M: tl.constexpr):
    """The sequence a tile of a ragged batch belongs to, and the tile's number in it.

    Sequence i owns the tiles from cu_seqlens_q[i] * fold // BLOCK_M + i on: at least as many as it needs, and
    total_q * fold // BLOCK_M + batch altogether, a bound the host knows without reading a length.
    """
    offsets = pointer(cu_seqlens_q, tl.int32, 1)
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        first = tl.load(offsets + middle).to(tl.int64) * fold // BLOCK_M + middle
        if first <= tile:
            low = middle
        else:
            high = middle
    start = tl.load(offsets + low).to(tl.int64) * fold // BLOCK_M + low
    return low, (tile - start).to(tl.int32)


@triton.jit
def find_row(position, cu_seqlens, batch):
    """The sequence that owns a row of a ragged batch, and that sequence's first row. cu_seqlens is a pointer."""
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) <= position:
            low = middle
        else:
            high = middle
    return low, tl.load(cu_seqlens + low)


@triton.jit
def sequence_span(seq, cu_seqlens, seqused, capacity):
    """(a sequence's first row in a ragged tensor, 0 in any other; its length). The tensors are addresses."""
    first = load_index(cu_seqlens, seq, 0)
    length = load_index(cu_seqlens, seq + 1, capacity) - first
    used = load_index(seqused, seq, -1)
    return first, tl.where(seqused != 0, used, length)


@triton.jit
def visible_keys(position, shift, window_left, window_right, chunk, sk, FEATURED: tl.constexpr):
    """Half-open range [low, high) of keys that a query position sees. Works on scalars and tensors.

    An open side comes as OPEN, and so does no chunk: one kernel serves every mask of this kind. Both ends never
    decrease with the position: a tile's keys follow from its first and last row.
    """
    low = tl.maximum(position + shift - window_left, 0)
    high = tl.minimum(position + shift + window_right + 1, sk)
    if FEATURED:
        if chunk < OPEN:
            # A query before the first key has no chunk that a key could share.
            start = tl.maximum(position + shift, 0) // chunk * chunk
            low = tl.maximum(low, start)
            high = tl.where(position + shift < 0, 0, tl.minimum(high, start + chunk))
    return low, high
