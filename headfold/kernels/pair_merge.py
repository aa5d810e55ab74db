"""Merge the states that `hopper_pair_kernel` left: of a row's keys in a shared prefix, and of those that follow it."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.pair import cut_pair, find_group
from headfold.kernels.parts.schedule import count_blocks, list_length, look_up, range_of, start_of
from headfold.kernels.parts.spans import OPEN

COMMON = (
    "Out Lse states state_lses programs gap units units_magic units_shift fold fold_magic fold_shift state_width "
    "out_stride_b out_stride_s out_stride_h lse_stride_b lse_stride_s lse_stride_h"
).split()
OF_A_LIST = (
    "cu_seqlens_q seqused_k padding batch sq_capacity lanes lanes_magic lanes_shift weight halves first_state uncut "
    "state_rows window_right"
).split()
PAIR_MERGE_ARGUMENTS = [*COMMON, *(f"{which}_{name}" for which in ("own", "prefix") for name in OF_A_LIST)]


@triton.jit
def states_of(
    item, first_row, sequences, cuts, listed, ranges, uncut, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(number of a tile's first state, how many it has, every second number after the first).

    listed is (length, gap) of the list of first tiles.
    """
    _, lengths, fold, band, _ = sequences
    _, _, _, _, _, _, low, high = look_up(item, first_row, lengths, fold, band, BLOCK_M, True)
    blocks = count_blocks(low, high, 0, 0, BLOCK_N)
    total, gap = listed
    if first_row > 0:
        total, gap, _ = list_length(first_row, sequences, cuts, BLOCK_M, BLOCK_N, True)
    start = start_of(item, first_row, sequences, gap, BLOCK_M, BLOCK_N, True)
    quotient = total // ranges
    rest = total - quotient * ranges
    first_range = range_of(start, quotient, rest)
    n = range_of(start + blocks - 1, quotient, rest) - first_range + 1
    return tl.where(n > 1, 2 * first_range + 1, uncut + item), n


