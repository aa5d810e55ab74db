"""Attention over shared prefixes and over what follows them, in one launch.

The queries of a group of sequences are one sequence of the first list, over the keys that the group shares; each
sequence's queries and the keys after its prefix are one of the second. A program works for one of the lists: products
bound the first, memory the second, and side by side neither waits. All results are states, which `pair_merge_kernel` merges.
"""

import triton.language as tl

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.decode_schedule import CHUNK, find_position, list_blocks, list_length
from headfold.kernels.hopper.decode_warps import decode_buffers, run_warps
from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.pair import cut_pair
from headfold.kernels.parts.schedule import ends_of
from headfold.kernels.parts.spans import OPEN

COMMON = (
    "boxes k_groups v_groups Q gap units units_magic units_shift fold fold_magic fold_shift group_magic group_shift "
    "q_stride_h state_width page_size scale_log2"
).split()
# What each list has of its own, behind its name.
OF_A_LIST = (
    "cu_seqlens_q seqused_k padding page_table table_stride batch sq_capacity lanes lanes_magic lanes_shift weight "
    "states state_lses ends uncut state_rows q_stride_b q_stride_s window_right"
).split()
PAIR_ARGUMENTS = [*COMMON, *(f"{which}_{name}" for which in ("own", "prefix") for name in OF_A_LIST)]


