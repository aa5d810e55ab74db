"""What a program of the decode kernel works on: `parts/schedule.py` where a tensor has a layout.

Scalar functions are the same ones. Those over the list of sequences are written again: their tensors need a layout here.
"""

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.spans import EDGE
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.schedule import count_blocks, ends_of, look_up
from headfold.kernels.parts.spans import find_sequence

CHUNK = gl.constexpr(64)  # sequences that a program looks at at a time
FEW = gl.constexpr(32)  # sequences that a program looks at once


@gluon.constexpr_function
def to_each_warp(count):
    """A layout of `count` elements that every warp has: no warp waits for another one's sums."""
    return gl.BlockedLayout([count // 32], [32], [4], [0])


@gluon.jit
def plus(a, b):
    return a + b


@gluon.jit
def list_blocks(
    first,
    first_row,
    batch,
    lengths,
    fold,
    band,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    MANY: gl.constexpr,
    PADDED: gl.constexpr,
):
    """(blocks, numbers) of MANY sequences from `first` on; blocks are 0 where the tile is not there.

    PADDED, below too: lengths[4] says how many keys of each sequence come before its first one.
    """
    i = first + gl.arange(0, MANY, to_each_warp(MANY))
    _, sq, _, _, _, _, low, high = look_up(
        gl.minimum(i, batch - 1), first_row, lengths, fold, band, BLOCK_M, PADDED
    )
    blocks = count_blocks(low, high, 0, 0, BLOCK_N)
    live = (i < batch) & (first_row < sq * fold[0])
    return gl.where(live, blocks, 0), i


@gluon.jit
def least_of(blocks, i, batch):
    """The fewest blocks of a sequence."""
    return gl.min(gl.where(i < batch, blocks, 2147483647), 0)


@gluon.jit
def count_before(x, blocks, i, batch, gap, base):
    """Of sequences that begin at position `base`: (how many lie before position x, where the next one starts, the end)."""
    ends = base + gl.associative_scan(blocks + gl.where(blocks > 0, gap, 0), 0, plus)
    before = (ends <= x) & (i < batch)
    return gl.sum(before.to(gl.int32), 0), gl.max(gl.where(before, ends, 0), 0), gl.max(ends, 0)


@gluon.jit
def list_length(
    blocks,
    i,
    first_row,
    batch,
    lengths,
    fold,
    band,
    gap,
    ranges,
    even_ranges,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PADDED: gl.constexpr,
):
    """(length of the list, gap behind each sequence, ranges that it is cut into).

    `blocks` and `i`, below too, are what `list_blocks` says of the first CHUNK sequences.
    """
    total = gl.sum(blocks, 0)
    count = gl.sum((blocks > 0).to(gl.int32), 0)
    least = least_of(blocks, i, batch)
    most = gl.max(blocks, 0)
    for first in range(CHUNK, batch, CHUNK):
        blocks, i = list_blocks(first, first_row, batch, lengths, fold, band, BLOCK_M, BLOCK_N, CHUNK, PADDED)
        total += gl.sum(blocks, 0)
        count += gl.sum((blocks > 0).to(gl.int32), 0)
        least = gl.minimum(least, least_of(blocks, i, batch))
        most = gl.maximum(most, gl.max(blocks, 0))
    gap = gl.where(least == most, 0, gap)
    return total + count * gap, gap, gl.where(least == most, even_ranges, ranges)


@gluon.jit
def find_position(
    x,
    blocks,
    i,
    first_row,
    batch,
    lengths,
    fold,
    band,
    gap,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PADDED: gl.constexpr,
):
    """(sequence that holds position x of the list, position where it starts)."""
    seq, start, base = count_before(x, blocks, i, batch, gap, 0)
    for first in range(CHUNK, batch, CHUNK):
        blocks, i = list_blocks(first, first_row, batch, lengths, fold, band, BLOCK_M, BLOCK_N, CHUNK, PADDED)
        more, later, base = count_before(x, blocks, i, batch, gap, base)
        seq += more
        start = gl.maximum(start, later)
    return seq, start


@gluon.jit
def find_range(
    r,
    first_row,
    batch,
    lengths,
    fold,
    band,
    gap,
    ranges,
    even_ranges,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """(first position of range r, its end, sequence that holds the first, where that starts, gap)."""
    if batch <= FEW:
        few, j = list_blocks(0, first_row, batch, lengths, fold, band, BLOCK_M, BLOCK_N, FEW, False)
        even = least_of(few, j, batch) == gl.max(few, 0)
        gap = gl.where(even, 0, gap)
        used = gl.where(even, even_ranges, ranges)
        x, x_end = ends_of(r, gl.sum(few + gl.where(few > 0, gap, 0), 0), used)
        item, start, _ = count_before(x, few, j, batch, gap, 0)
    else:
        blocks, i = list_blocks(0, first_row, batch, lengths, fold, band, BLOCK_M, BLOCK_N, CHUNK, False)
        total, gap, used = list_length(
            blocks, i, first_row, batch, lengths, fold, band, gap, ranges, even_ranges, BLOCK_M, BLOCK_N, False
        )  # fmt: skip
        x, x_end = ends_of(r, total, used)
        item, start = find_position(
            x, blocks, i, first_row, batch, lengths, fold, band, gap, BLOCK_M, BLOCK_N, False
        )
    return x, x_end, item, start, gap


@gluon.jit
def share(
    x, x_end, item, start, gap, work, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, PADDED: gl.constexpr
):
    """What a program owns of the sequence (or packed tile) `item`, as decode_kernel of the Triton kernels has it.

    Returns (sequence, first row of the tile, its span, first key of its blocks, first block, end, position of the next
    sequence, whether others own blocks of this tile too, number of the state). The span is what `look_up` returns. Blocks
    begin at a multiple of EDGE keys, as boxes of pages must; the last block's owner has one more where that adds one.
    """
    r, part, lane_tile, lengths, fold, band, batch, splits, splits_by, tiles_per_sequence, ranges = work
    seq = item
    tile = lane_tile
    if tiles_per_sequence == 0:
        seq, tile = find_sequence(item, lengths[0], batch, fold[0], BLOCK_M)
    first_row = tile * BLOCK_M
    span = look_up(seq, first_row, lengths, fold, band, BLOCK_M, PADDED)
    key_low = span[6]
    key_high = span[7]
    blocks = 0
    if first_row < span[1] * fold[0]:
        blocks = count_blocks(key_low, key_high, 0, 0, BLOCK_N)
    state = r
    shared = gl.minimum(splits, blocks) > 1
    each = divide(blocks, splits_by)
    longer = blocks - each * splits
    begin = part * each + gl.minimum(part, longer)
    end = begin + each + (part < longer).to(gl.int32)
    next_start = 1
    if ranges > 0:
        next_start = start + blocks + gl.where(blocks > 0, gap, 0)
        begin = gl.minimum(x - start, blocks)
        end = gl.minimum(gl.minimum(x_end, next_start) - start, blocks)
        shared = (begin > 0) | (end < blocks)
        state = 2 * r + (begin == 0).to(gl.int32)
    low = key_low & -EDGE
    if (begin < end) & (end == blocks):
        end = gl.maximum(gl.cdiv(key_high - low, BLOCK_N), blocks)
    return seq, first_row, span, low, begin, end, next_start, shared, state
