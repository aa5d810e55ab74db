"""Merge the states of decode tiles, some programs a row, in a kernel that starts while the decode kernel ends.

On an H200 over the decode kernel alone: 1.5 to 2.2 us. The last program of a tile to arrive takes 2.6 us for 16 states of
4 x 128 and 16 for 64 of 8 x 256, and its code costs the decode kernel registers.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.schedule import count_blocks, look_up, place_of, range_of
from headfold.kernels.parts.spans import find_sequence
from headfold.kernels.parts.states import add_states, finish_row
from headfold.kernels.specialize import MERGE_ARGUMENTS


@triton.jit(do_not_specialize=MERGE_ARGUMENTS)
def merge_kernel(
    Out: tl.int64,
    Lse: tl.int64,
    cu_seqlens_q: tl.int64,
    cu_seqlens_k: tl.int64,
    seqused_q: tl.int64,
    seqused_k: tl.int64,
    cache_leftpad: tl.int64,
    sq_capacity: tl.int32,
    sk_capacity: tl.int32,
    grown: tl.int32,
    room: tl.int32,
    batch: tl.int32,
    tiles_per_sequence: tl.int32,
    units: tl.int32,
    units_magic: tl.uint32,
    units_shift: tl.uint32,
    lanes: tl.int32,
    lanes_magic: tl.uint32,
    lanes_shift: tl.uint32,
    splits: tl.int32,
    ranges: tl.int32,
    even_ranges: tl.int32,
    gap: tl.int32,
    extent: tl.int32,
    extent_blocks: tl.int32,
    states: tl.int64,
    state_lses: tl.int64,
    state_width: tl.int32,
    state_rows: tl.int32,
    fold: tl.int32,
    fold_magic: tl.uint32,
    fold_shift: tl.uint32,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    out_stride_h: tl.int64,
    lse_stride_b: tl.int64,
    lse_stride_s: tl.int64,
    lse_stride_h: tl.int64,
    window_left: tl.int32,
    window_right: tl.int32,
    bottom_right: tl.int32,
    chunk: tl.int32,
    ELEMENT: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    EARLY: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
):
    """Grid: (lanes of all sequences or packed tiles, programs of a tile x parts of WIDTH columns of a row).

    Arguments are those of `decode_kernel`. States are merged STATES at a time, in the order of their keys: the sums
    depend on nothing but how many there are.

    EARLY: launched while the decode kernel runs, and waits for its end here; the next call may be launched meanwhile.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item = divide(tl.program_id(0), (lanes_magic, lanes_shift))
    lane = tl.program_id(0) - item * lanes
    tile = divide(lane, (units_magic, units_shift))
    unit = lane - tile * units
    lengths = (
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_q,
        seqused_k,
        cache_leftpad,
        sq_capacity,
        sk_capacity,
        grown,
        room,
    )
    band = (bottom_right, window_left, window_right, chunk)
    extents = (extent, extent_blocks)
    folds = (fold, fold_magic, fold_shift)
    seq = item
    if tiles_per_sequence == 0:
        seq, tile = find_sequence(item, cu_seqlens_q, batch, fold, BLOCK_M)
    first_row = tile * BLOCK_M
    q_first, sq, _, _, _, _, low, high = look_up(seq, first_row, lengths, folds, band, BLOCK_M, True)
    rows = tl.minimum(sq * fold - first_row, BLOCK_M)
    blocks = count_blocks(low, high, extent, extent_blocks, BLOCK_N)
    first_state = item * splits
    step = 1
    n = tl.minimum(splits, blocks)
    if extent > 0:
        n = tl.cdiv(blocks, extent_blocks)
    elif ranges > 0:
        sequences = (batch, lengths, folds, band, extents)
        cuts = (gap, ranges, even_ranges)
        start, total, ranges = place_of(item, first_row, sequences, cuts, BLOCK_M, BLOCK_N, True)
        quotient = total // ranges
        rest = total - quotient * ranges
        first_range = range_of(start, quotient, rest)
        n = range_of(start + blocks - 1, quotient, rest) - first_range + 1
        first_state = 2 * first_range + 1
        step = 2
    if EARLY:
        # By every program: else this kernel could end before the one that it waits for.
        tl.extra.cuda.gdc_wait()
    columns: tl.constexpr = (HEAD_DIM_V + WIDTH - 1) // WIDTH
    column = tl.program_id(1) % columns * WIDTH + tl.arange(0, WIDTH)
    if n <= 1:
        rows = 0  # the tile's one program has stored it
    for row in range(tl.program_id(1) // columns, rows, tl.num_programs(1) // columns):
        acc = tl.zeros([WIDTH], tl.float32)
        top = float("-inf")
        total = 0.0
        for s0 in range(0, n, STATES):
            s = s0 + tl.arange(0, STATES)
            # The first state of a tile lies one place before where the step would put it.
            state = first_state + s * step - tl.where((s > 0) & (step > 1), 1, 0)
            at = (state * lanes + lane).to(tl.int64) * state_rows + row
            acc, top, total = add_states(
                (acc, top, total),
                states,
                state_lses,
                at * aligned(state_width, 8),
                at,
                s < n,
                column,
                HEAD_DIM_V,
            )
        result, lse = finish_row((acc, top, total))
        position = divide(first_row + row, (fold_magic, fold_shift))
        head = unit * fold + first_row + row - position * fold
        position = (q_first + position).to(tl.int64)
        at = seq.to(tl.int64) * aligned(out_stride_b, ALIGN) + position * aligned(out_stride_s, ALIGN)
        at += head.to(tl.int64) * aligned(out_stride_h, ALIGN)
        tl.store(pointer(Out, ELEMENT, ALIGN) + at + column, result.to(ELEMENT), mask=column < HEAD_DIM_V)
        at = seq.to(tl.int64) * lse_stride_b + position * lse_stride_s + head.to(tl.int64) * lse_stride_h
        tl.store(pointer(Lse, tl.float32, 1) + at, lse)
