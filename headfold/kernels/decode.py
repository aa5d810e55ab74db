"""Attention for few queries: the keys are shared out among programs, and what they find is merged.

A program computes its share itself, from the lengths on the device: see parts/schedule.py. The states of tiles that
several programs share are merged by merge.py.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import load_float, load_index, load_kept, pointer, times
from headfold.kernels.parts.attend import attend
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.mask import untouched_blocks
from headfold.kernels.parts.new_tokens import append_and_load_queries
from headfold.kernels.parts.prefetch import prefetch_rows
from headfold.kernels.parts.schedule import count_blocks, find_range, look_up, share_of
from headfold.kernels.parts.spans import find_sequence, visible_keys
from headfold.kernels.parts.states import store_state
from headfold.kernels.parts.tile import empty_state, finish_state, load_queries, slopes_of, store_result
from headfold.kernels.specialize import DECODE_ARGUMENTS


@triton.jit(do_not_specialize=DECODE_ARGUMENTS)
def decode_kernel(
    Q: tl.int64,
    K: tl.int64,
    V: tl.int64,
    Out: tl.int64,
    Lse: tl.int64,
    cu_seqlens_q: tl.int64,
    cu_seqlens_k: tl.int64,
    seqused_q: tl.int64,
    seqused_k: tl.int64,
    page_table: tl.int64,
    sq_capacity: tl.int32,
    sk_capacity: tl.int32,
    grown: tl.int32,
    room: tl.int32,
    late: tl.int32,
    batch: tl.int32,
    tiles_per_sequence: tl.int32,
    units: tl.int32,
    units_magic: tl.uint32,
    units_shift: tl.uint32,
    lanes: tl.int32,
    lanes_magic: tl.uint32,
    lanes_shift: tl.uint32,
    splits: tl.int32,
    splits_magic: tl.uint32,
    splits_shift: tl.uint32,
    ranges: tl.int32,
    even_ranges: tl.int32,
    gap: tl.int32,
    ahead: tl.int32,
    extent: tl.int32,
    extent_blocks: tl.int32,
    states: tl.int64,
    state_lses: tl.int64,
    state_width: tl.int32,
    state_rows: tl.int32,
    fold: tl.int32,
    fold_magic: tl.uint32,
    fold_shift: tl.uint32,
    group_magic: tl.uint32,
    group_shift: tl.uint32,
    q_stride_b: tl.int64,
    q_stride_s: tl.int64,
    q_stride_h: tl.int64,
    k_stride_b: tl.int64,
    k_stride_s: tl.int64,
    k_stride_h: tl.int64,
    v_stride_b: tl.int64,
    v_stride_s: tl.int64,
    v_stride_h: tl.int64,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    out_stride_h: tl.int64,
    lse_stride_b: tl.int64,
    lse_stride_s: tl.int64,
    lse_stride_h: tl.int64,
    table_stride: tl.int64,
    page_size: tl.int32,
    page_magic: tl.uint32,
    page_shift: tl.uint32,
    window_left: tl.int32,
    window_right: tl.int32,
    bottom_right: tl.int32,
    sign: tl.float32,
    scale_log2: tl.float32,
    softcap_scale: tl.float32,
    chunk: tl.int32,
    sink: tl.int64,
    sink_kind: tl.int32,
    slopes: tl.int64,
    slopes_stride_b: tl.int64,
    mask: tl.int64,
    mask_kind: tl.int32,
    mask_wide: tl.int32,
    mask_stride_b: tl.int64,
    mask_stride_h: tl.int64,
    mask_stride_q: tl.int64,
    mask_stride_k: tl.int64,
    tree: tl.int64,
    tree_stride_b: tl.int64,
    tree_stride_q: tl.int64,
    cache_batch_idx: tl.int64,
    cache_leftpad: tl.int64,
    rotary_cos: tl.int64,
    rotary_sin: tl.int64,
    rotary_kind: tl.int32,
    rotary_dim: tl.int32,
    rotary_interleaved: tl.int32,
    rotary_positions: tl.int64,
    cos_stride: tl.int64,
    sin_stride: tl.int64,
    max_positions: tl.int32,
    rotary_advances: tl.int32,
    new_k: tl.int64,
    new_v: tl.int64,
    new_k_stride_b: tl.int64,
    new_k_stride_s: tl.int64,
    new_k_stride_h: tl.int64,
    new_v_stride_b: tl.int64,
    new_v_stride_s: tl.int64,
    new_v_stride_h: tl.int64,
    new_tokens: tl.int32,
    pages: tl.int32,
    ELEMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURED: tl.constexpr,
    TENSORS: tl.constexpr,
    ROTARY: tl.constexpr,
    WIDE: tl.constexpr,
    STREAM: tl.constexpr,
    EARLY: tl.constexpr,
    APPENDS: tl.constexpr,
    ANGLE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """Grid: one program for each lane of each range. Lengths are read here, so a captured graph may change them.

    A lane is one tile of one head unit; with tiles_per_sequence 0 tiles are packed and found by bisection, and a lane is
    a head unit. Tensors come as addresses, 0 for one that was not given, their elements' kinds as address.py names them.

    What is shared out: without STREAM, or with ranges 0, range r is split r % splits of sequence (or packed tile)
    r // splits, an equal share of the blocks that the tile sees. With STREAM the list of all sequences is cut into
    `ranges`, see schedule.py. With extent > 0 keys are cut at multiples of extent alone, and each extent has a state
    of its own: a sequence's result does not depend on who computes it, nor on the other sequences.

    A tile that one program computes whole is stored to Out. Else every program stores a state, and merge_kernel merges
    them in the order of their keys.

    EARLY: launched while the kernel before this one ends, and waits for that end before it reads what may come from
    it: all but the arguments, or with `late` 0 all but the arguments, lengths and offsets. The next kernel may be
    launched while this one runs. With `ahead`, which needs `late` 0, a block of keys and values is asked for before.

    FEATURED knows softcap, sinks, chunks, ALiBi and cache rows, TENSORS masks and trees too, ROTARY turns q: all by
    arguments, each at the price of a branch. WIDE is the element size of a mask that is known to allow wide loads, or 0.

    APPENDS: each program writes those of the `new_tokens` that fall into its share before it reads them (new_tokens.py);
    keys are then `grown` by as many. They and q are turned by ROTARY_DIM columns, 0 for not at all: constants as those
    of append.py.
    """
    if EARLY:
        # Before the next kernel is let in: merge_kernel reads lengths before it waits.
        if late != 0:
            tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    r = divide(tl.program_id(0), (lanes_magic, lanes_shift))
    lane = tl.program_id(0) - r * lanes
    lane_tile = divide(lane, (units_magic, units_shift))
    unit = lane - lane_tile * units
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
    by_fold = (fold_magic, fold_shift)
    folds = (fold, fold_magic, fold_shift)
    item = divide(r, (splits_magic, splits_shift))
    part = r - item * splits
    x = 0
    x_end = 1
    start = 0
    if STREAM:
        if ranges > 0:
            sequences = (batch, lengths, folds, band, extents)
            cuts = (gap, ranges, even_ranges)
            x, x_end, item, start, gap = find_range(
                r, lane_tile * BLOCK_M, sequences, cuts, BLOCK_M, BLOCK_N, FEATURED
            )
    SIZE: tl.constexpr = ELEMENT.primitive_bitwidth // 8
    kv_head = divide(unit * fold, (group_magic, group_shift))
    while x < x_end:
        seq = item
        tile = lane_tile
        if tiles_per_sequence == 0:
            seq, tile = find_sequence(item, cu_seqlens_q, batch, fold, BLOCK_M)
        first_row = tile * BLOCK_M
        q_first, sq, k_first, pad, sk, shift, key_low, key_high = look_up(
            seq, first_row, lengths, folds, band, BLOCK_M, FEATURED
        )
        blocks = 0
        if first_row < sq * fold:
            blocks = count_blocks(key_low, key_high, extent, extent_blocks, BLOCK_N)
        begin, end, n, own_state, pieces, next_start = share_of(
            (x, x_end, start),
            r,
            item,
            part,
            blocks,
            (splits, splits_magic, splits_shift),
            ranges,
            gap,
            extents,
            STREAM,
        )
        if begin < end:
            if EARLY:
                if not PAGED:
                    if ahead != 0:
                        at = key_low + begin * BLOCK_N
                        last = tl.maximum(key_high - 1, 0)  # a tile may see no key
                        k_at = K + (times(seq, k_stride_b, ALIGN) + times(kv_head, k_stride_h, ALIGN)) * SIZE
                        prefetch_rows(k_at, k_stride_s, at, last, BLOCK_N, HEAD_DIM, SIZE, ALIGN)
                        v_at = V + (times(seq, v_stride_b, ALIGN) + times(kv_head, v_stride_h, ALIGN)) * SIZE
                        prefetch_rows(v_at, v_stride_s, at, last, BLOCK_N, HEAD_DIM_V, SIZE, ALIGN)
                tl.extra.cuda.gdc_wait()
            cache_row = seq
            angle = 0
            if APPENDS:
                length = load_index(seqused_k, seq, 0)
                if ROTARY_DIM > 0:
                    angle = load_kept(rotary_positions, seq, 0)
            if FEATURED:
                cache_row = load_index(cache_batch_idx, seq, seq)
            if ROTARY:
                angle = load_index(rotary_positions, seq, 0)
            row = first_row + tl.arange(0, BLOCK_M)
            position = divide(row, by_fold)
            live = row < sq * fold
            head = unit * fold + row - position * fold
            q_at = pointer(Q, ELEMENT, ALIGN) + (
                times(seq, q_stride_b, ALIGN) + times(q_first, q_stride_s, ALIGN)
            )
            q_rows = times(position, q_stride_s, ALIGN) + times(head, q_stride_h, ALIGN)
            positions = angle + position * rotary_advances
            K_rows = pointer(K, ELEMENT, ALIGN) + times(kv_head, k_stride_h, ALIGN)
            V_rows = pointer(V, ELEMENT, ALIGN) + times(kv_head, v_stride_h, ALIGN)
            table = pointer(page_table, tl.int32, 1)
            if PAGED:
                table += cache_row.to(tl.int64) * table_stride
            else:
                K_rows += times(cache_row, k_stride_b, ALIGN) + times(k_first + pad, k_stride_s, ALIGN)
                V_rows += times(cache_row, v_stride_b, ALIGN) + times(k_first + pad, v_stride_s, ALIGN)
            if APPENDS:
                queries = append_and_load_queries(
                    q_at, q_rows, live, sign, positions,
                    (
                        new_k, new_v, (new_k_stride_b, new_k_stride_s, new_k_stride_h),
                        (new_v_stride_b, new_v_stride_s, new_v_stride_h), new_tokens, pages,
                    ),
                    seq, kv_head, length, key_low + begin * BLOCK_N, tl.minimum(key_low + end * BLOCK_N, key_high),
                    angle, (rotary_cos, rotary_sin, cos_stride, sin_stride, max_positions),
                    K_rows, V_rows, table, (k_stride_b, k_stride_s), (v_stride_b, v_stride_s),
                    (page_size, page_magic, page_shift),
                    BLOCK_M, HEAD_DIM, HEAD_DIM_V, D0, D1, DV0, DV1, PAGED, ALIGN,
                    ANGLE, ROTARY_DIM, INTERLEAVED, ROTARY_ALIGN,
                )  # fmt: skip
            else:
                rotary = (
                    rotary_cos, rotary_sin, rotary_kind, cos_stride, sin_stride, max_positions, rotary_dim,
                    rotary_interleaved,
                )  # fmt: skip
                queries = load_queries(q_at, q_rows, live, sign, positions, rotary, HEAD_DIM, D0, D1, ROTARY)
            row_low, row_high = visible_keys(position, shift, window_left, window_right, chunk, sk, FEATURED)
            row_slopes = 0.0
            sinks = 0.0
            if FEATURED:
                # Here, that the loop hides its latency.
                sinks = load_float(sink, sink_kind, head, live & (sink != 0))
                row_slopes = slopes_of(slopes, seq * slopes_stride_b + head, live)
            row_masks = 0
            row_trees = 0
            if TENSORS:
                where = position.to(tl.int64)
                row_masks = where * mask_stride_q + head.to(tl.int64) * mask_stride_h + seq * mask_stride_b
                row_trees = where * tree_stride_q + seq * tree_stride_b
            for piece in range(pieces):
                low = key_low + begin * BLOCK_N
                high = tl.minimum(key_low + end * BLOCK_N, key_high)
                if extent > 0:
                    first_extent = key_low // extent + begin // extent_blocks + piece
                    low = tl.minimum(tl.maximum(first_extent * extent, key_low), key_high)
                    high = tl.minimum((first_extent + 1) * extent, key_high)
                state = empty_state(BLOCK_M, DV0, DV1)
                blocks_here = tl.cdiv(high - low, BLOCK_N)
                # Every block has the band's test: memory sets the pace here, and one loop keeps the program small.
                untouched = 0
                if TENSORS:
                    untouched = untouched_blocks(low, blocks_here, sq, sk, mask, tree, BLOCK_N)
                for touched in tl.static_range(0 if TENSORS else 1, 2):
                    state = attend(
                        state, queries, K_rows, V_rows, None, None, table, None,
                        untouched * touched, blocks_here if touched else untouched, low, high,
                        row_low, tl.minimum(row_high, high), position + shift, (sq, sk), live,
                        (k_stride_b, k_stride_s), (v_stride_b, v_stride_s),
                        (page_size, page_magic, page_shift, pad), (scale_log2, softcap_scale), (slopes, row_slopes),
                        (mask, mask_kind, mask_wide, mask_stride_k, row_masks), (tree, row_trees),
                        HEAD_DIM, HEAD_DIM_V, D0, D1, DV0, DV1, BLOCK_N, PAGED, ALIGN, FEATURED,
                        TENSORS and touched == 1, WIDE if touched else 0, True, False,
                    )  # fmt: skip
                has_sink = tl.where((begin == 0) & (piece == 0), sink, 0)
                out0, out1, lse = finish_state(state, scale_log2, has_sink, sinks, FEATURED)
                if n == 1:
                    out_at = pointer(Out, ELEMENT, ALIGN) + (
                        times(seq, out_stride_b, ALIGN) + times(q_first, out_stride_s, ALIGN)
                    )
                    out_rows = times(position, out_stride_s, ALIGN) + times(head, out_stride_h, ALIGN)
                    store_result(out_at, out_rows, live, out0, out1, HEAD_DIM_V, DV0, DV1)
                    lse_at = pointer(Lse, tl.float32, 1) + (
                        seq.to(tl.int64) * lse_stride_b + (q_first + position).to(tl.int64) * lse_stride_s
                    )
                    tl.store(lse_at + head.to(tl.int64) * lse_stride_h, lse, mask=live)
                else:
                    store_state(
                        states,
                        state_lses,
                        (own_state + piece) * lanes + lane,
                        live,
                        out0,
                        out1,
                        lse,
                        state_width,
                        state_rows,
                        BLOCK_M,
                        HEAD_DIM_V,
                        DV0,
                        DV1,
                    )
        x = next_start
        start = next_start
        item += 1
    if EARLY:
        # By programs without a share too: this kernel must not end before the one that it waits for.
        tl.extra.cuda.gdc_wait()
