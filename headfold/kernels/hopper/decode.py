"""The decode kernel for tiles of 16 to 128 folded rows: its arguments, and what each program owns.

Its schedule, its arguments and the states it leaves are those of the Triton kernel (`kernels/decode.py`), and so is the
kernel that merges them.
"""

import triton.language as tl

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.decode_schedule import find_range
from headfold.kernels.hopper.decode_warps import decode_buffers, run_warps
from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide

# (registers of a thread at the start, of the producer), by consumers and whether heads are wider than 128: consumers have
# what is left, 232 or 240. 16:4 d64 b16 s16384 takes 70.2 us with 128 at the start, 75.2 with 168 (d128 is as fast), maybe
# as the merge kernel's programs find registers beside this one. The assembler refuses wide heads below 158.
REGISTERS = {(1, False): (128, 24), (1, True): (168, 96), (2, False): (168, 40)}
COPYING_REGISTERS = 56  # of the warps that copy rows

ADDRESSES = "Q K V Out Lse cu_seqlens_q cu_seqlens_k seqused_q seqused_k page_table states state_lses".split()
NUMBERS = (
    "boxes k_groups v_groups sq_capacity sk_capacity grown room late batch tiles_per_sequence units "
    "units_magic units_shift lanes lanes_magic lanes_shift splits splits_magic splits_shift ranges "
    "even_ranges gap ahead extent extent_blocks state_width state_rows fold fold_magic fold_shift group_magic "
    "group_shift q_stride_b q_stride_s q_stride_h k_stride_b k_stride_s k_stride_h v_stride_b v_stride_s "
    "v_stride_h out_stride_b out_stride_s out_stride_h lse_stride_b lse_stride_s lse_stride_h table_stride "
    "page_size page_magic page_shift window_left window_right bottom_right sign scale_log2 softcap_scale "
    "chunk"
).split()


