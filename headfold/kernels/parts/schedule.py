"""The schedule of a decode: which blocks of which sequences a program owns, from the lengths that lie on the device.

The sequences of a batch are a list, and a sequence is as long as it has blocks that a tile sees. Ranges cut the list
into shares that differ by at most one block; all heads of a range run side by side, so that the heads of a token,
which are neighbours in memory, are read together. Every program computes its own range, in 32-bit arithmetic:
nothing is prepared, and a captured graph may change the lengths. The same formulas in PyTorch: planner/schedule.py.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import load_index
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.spans import sequence_span
from headfold.kernels.parts.tile import tile_keys

# Sequences that a program looks at at a time.
CHUNK: tl.constexpr = tl.constexpr(128)
# As many as a warp has lanes: each warp looks at them all, and none waits for another.
FEW: tl.constexpr = tl.constexpr(32)


@triton.jit
def look_up(seq, first_row, lengths, fold, band, BLOCK_M: tl.constexpr, FEATURED: tl.constexpr):
    """Where sequences lie and what a tile sees of them; seq is one sequence or a vector of them.

    fold is (fold, its magic, its shift), here and below, as `divide` takes the last two.
    lengths is (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, cache_leftpad, sq_capacity, sk_capacity, grown, room),
    the first five addresses; keys are `grown` more than those say, and at most `room`. band is (bottom_right,
    window_left, window_right, chunk). Returns (first row of q, rows, first key, padding before it, keys, how far the
    diagonal is moved, first and end of the keys that the tile sees).
    """
    q_first, sq = sequence_span(seq, lengths[0], lengths[2], lengths[5])
    k_first, sk = sequence_span(seq, lengths[1], lengths[3], lengths[6])
    pad = 0
    if FEATURED:
        pad = load_index(lengths[4], seq, 0)
    sk = tl.minimum(tl.minimum(sk, lengths[8]) + lengths[7], lengths[8])
    sk = tl.maximum(sk - pad, 0)
    shift = (sk - sq) * band[0]
    by_fold = (fold[1], fold[2])
    last_row = tl.maximum(tl.minimum(first_row + BLOCK_M, sq * fold[0]) - 1, 0)
    low, high, full_low, full_high = tile_keys(
        divide(first_row, by_fold), divide(last_row, by_fold), sk, shift, band[1], band[2], band[3], FEATURED
    )
    return q_first, sq, k_first, pad, sk, shift, low, tl.maximum(high, low)


@triton.jit
def count_blocks(low, high, extent, extent_blocks, BLOCK_N: tl.constexpr):
    """Blocks of keys low..high, at least 1: a tile that sees no key has a result too.

    extent > 0 are fixed extents: the keys from i * extent on are extent i, which is cut nowhere and stands for
    extent_blocks blocks, the last one for those that it has.
    """
    blocks = tl.cdiv(high - low, BLOCK_N)
    if extent > 0:
        last = tl.maximum(high - 1, 0) // extent
        blocks = (last - low // extent) * extent_blocks + tl.cdiv(high - last * extent, BLOCK_N)
    return tl.where(high > low, tl.maximum(blocks, 1), 1)


@triton.jit
def list_costs(
    first,
    first_row,
    sequences,
    gap,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FEATURED: tl.constexpr,
    MANY: tl.constexpr,
):
    """(costs, blocks, numbers) of MANY sequences from `first` on: the blocks and the gap, 0 where the tile is not there.

    sequences is (how many, lengths, fold, band as `look_up` takes them, extents as `count_blocks` takes them), below too.
    """
    batch, lengths, fold, band, extents = sequences
    i = first + tl.arange(0, MANY)
    _, sq, _, _, _, _, low, high = look_up(
        tl.minimum(i, batch - 1), first_row, lengths, fold, band, BLOCK_M, FEATURED
    )
    blocks = count_blocks(low, high, extents[0], extents[1], BLOCK_N)
    live = (i < batch) & (first_row < sq * fold[0])
    return tl.where(live, blocks + gap, 0), tl.where(live, blocks, 0), i


@triton.jit
def list_length(
    first_row, sequences, cuts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """(length of the list, gap behind each sequence, ranges that it is cut into).

    cuts is (gap, ranges, even_ranges). The gap is what the start of a sequence costs, in blocks. Equal sequences get none,
    and even_ranges, which divide the batch evenly: they are cut between sequences or into equal parts.
    """
    batch = sequences[0]
    gap, ranges, even_ranges = cuts
    total = 0
    count = 0
    least = 2147483647
    most = 0
    for first in range(0, batch, CHUNK):
        _, blocks, i = list_costs(first, first_row, sequences, 0, BLOCK_M, BLOCK_N, FEATURED, CHUNK)
        total += tl.sum(blocks, 0)
        count += tl.sum((blocks > 0).to(tl.int32), 0)
        least = tl.minimum(least, tl.min(tl.where(i < batch, blocks, 2147483647), 0))
        most = tl.maximum(most, tl.max(blocks, 0))
    gap = tl.where(least == most, 0, gap)
    return total + count * gap, gap, tl.where(least == most, even_ranges, ranges)


@triton.jit
def find_position(
    x, first_row, sequences, gap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """(sequence that holds position x of the list, position where it starts)."""
    batch = sequences[0]
    seq = 0
    start = 0
    base = 0
    for first in range(0, batch, CHUNK):
        costs, _, i = list_costs(first, first_row, sequences, gap, BLOCK_M, BLOCK_N, FEATURED, CHUNK)
        ends = base + tl.cumsum(costs, 0)
        before = (ends <= x) & (i < batch)
        seq += tl.sum(before.to(tl.int32), 0)
        start = tl.maximum(start, tl.max(tl.where(before, ends, 0), 0))
        base = tl.max(ends, 0)
    return seq, start


@triton.jit
def start_of(
    seq, first_row, sequences, gap, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """Position where a sequence starts in the list."""
    start = 0
    for first in range(0, seq, CHUNK):
        costs, _, i = list_costs(first, first_row, sequences, gap, BLOCK_M, BLOCK_N, FEATURED, CHUNK)
        start += tl.sum(tl.where(i < seq, costs, 0), 0)
    return start


@triton.jit
def list_of_few(
    first_row, sequences, cuts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """What `list_length` says, of at most FEW sequences, looked at once; before it their costs and their numbers."""
    gap, ranges, even_ranges = cuts
    _, blocks, i = list_costs(0, first_row, sequences, 0, BLOCK_M, BLOCK_N, FEATURED, FEW)
    least = tl.min(tl.where(i < sequences[0], blocks, 2147483647), 0)
    even = least == tl.max(blocks, 0)
    gap = tl.where(even, 0, gap)
    costs = blocks + tl.where(blocks > 0, gap, 0)
    return costs, i, tl.sum(costs, 0), gap, tl.where(even, even_ranges, ranges)


@triton.jit
def find_range(
    r, first_row, sequences, cuts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """(first position of range r, its end, sequence that holds the first, where that starts, gap)."""
    seq = 0
    start = 0
    if sequences[0] <= FEW:
        costs, i, total, gap, used = list_of_few(first_row, sequences, cuts, BLOCK_M, BLOCK_N, FEATURED)
        x, x_end = ends_of(r, total, used)
        ends = tl.cumsum(costs, 0)
        before = (ends <= x) & (i < sequences[0])
        seq = tl.sum(before.to(tl.int32), 0)
        start = tl.max(tl.where(before, ends, 0), 0)
    else:
        total, gap, used = list_length(first_row, sequences, cuts, BLOCK_M, BLOCK_N, FEATURED)
        x, x_end = ends_of(r, total, used)
        if x < x_end:
            seq, start = find_position(x, first_row, sequences, gap, BLOCK_M, BLOCK_N, FEATURED)
    return x, x_end, seq, start, gap


@triton.jit
def place_of(
    item, first_row, sequences, cuts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FEATURED: tl.constexpr
):
    """(position where a sequence starts, length of the list, ranges that it is cut into)."""
    if sequences[0] <= FEW:
        costs, i, total, gap, used = list_of_few(first_row, sequences, cuts, BLOCK_M, BLOCK_N, FEATURED)
        start = tl.sum(tl.where(i < item, costs, 0), 0)
    else:
        total, gap, used = list_length(first_row, sequences, cuts, BLOCK_M, BLOCK_N, FEATURED)
        start = start_of(item, first_row, sequences, gap, BLOCK_M, BLOCK_N, FEATURED)
    return start, total, used


@triton.jit
def range_start(r, quotient, rest):
    """First position of range r, where the first `rest` ranges are one position longer than the others."""
    return r * quotient + tl.minimum(r, rest)


@triton.jit
def ends_of(r, total, used):
    """(first position of range r of `used`, its end); beyond those used ranges are empty and lie where the list ends."""
    quotient = total // used
    rest = total - quotient * used
    first = range_start(tl.minimum(r, used), quotient, rest)
    return first, range_start(tl.minimum(r + 1, used), quotient, rest)


@triton.jit
def range_of(x, quotient, rest):
    """The range that holds position x: the inverse of range_start."""
    longer = rest * (quotient + 1)
    before = x < longer
    return tl.where(before, 0, rest) + tl.where(before, x, x - longer) // tl.where(
        before, quotient + 1, tl.maximum(quotient, 1)
    )


@triton.jit
def nearest_extent(block, blocks, extent_blocks):
    """The end of an extent that lies nearest to a cut, for extents are cut nowhere."""
    at = (block + extent_blocks // 2) // extent_blocks * extent_blocks
    return tl.where(block == blocks, blocks, tl.minimum(at, blocks))


@triton.jit
def share_of(at, r, item, part, blocks, splits, ranges, gap, extents, STREAM: tl.constexpr):
    """What a program does of a tile of `blocks` blocks.

    at is (the program's place in the list, where its share of the list ends, where the tile begins), splits the number of
    splits and its magic and shift, extents as count_blocks takes them. Returns (first block, end of the blocks, states
    that the tile has, more than 1 for any number of them, number of the program's first state, states that it makes, where
    the next tile begins).
    """
    x, x_end, start = at
    extent, extent_blocks = extents
    own_state = r
    n = tl.minimum(splits[0], blocks)
    share = divide(blocks, (splits[1], splits[2]))
    longer = blocks - share * splits[0]
    begin = part * share + tl.minimum(part, longer)
    end = begin + share + (part < longer).to(tl.int32)
    next_start = 1
    pieces = 1
    if extent > 0:
        n = tl.cdiv(blocks, extent_blocks)
        begin = tl.minimum(part * extent_blocks, blocks)
        end = tl.minimum(begin + extent_blocks, blocks)
    if STREAM:
        if ranges > 0:
            next_start = start + blocks + tl.where(blocks > 0, gap, 0)
            begin = tl.minimum(x - start, blocks)
            end = tl.minimum(tl.minimum(x_end, next_start) - start, blocks)
            if extent > 0:
                begin = nearest_extent(begin, blocks, extent_blocks)
                end = nearest_extent(end, blocks, extent_blocks)
                pieces = tl.cdiv(end - begin, extent_blocks)
                own_state = item * splits[0] + begin // extent_blocks
            else:
                n = tl.where((begin == 0) & (end == blocks), 1, 2)
                own_state = 2 * r + (begin == 0).to(tl.int32)
    return begin, end, n, own_state, pieces, next_start
