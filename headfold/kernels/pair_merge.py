"""Merge the states that `hopper_pair_kernel` left: of a row's keys in a shared prefix, and of those that follow it."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.pair import find_group
from headfold.kernels.parts.spans import sequence_span

COMMON = (
    "Out Lse units units_magic units_shift fold fold_magic fold_shift state_width out_stride_b out_stride_s out_stride_h "
    "lse_stride_b lse_stride_s lse_stride_h"
).split()
OF_A_LIST = "cu_seqlens_q batch sq_capacity lanes lanes_magic lanes_shift states state_lses ends uncut state_rows".split()
PAIR_MERGE_ARGUMENTS = [*COMMON, *(f"{which}_{name}" for which in ("own", "prefix") for name in OF_A_LIST)]


@triton.jit
def add_states(merged, item, tile, unit, row, units, of_list, column, columns, width, STATES: tl.constexpr):
    """`merged`, a row's (accumulator, maximum, sum), with the states of a tile of a list added, in the order of their keys."""
    acc, top, total = merged
    states, state_lses, ends, uncut, rows, lanes = of_list
    place = pointer(ends, tl.int32, 1) + 2 * (item * (lanes // units) + tile)
    first = tl.load(place)
    n = tl.load(place + 1) - first + 1
    lane = tile * units + unit
    for s0 in range(0, n, STATES):
        s = s0 + tl.arange(0, STATES)
        # The first range's state of a tile is its second one, the others' their first.
        state = tl.where(n > 1, 2 * (first + s) + tl.where(s == 0, 1, 0), uncut + item)
        at = (state * lanes + lane).to(tl.int64) * rows + row
        lse = tl.load(pointer(state_lses, tl.float32, 1) + at, mask=s < n, other=float("-inf"))
        lse *= 1.4426950408889634
        there = (s < n)[:, None] & (column < columns)[None, :]
        where = (at * aligned(width, 8))[:, None] + column[None, :]
        values = tl.load(pointer(states, tl.float32, 4) + where, mask=there, other=0.0)
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
    own_batch: tl.int32,
    own_sq_capacity: tl.int32,
    own_lanes: tl.int32,
    own_lanes_magic: tl.uint32,
    own_lanes_shift: tl.uint32,
    own_states: tl.int64,
    own_state_lses: tl.int64,
    own_ends: tl.int64,
    own_uncut: tl.int32,
    own_state_rows: tl.int32,
    prefix_cu_seqlens_q: tl.int64,
    prefix_batch: tl.int32,
    prefix_sq_capacity: tl.int32,
    prefix_lanes: tl.int32,
    prefix_lanes_magic: tl.uint32,
    prefix_lanes_shift: tl.uint32,
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

    Arguments are those of `hopper_pair_kernel`. First come a row's states of its prefix, then its own.

    EARLY: as in `merge_kernel`.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    item = divide(tl.program_id(0), (own_lanes_magic, own_lanes_shift))
    lane = tl.program_id(0) - item * own_lanes
    tile = divide(lane, (units_magic, units_shift))
    unit = lane - tile * units
    first_row = tile * BLOCK_M
    q_first, sq = sequence_span(item, own_cu_seqlens_q, own_batch.to(tl.int64) * 0, own_sq_capacity)
    rows = tl.minimum(sq * fold - first_row, BLOCK_M)
    bounds = pointer(prefix_cu_seqlens_q, tl.int32, 1)
    column = tl.arange(0, WIDTH)
    own = (own_states, own_state_lses, own_ends, own_uncut, own_state_rows, own_lanes)
    prefix = (prefix_states, prefix_state_lses, prefix_ends, prefix_uncut, prefix_state_rows, prefix_lanes)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        position = divide(first_row + row, (fold_magic, fold_shift))
        folded = first_row + row - position * fold
        query = q_first + position + (own_cu_seqlens_q == 0).to(tl.int32) * item * own_sq_capacity
        group = find_group(query, bounds, prefix_batch)
        group_row = (query - tl.load(bounds + group)) * fold + folded
        group_tile = group_row // BLOCK_M
        merged = (tl.zeros([WIDTH], tl.float32), float("-inf"), 0.0)
        merged = add_states(
            merged, group, group_tile, unit, group_row - group_tile * BLOCK_M, units, prefix, column, HEAD_DIM_V,
            state_width, STATES,
        )  # fmt: skip
        acc, top, total = add_states(
            merged, item, tile, unit, row, units, own, column, HEAD_DIM_V, state_width, STATES
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