@gluon.jit(do_not_specialize=PAIR_ARGUMENTS)
def hopper_pair_kernel(
    k_desc,
    v_desc,
    boxes: gl.int32,
    k_groups: gl.int32,
    v_groups: gl.int32,
    Q: gl.int64,
    gap: gl.int32,
    units: gl.int32,
    units_magic: gl.uint32,
    units_shift: gl.uint32,
    fold: gl.int32,
    fold_magic: gl.uint32,
    fold_shift: gl.uint32,
    group_magic: gl.uint32,
    group_shift: gl.uint32,
    q_stride_h: gl.int64,
    state_width: gl.int32,
    page_size: gl.int32,
    scale_log2: gl.float32,
    own_cu_seqlens_q: gl.int64,
    own_seqused_k: gl.int64,
    own_padding: gl.int64,
    own_page_table: gl.int64,
    own_table_stride: gl.int64,
    own_batch: gl.int32,
    own_sq_capacity: gl.int32,
    own_lanes: gl.int32,
    own_lanes_magic: gl.uint32,
    own_lanes_shift: gl.uint32,
    own_weight: gl.int32,
    own_states: gl.int64,
    own_state_lses: gl.int64,
    own_ends: gl.int64,
    own_uncut: gl.int32,
    own_state_rows: gl.int32,
    own_q_stride_b: gl.int64,
    own_q_stride_s: gl.int64,
    own_window_right: gl.int32,
    prefix_cu_seqlens_q: gl.int64,
    prefix_seqused_k: gl.int64,
    prefix_padding: gl.int64,
    prefix_page_table: gl.int64,
    prefix_table_stride: gl.int64,
    prefix_batch: gl.int32,
    prefix_sq_capacity: gl.int32,
    prefix_lanes: gl.int32,
    prefix_lanes_magic: gl.uint32,
    prefix_lanes_shift: gl.uint32,
    prefix_weight: gl.int32,
    prefix_states: gl.int64,
    prefix_state_lses: gl.int64,
    prefix_ends: gl.int64,
    prefix_uncut: gl.int32,
    prefix_state_rows: gl.int32,
    prefix_q_stride_b: gl.int64,
    prefix_q_stride_s: gl.int64,
    prefix_window_right: gl.int32,
    ELEMENT: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    GROUPED: gl.constexpr,
    ALIGN: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Grid: as many programs as run at a time. k_desc and v_desc are boxes of K and V, `boxes` of them a block.

    What begins with own_ is of the list of what follows the prefixes, with prefix_ of the other one: lengths and the
    page table of its sequences, keys before the first one (`padding`), `lanes` programs a range, what a block costs
    (`weight`), where its states lie and their LSEs, where the first and the last range of every tile are written down
    (`ends`), number of the first sequence's state where no other program has a part of it (`uncut`), rows of a state. All
    else is said in `decode_kernel`.
    """
    if EARLY:
        # Lengths and page tables may come from the kernel before.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    buffers, bars = decode_buffers(ELEMENT, BLOCK_M, TILE_D, TILE_DV, BLOCK_N, STAGES, GROUPED, False)
    folds = (fold, fold_magic, fold_shift)
    # Numbers at run time, for functions that take nothing else.
    top_row = own_batch * 0
    none = top_row.to(gl.int64)
    lengths = (
        own_cu_seqlens_q, none, none, own_seqused_k, own_padding, own_sq_capacity, 0, 0, OPEN
    )  # fmt: skip
    prefix_lengths = (
        prefix_cu_seqlens_q, none, none, prefix_seqused_k, prefix_padding, prefix_sq_capacity, 0, 0, OPEN
    )  # fmt: skip
    band = (1, OPEN, own_window_right, OPEN)
    prefix_band = (1, OPEN, prefix_window_right, OPEN)
    # Both lists' lengths are asked for before either is waited for.
    own_blocks, i = list_blocks(0, top_row, own_batch, lengths, folds, band, BLOCK_M, BLOCK_N, CHUNK, True)
    blocks, _ = list_blocks(
        0, top_row, prefix_batch, prefix_lengths, folds, prefix_band, BLOCK_M, BLOCK_N, CHUNK, True
    )
    own_total, own_gap, _ = list_length(
        own_blocks, i, top_row, own_batch, lengths, folds, band, gap, 1, 1, BLOCK_M, BLOCK_N, True
    )
    prefix_total, prefix_gap, _ = list_length(
        blocks, i, top_row, prefix_batch, prefix_lengths, folds, prefix_band, gap, 1, 1, BLOCK_M, BLOCK_N, True
    )  # fmt: skip
    prefix_ranges, ranges = cut_pair(
        gl.num_programs(0),
        (own_total, own_lanes, own_weight),
        (prefix_total, prefix_lanes, prefix_weight),
    )
    # Programs of a prefix come first, for theirs are not cut as evenly.
    number = gl.program_id(0) - prefix_ranges * prefix_lanes
    blocks = gl.where(number < 0, blocks, own_blocks)
    cu_seqlens_q = own_cu_seqlens_q
    seqused_k = own_seqused_k
    padding = own_padding
    page_table = own_page_table
    table_stride = own_table_stride
    batch = own_batch
    sq_capacity = own_sq_capacity
    lanes = own_lanes
    lanes_magic = own_lanes_magic
    lanes_shift = own_lanes_shift
    states = own_states
    state_lses = own_state_lses
    ends = own_ends
    uncut = own_uncut
    state_rows = own_state_rows
    q_stride_b = own_q_stride_b
    q_stride_s = own_q_stride_s
    window_right = own_window_right
    total = own_total
    tile_gap = own_gap
    if number < 0:
        number = gl.program_id(0)
        cu_seqlens_q = prefix_cu_seqlens_q
        seqused_k = prefix_seqused_k
        padding = prefix_padding
        page_table = prefix_page_table
        table_stride = prefix_table_stride
        batch = prefix_batch
        sq_capacity = prefix_sq_capacity
        lanes = prefix_lanes
        lanes_magic = prefix_lanes_magic
        lanes_shift = prefix_lanes_shift
        states = prefix_states
        state_lses = prefix_state_lses
        ends = prefix_ends
        uncut = prefix_uncut
        state_rows = prefix_state_rows
        q_stride_b = prefix_q_stride_b
        q_stride_s = prefix_q_stride_s
        window_right = prefix_window_right
        total = prefix_total
        tile_gap = prefix_gap
        ranges = prefix_ranges
    r = divide(number, (lanes_magic, lanes_shift))
    lane = number - r * lanes
    lane_tile = divide(lane, (units_magic, units_shift))
    unit = lane - lane_tile * units
    lengths = (cu_seqlens_q, none, none, seqused_k, padding, sq_capacity, 0, 0, OPEN)
    band = (1, OPEN, window_right, OPEN)
    first_row = lane_tile * BLOCK_M
    if lane_tile > 0:
        blocks, i = list_blocks(0, first_row, batch, lengths, folds, band, BLOCK_M, BLOCK_N, CHUNK, True)
        total, tile_gap, _ = list_length(
            blocks, i, first_row, batch, lengths, folds, band, gap, 1, 1, BLOCK_M, BLOCK_N, True
        )
    x, x_end = ends_of(r, total, ranges)
    item, start = find_position(
        x, blocks, i, first_row, batch, lengths, folds, band, tile_gap, BLOCK_M, BLOCK_N, True
    )
    begins = (x, x_end, item, start, tile_gap)
    by_fold = (fold_magic, fold_shift)
    kv_head = divide(unit * fold, (group_magic, group_shift))
    scale_log2 = gl.maximum(scale_log2, 1e-30)  # as in `hopper_decode_kernel`
    work = (r, top_row, lane_tile, lengths, folds, band, batch, 1, by_fold, 1, ranges)
    queries = (
        pointer(Q, ELEMENT, ALIGN), aligned(q_stride_b, ALIGN), aligned(q_stride_s, ALIGN), aligned(q_stride_h, ALIGN)
    )  # fmt: skip
    left = (
        pointer(states, gl.float32, 4), pointer(state_lses, gl.float32, 1), aligned(state_width, 8), state_rows, uncut,
        pointer(ends, gl.int32, 1), divide(lanes, (units_magic, units_shift)),
    )  # fmt: skip
    common = (
        buffers, bars, queries, queries, queries, left, unit, fold, by_fold, (OPEN, window_right), (lane, lanes), scale_log2,
    )  # fmt: skip
    pages = (pointer(page_table, gl.int32, 1), table_stride, page_size, boxes)
    fetches = (
        k_desc, v_desc, buffers[1], buffers[2], bars, pages, (k_groups, v_groups), none, kv_head, none
    )  # fmt: skip
    run_warps(
        common, fetches, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, PAGE_ROWS, ALIGN,
        FETCH_REGISTERS, EARLY, True,
    )  # fmt: skip