@gluon.jit(do_not_specialize=ADDRESSES + NUMBERS)
def hopper_decode_kernel(
    k_desc,
    v_desc,
    boxes: gl.int32,
    k_groups: gl.int32,
    v_groups: gl.int32,
    Q: gl.int64,
    K: gl.int64,
    V: gl.int64,
    Out: gl.int64,
    Lse: gl.int64,
    cu_seqlens_q: gl.int64,
    cu_seqlens_k: gl.int64,
    seqused_q: gl.int64,
    seqused_k: gl.int64,
    page_table: gl.int64,
    sq_capacity: gl.int32,
    sk_capacity: gl.int32,
    grown: gl.int32,
    room: gl.int32,
    late: gl.int32,
    batch: gl.int32,
    tiles_per_sequence: gl.int32,
    units: gl.int32,
    units_magic: gl.uint32,
    units_shift: gl.uint32,
    lanes: gl.int32,
    lanes_magic: gl.uint32,
    lanes_shift: gl.uint32,
    splits: gl.int32,
    splits_magic: gl.uint32,
    splits_shift: gl.uint32,
    ranges: gl.int32,
    even_ranges: gl.int32,
    gap: gl.int32,
    ahead: gl.int32,
    extent: gl.int32,
    extent_blocks: gl.int32,
    states: gl.int64,
    state_lses: gl.int64,
    state_width: gl.int32,
    state_rows: gl.int32,
    fold: gl.int32,
    fold_magic: gl.uint32,
    fold_shift: gl.uint32,
    group_magic: gl.uint32,
    group_shift: gl.uint32,
    q_stride_b: gl.int64,
    q_stride_s: gl.int64,
    q_stride_h: gl.int64,
    k_stride_b: gl.int64,
    k_stride_s: gl.int64,
    k_stride_h: gl.int64,
    v_stride_b: gl.int64,
    v_stride_s: gl.int64,
    v_stride_h: gl.int64,
    out_stride_b: gl.int64,
    out_stride_s: gl.int64,
    out_stride_h: gl.int64,
    lse_stride_b: gl.int64,
    lse_stride_s: gl.int64,
    lse_stride_h: gl.int64,
    table_stride: gl.int64,
    page_size: gl.int32,
    page_magic: gl.uint32,
    page_shift: gl.uint32,
    window_left: gl.int32,
    window_right: gl.int32,
    bottom_right: gl.int32,
    sign: gl.float32,
    scale_log2: gl.float32,
    softcap_scale: gl.float32,
    chunk: gl.int32,
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
    """Grid: one program for each lane of each range.

    k_desc and v_desc are boxes of K and V, `boxes` of them a block; all else comes as the Triton kernel's arguments do,
    which say what they mean. PAGE_ROWS keys of a block come from one page (0: rows; 1: copied row by row, without boxes).
    GROUPED where boxes bring whole rows: a page of K then begins k_groups groups of 8 rows behind the one before it.

    EARLY as there: the first warps hold the next kernel back where it reads lengths before it waits, and every partition
    waits before it reads what may come from the kernel before, a program without a share too.
    """
    if EARLY:
        if late != 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    buffers, bars = decode_buffers(
        ELEMENT, BLOCK_M, TILE_D, TILE_DV, BLOCK_N, STAGES, GROUPED, PAGE_ROWS == 1
    )
    r = divide(gl.program_id(0), (lanes_magic, lanes_shift))
    lane = gl.program_id(0) - r * lanes
    lane_tile = divide(lane, (units_magic, units_shift))
    unit = lane - lane_tile * units
    lengths = (
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, 0, sq_capacity, sk_capacity, grown, room
    )  # fmt: skip
    band = (bottom_right, window_left, window_right, chunk)
    folds = (fold, fold_magic, fold_shift)
    item = divide(r, (splits_magic, splits_shift))
    part = r - item * splits
    x = 0
    x_end = 1
    start = 0
    if ranges > 0:
        x, x_end, item, start, gap = find_range(
            r, lane_tile * BLOCK_M, batch, lengths, folds, band, gap, ranges, even_ranges, BLOCK_M, BLOCK_N
        )
    by_fold = (fold_magic, fold_shift)
    kv_head = divide(unit * fold, (group_magic, group_shift))
    begins = (x, x_end, item, start, gap)
    # A scale of 0 makes every score 0 to the last bit; a hidden one, -inf, must stay what it is.
    scale_log2 = gl.maximum(scale_log2, 1e-30)
    by_splits = (splits_magic, splits_shift)
    work = (r, part, lane_tile, lengths, folds, band, batch, splits, by_splits, tiles_per_sequence, ranges)
    queries = (
        pointer(Q, ELEMENT, ALIGN), aligned(q_stride_b, ALIGN), aligned(q_stride_s, ALIGN), aligned(q_stride_h, ALIGN)
    )  # fmt: skip
    results = (
        pointer(Out, ELEMENT, ALIGN),
        aligned(out_stride_b, ALIGN),
        aligned(out_stride_s, ALIGN),
        aligned(out_stride_h, ALIGN),
    )
    lses = (pointer(Lse, gl.float32, 1), lse_stride_b, lse_stride_s, lse_stride_h)
    left = (
        pointer(states, gl.float32, 4), pointer(state_lses, gl.float32, 1), aligned(state_width, 8), state_rows
    )  # fmt: skip
    common = (
        buffers, bars, queries, results, lses, left, unit, fold, by_fold,
        (window_left, window_right), (lane, lanes), scale_log2,
    )  # fmt: skip
    ragged = cu_seqlens_k
    pages = (pointer(page_table, gl.int32, 1), table_stride, page_size, boxes)
    sources = ragged  # not used by boxes of pages
    if PAGE_ROWS == 0:
        sources = (
            ahead,
            (pointer(K, ELEMENT, ALIGN), k_stride_b, k_stride_s, k_stride_h),
            (pointer(V, ELEMENT, ALIGN), v_stride_b, v_stride_s, v_stride_h),
        )
    if PAGE_ROWS == 1:
        sources = (
            pointer(K, ELEMENT, ALIGN), (k_stride_b // 8, k_stride_s // 8, k_stride_h // 8),
            pointer(V, ELEMENT, ALIGN), (v_stride_b // 8, v_stride_s // 8, v_stride_h // 8),
        )  # fmt: skip
    fetches = (
        k_desc, v_desc, buffers[1], buffers[2], bars, pages, (k_groups, v_groups), ragged, kv_head, sources
    )  # fmt: skip
    run_warps(
        common, fetches, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, PAGE_ROWS, ALIGN,
        FETCH_REGISTERS, EARLY, False,
    )  # fmt: skip
