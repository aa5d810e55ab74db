"""Merge the states that `hopper_pair_kernel` left: of a row's keys in a shared prefix, and of those that follow it."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.spans import find_row, sequence_span
from headfold.kernels.parts.states import add_states, finish_row

PAIR_MERGE_ARGUMENTS = (
    "Out Lse units units_magic units_shift fold fold_magic fold_shift state_width out_stride_b out_stride_s out_stride_h "
    "lse_stride_b lse_stride_s lse_stride_h cu_seqlens_q sq_capacity lanes_magic lanes_shift bounds groups own_lanes "
    "own_states own_state_lses own_ends own_uncut own_state_rows prefix_lanes prefix_states prefix_state_lses prefix_ends "
    "prefix_uncut prefix_state_rows"
).split()


@triton.jit
def states_of(item, tile, units, of_list):
    """(the first range that has a part of a tile of a list, how many have)."""
    ends, uncut, rows, lanes = of_list
    place = pointer(ends, tl.int32, 1) + 2 * (item * (lanes // units) + tile)
    first = tl.load(place)
    return first, tl.load(place + 1) - first + 1


@triton.jit
def rows_of(s, first, n, item, tile, unit, row, units, of_list):
    """Where states number `s` of a tile's row lie among the states of its list."""
    ends, uncut, rows, lanes = of_list
    # The first range's state of a tile is its second one, the others' their first.
    state = tl.where(n > 1, 2 * (first + s) + tl.where(s == 0, 1, 0), uncut + item)
    return (state * lanes + tile * units + unit).to(tl.int64) * rows + row


@triton.jit(do_not_specialize=PAIR_MERGE_ARGUMENTS)
def pair_merge_kernel(
    Out: tl.int64,
    Lse: tl.int64,
    units: tl.int32,
    units_magic: tl.uint32,
    units_shift: tl.uint32,
    fold: tl.int32,
    fold_magic: tl.uint32,
    fold_shift: tl.uint32,
    state_width: tl.int32,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    out_stride_h: tl.int64,
    lse_stride_b: tl.int64,
    lse_stride_s: tl.int64,
    lse_stride_h: tl.int64,
    cu_seqlens_q: tl.int64,
    sq_capacity: tl.int32,
    lanes_magic: tl.uint32,
    lanes_shift: tl.uint32,
    bounds: tl.int64,
    groups: tl.int32,
    own_lanes: tl.int32,
    own_states: tl.int64,
    own_state_lses: tl.int64,
    own_ends: tl.int64,
    own_uncut: tl.int32,
    own_state_rows: tl.int32,
    prefix_lanes: tl.int32,
    prefix_states: tl.int64,
    prefix_state_lses: tl.int64,
    prefix_ends: tl.int64,
    prefix_uncut: tl.int32,
    prefix_state_rows: tl.int32,
    ELEMENT: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    EARLY: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
):
    """Grid: (lanes of all sequences, programs of a tile, each of which takes rows in turn).

    `bounds` (groups + 1,) are the groups' first queries and the end, `cu_seqlens_q` and `sq_capacity` tell the queries of each
    sequence, and `lanes_magic` and `lanes_shift` divide by own_lanes. The other arguments are those of `hopper_pair_kernel`.
    First come a row's states of its prefix, then its own.

    EARLY: as in `merge_kernel`.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item = divide(tl.program_id(0), (lanes_magic, lanes_shift))
    lane = tl.program_id(0) - item * own_lanes
    tile = divide(lane, (units_magic, units_shift))
    unit = lane - tile * units
    first_row = tile * BLOCK_M
    q_first, sq = sequence_span(item, cu_seqlens_q, item.to(tl.int64) * 0, sq_capacity)
    rows = tl.minimum(sq * fold - first_row, BLOCK_M)
    column = tl.arange(0, WIDTH)
    own = (own_ends, own_uncut, own_state_rows, own_lanes)
    prefix = (prefix_ends, prefix_uncut, prefix_state_rows, prefix_lanes)
    # Both lists' states are read at once, from where those of the prefixes begin.
    own_at = aligned((own_states - prefix_states) // 4, 4)
    own_lses_at = (own_state_lses - prefix_state_lses) // 4
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        own_first, own_n = states_of(item, tile, units, own)
        position = divide(first_row + row, (fold_magic, fold_shift))
        folded = first_row + row - position * fold
        query = q_first + position + (cu_seqlens_q == 0).to(tl.int32) * item * sq_capacity
        group = 0
        group_first = 0
        if groups > 1:
            group, group_first = find_row(query, pointer(bounds, tl.int32, 1), groups)
        group_row = (query - group_first) * fold + folded
        group_tile = group_row // BLOCK_M
        group_row -= group_tile * BLOCK_M
        first, n = states_of(group, group_tile, units, prefix)
        merged = (tl.zeros([WIDTH], tl.float32), float("-inf"), 0.0)
        for s0 in range(0, n + own_n, STATES):
            s = s0 + tl.arange(0, STATES)
            of_prefix = rows_of(s, first, n, group, group_tile, unit, group_row, units, prefix)
            of_own = rows_of(s - n, own_first, own_n, item, tile, unit, row, units, own)
            at = tl.where(
                s < n, of_prefix * aligned(state_width, 8), own_at + of_own * aligned(state_width, 8)
            )
            lse_at = tl.where(s < n, of_prefix, own_lses_at + of_own)
            merged = add_states(
                merged, prefix_states, prefix_state_lses, at, lse_at, s < n + own_n, column, HEAD_DIM_V
            )
        result, lse = finish_row(merged)
        head = (unit * fold + folded).to(tl.int64)
        place = (q_first + position).to(tl.int64)
        at = item.to(tl.int64) * aligned(out_stride_b, ALIGN) + place * aligned(out_stride_s, ALIGN)
        at += head * aligned(out_stride_h, ALIGN)
        tl.store(pointer(Out, ELEMENT, ALIGN) + at + column, result.to(ELEMENT), mask=column < HEAD_DIM_V)
        at = item.to(tl.int64) * lse_stride_b + place * lse_stride_s + head * lse_stride_h
        tl.store(pointer(Lse, tl.float32, 1) + at, lse)