@triton.jit
def add_states(
    merged, first, n, halves, lanes, lane, rows, row, first_state, states, column, STATES: tl.constexpr
):
    """`merged`, a row's (accumulator, maximum, sum), with n states of `halves` parts each added."""
    acc, top, total = merged
    values_at, lses_at, width, columns = states
    for s0 in range(0, n * halves, STATES):
        s = s0 + tl.arange(0, STATES)
        part = s // halves
        # The first state of a tile lies one place before where the step would put it.
        state = first + 2 * part - tl.where(part > 0, 1, 0)
        number = (state * halves + s - part * halves) * lanes + lane
        at = first_state + number.to(tl.int64) * rows + row
        lse = tl.load(lses_at + at, mask=s < n * halves, other=float("-inf")) * 1.4426950408889634
        # A half without a block has written nothing but that it is empty.
        there = (lse > float("-inf"))[:, None] & (column < columns)[None, :]
        values = tl.load(values_at + (at * width)[:, None] + column[None, :], mask=there, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2(lse - safe)
        shrink = tl.exp2(top - safe)
        acc = acc * shrink + tl.sum(values * weight[:, None], 0)
        total = total * shrink + tl.sum(weight, 0)
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=PAIR_MERGE_ARGUMENTS)
def pair_merge_kernel(
    Out: tl.int64,
    Lse: tl.int64,
    states: tl.int64,
    state_lses: tl.int64,
    programs: tl.int32,
    gap: tl.int32,
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
    own_cu_seqlens_q: tl.int64,
    own_seqused_k: tl.int64,
    own_padding: tl.int64,
    own_batch: tl.int32,
    own_sq_capacity: tl.int32,
    own_lanes: tl.int32,
    own_lanes_magic: tl.uint32,
    own_lanes_shift: tl.uint32,
    own_weight: tl.int32,
    own_halves: tl.int32,
    own_first_state: tl.int32,
    own_uncut: tl.int32,
    own_state_rows: tl.int32,
    own_window_right: tl.int32,
    prefix_cu_seqlens_q: tl.int64,
    prefix_seqused_k: tl.int64,
    prefix_padding: tl.int64,
    prefix_batch: tl.int32,
    prefix_sq_capacity: tl.int32,
    prefix_lanes: tl.int32,
    prefix_lanes_magic: tl.uint32,
    prefix_lanes_shift: tl.uint32,
    prefix_weight: tl.int32,
    prefix_halves: tl.int32,
    prefix_first_state: tl.int32,
    prefix_uncut: tl.int32,
    prefix_state_rows: tl.int32,
    prefix_window_right: tl.int32,
    ELEMENT: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    EARLY: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
):
    """Grid: (lanes of all sequences, programs of a tile, each of which takes rows in turn).

    Arguments are those of `hopper_pair_kernel`, and `programs` the size of its grid. First come a row's states of its prefix,
    then its own, in the order of their keys.

    EARLY: as in `merge_kernel`.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    folds = (fold, fold_magic, fold_shift)
    # Numbers at run time, for functions that take nothing else.
    top_row = own_batch * 0
    none = top_row.to(tl.int64)
    lengths = (own_cu_seqlens_q, none, none, own_seqused_k, own_padding, own_sq_capacity, 0, 0, OPEN)
    prefix_lengths = (
        prefix_cu_seqlens_q,
        none,
        none,
        prefix_seqused_k,
        prefix_padding,
        prefix_sq_capacity,
        0,
        0,
        OPEN,
    )
    sequences = (own_batch, lengths, folds, (1, OPEN, own_window_right, OPEN), (0, 0))
    prefix_sequences = (prefix_batch, prefix_lengths, folds, (1, OPEN, prefix_window_right, OPEN), (0, 0))
    cuts = (gap, 1, 1)
    own_total, own_gap, _ = list_length(top_row, sequences, cuts, BLOCK_M, BLOCK_N, True)
    prefix_total, prefix_gap, _ = list_length(top_row, prefix_sequences, cuts, BLOCK_M, BLOCK_N, True)
    prefix_ranges, ranges = cut_pair(
        programs, (own_total, own_lanes, own_weight), (prefix_total, prefix_lanes, prefix_weight)
    )
    item = divide(tl.program_id(0), (own_lanes_magic, own_lanes_shift))
    lane = tl.program_id(0) - item * own_lanes
    tile = divide(lane, (units_magic, units_shift))
    unit = lane - tile * units
    first_row = tile * BLOCK_M
    q_first, sq, _, _, _, _, _, _ = look_up(item, first_row, lengths, folds, sequences[3], BLOCK_M, True)
    rows = tl.minimum(sq * fold - first_row, BLOCK_M)
    first, n = states_of(
        item, first_row, sequences, cuts, (own_total, own_gap), ranges, own_uncut, BLOCK_M, BLOCK_N
    )
    bounds = pointer(prefix_cu_seqlens_q, tl.int32, 1)
    column = tl.arange(0, WIDTH)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    where = (
        pointer(states, tl.float32, 4),
        pointer(state_lses, tl.float32, 1),
        aligned(state_width, 8),
        HEAD_DIM_V,
    )
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        position = divide(first_row + row, (fold_magic, fold_shift))
        folded = first_row + row - position * fold
        query = q_first + position + (own_cu_seqlens_q == 0).to(tl.int32) * item * own_sq_capacity
        group = find_group(query, bounds, prefix_batch)
        group_row = (query - tl.load(bounds + group)) * fold + folded
        group_tile = group_row // BLOCK_M
        group_lane = group_tile * units + unit
        group_first, group_n = states_of(
            group,
            group_tile * BLOCK_M,
            prefix_sequences,
            cuts,
            (prefix_total, prefix_gap),
            prefix_ranges,
            prefix_uncut,
            BLOCK_M,
            BLOCK_N,
        )
        merged = (tl.zeros([WIDTH], tl.float32), float("-inf"), 0.0)
        merged = add_states(
            merged, group_first, group_n, prefix_halves, prefix_lanes, group_lane, prefix_state_rows,
            group_row - group_tile * BLOCK_M, prefix_first_state, where, column, STATES,
        )  # fmt: skip
        acc, top, total = add_states(
            merged, first, n, own_halves, own_lanes, lane, own_state_rows, row, own_first_state, where, column, STATES
        )  # fmt: skip
        empty = total == 0.0
        whole = tl.where(empty, 1.0, total)
        head = (unit * fold + folded).to(tl.int64)
        place = (q_first + position).to(tl.int64)
        at = item.to(tl.int64) * aligned(out_stride_b, ALIGN) + place * aligned(out_stride_s, ALIGN)
        at += head * aligned(out_stride_h, ALIGN)
        result = pointer(Out, ELEMENT, ALIGN)
        tl.store(result + at + column, (acc / whole).to(ELEMENT), mask=column < HEAD_DIM_V)
        at = item.to(tl.int64) * lse_stride_b + place * lse_stride_s + head * lse_stride_h
        lse = tl.where(empty, float("-inf"), (top + tl.log2(whole)) * 0.6931471805599453)
        tl.store(pointer(Lse, tl.float32, 1) + at, lse)
