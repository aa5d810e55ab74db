"""Attention for many queries: one program runs one tile over all the keys that its rows see.

Blocks that every row sees in full run without a mask; only the edges of the mask and of the keys pay for one.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, load_float, load_index, pointer
from headfold.kernels.parts.attend import attend
from headfold.kernels.parts.fold import fold_rows
from headfold.kernels.parts.mask import list_at, untouched_blocks
from headfold.kernels.parts.spans import sequence_span, visible_keys
from headfold.kernels.parts.tile import (
    empty_state,
    finish_state,
    load_queries,
    locate,
    slopes_of,
    store_result,
    tile_keys,
)
from headfold.kernels.specialize import PREFILL_ARGUMENTS


@triton.jit(do_not_specialize=PREFILL_ARGUMENTS)
def prefill_kernel(
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
    batch: tl.int32,
    tiles_per_sequence: tl.int32,
    fold: tl.int32,
    group: tl.int32,
    q_stride_b: tl.int64,
    q_stride_s: tl.int64,
    q_stride_h: tl.int64,
    k_stride_b: tl.int64,
    k_stride_s: tl.int64,
    k_stride_h: tl.int64,
    v_stride_b: tl.int64,
    v_stride_s: tl.int64,
    v_stride_h: tl.int64,
    out_stride_split: tl.int64,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    out_stride_h: tl.int64,
    lse_stride_split: tl.int64,
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
    tokens_per_split: tl.int32,
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
    lists: tl.int64,
    list_stride_b: tl.int64,
    list_stride_h: tl.int64,
    list_stride_t: tl.int64,
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
    TMA: tl.constexpr,
):
    """Grid: (tiles, head units), later tiles of a sequence first: under a causal mask they are the long ones.

    The arguments are those of `decode_kernel`; what splits need is ignored. lists is the address of what
    mask_blocks.py wrote for a mask, 0 without one; its strides, in entries, lead from a sequence's lists to the next
    one's, from a head unit's and from a tile's, 0 where all share.
    """
    unit = tl.program_id(1)
    seq, tile = locate(tl.program_id(0), tiles_per_sequence, cu_seqlens_q, batch, fold, BLOCK_M)
    if tiles_per_sequence > 0:
        tile = tiles_per_sequence - 1 - tile
    q_first, sq = sequence_span(seq, cu_seqlens_q, seqused_q, sq_capacity)
    k_first, sk = sequence_span(seq, cu_seqlens_k, seqused_k, sk_capacity)
    pad = 0
    cache_row = seq
    angle = 0
    if FEATURED:
        pad = load_index(cache_leftpad, seq, 0)
        cache_row = load_index(cache_batch_idx, seq, seq)
    if ROTARY:
        angle = load_index(rotary_positions, seq, 0)
    first_row = tile * BLOCK_M
    if first_row >= sq * fold:
        return
    sk = tl.maximum(sk - pad, 0)
    row, position, head = fold_rows(first_row, fold, BLOCK_M)
    live = row < sq * fold
    head = unit * fold + head
    where = position.to(tl.int64)
    q_strides = (aligned(q_stride_b, ALIGN), aligned(q_stride_s, ALIGN), aligned(q_stride_h, ALIGN))
    queries = load_queries(
        pointer(Q, ELEMENT, ALIGN) + (seq.to(tl.int64) * q_strides[0] + q_first.to(tl.int64) * q_strides[1]),
        where * q_strides[1] + head.to(tl.int64) * q_strides[2],
        live,
        sign,
        angle + position * rotary_advances,
        (
            rotary_cos,
            rotary_sin,
            rotary_kind,
            cos_stride,
            sin_stride,
            max_positions,
            rotary_dim,
            rotary_interleaved,
        ),
        HEAD_DIM,
        D0,
        D1,
        ROTARY,
    )
    kv_head = (unit * fold // group).to(tl.int64)
    K_rows = pointer(K, ELEMENT, ALIGN) + kv_head * aligned(k_stride_h, ALIGN)
    V_rows = pointer(V, ELEMENT, ALIGN) + kv_head * aligned(v_stride_h, ALIGN)
    table = pointer(page_table, tl.int32, 1)
    if PAGED:
        table += cache_row.to(tl.int64) * table_stride
    else:
        first_key = (k_first + pad).to(tl.int64)
        K_rows += cache_row.to(tl.int64) * aligned(k_stride_b, ALIGN) + first_key * aligned(k_stride_s, ALIGN)
        V_rows += cache_row.to(tl.int64) * aligned(v_stride_b, ALIGN) + first_key * aligned(v_stride_s, ALIGN)
    shift = (sk - sq) * bottom_right
    last_row = tl.minimum(first_row + BLOCK_M, sq * fold) - 1
    key_low, key_high, full_low, full_high = tile_keys(
        first_row // fold, last_row // fold, sk, shift, window_left, window_right, chunk, FEATURED
    )
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
        row_masks = where * mask_stride_q + head.to(tl.int64) * mask_stride_h + seq * mask_stride_b
        row_trees = where * tree_stride_q + seq * tree_stride_b
    blocks = tl.maximum(tl.cdiv(key_high - key_low, BLOCK_N), 0)
    # Blocks [0, left) and [right, blocks) hold a key that some row does not see.
    left = tl.minimum(tl.cdiv(tl.maximum(full_low - key_low, 0), BLOCK_N), blocks)
    right = tl.maximum(tl.maximum(full_high - key_low, 0) // BLOCK_N, left)
    right = tl.minimum(right, blocks)
    listed = None
    last = blocks
    if TENSORS:
        left = untouched_blocks(key_low, blocks, sq, sk, mask, tree, BLOCK_N)
        if not PAGED:  # masks are for contiguous keys
            offset = seq * list_stride_b + unit * list_stride_h + tile * list_stride_t
            listed, last = list_at(lists, offset, blocks)
    k_desc = None
    v_desc = None
    if TMA:
        # Rows past key_high read as 0: the copy engine masks the tail.
        k_desc = tl.make_tensor_descriptor(K_rows, [key_high, HEAD_DIM], [k_stride_s, 1], [BLOCK_N, D0])
        v_desc = tl.make_tensor_descriptor(V_rows, [key_high, HEAD_DIM_V], [v_stride_s, 1], [BLOCK_N, DV0])
    state = empty_state(BLOCK_M, DV0, DV1)
    # A mask touches every block: programs for its wide loads alone have no such loop.
    if WIDE == 0:
        state = attend(
            state,
            queries,
            K_rows,
            V_rows,
            k_desc,
            v_desc,
            table,
            None,
            0,
            left,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            (slopes, row_slopes),
            (mask, mask_kind, mask_wide, mask_stride_k, row_masks),
            (tree, row_trees),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            PAGED,
            ALIGN,
            FEATURED,
            False,
            0,
            True,
            TMA,
        )
    if TENSORS:
        state = attend(
            state,
            queries,
            K_rows,
            V_rows,
            k_desc,
            v_desc,
            table,
            listed,
            left,
            last,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            (slopes, row_slopes),
            (mask, mask_kind, mask_wide, mask_stride_k, row_masks),
            (tree, row_trees),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            PAGED,
            ALIGN,
            FEATURED,
            True,
            WIDE,
            True,
            TMA,
        )
    else:
        state = attend(
            state,
            queries,
            K_rows,
            V_rows,
            k_desc,
            v_desc,
            table,
            None,
            left,
            right,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            (slopes, row_slopes),
            (mask, mask_kind, mask_wide, mask_stride_k, row_masks),
            (tree, row_trees),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            PAGED,
            ALIGN,
            FEATURED,
            False,
            0,
            False,
            TMA,
        )
        state = attend(
            state,
            queries,
            K_rows,
            V_rows,
            k_desc,
            v_desc,
            table,
            None,
            right,
            blocks,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            (slopes, row_slopes),
            (mask, mask_kind, mask_wide, mask_stride_k, row_masks),
            (tree, row_trees),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            PAGED,
            ALIGN,
            FEATURED,
            False,
            0,
            True,
            TMA,
        )
    out0, out1, lse = finish_state(state, scale_log2, sink, sinks, FEATURED)
    out_rows = seq * aligned(out_stride_b, ALIGN) + head * aligned(out_stride_h, ALIGN)
    out_rows += (q_first + where) * aligned(out_stride_s, ALIGN)
    store_result(pointer(Out, ELEMENT, ALIGN), out_rows, live, out0, out1, HEAD_DIM_V, DV0, DV1)
    lse_rows = seq * lse_stride_b + (q_first + where) * lse_stride_s + head * lse_stride_h
    tl.store(pointer(Lse, tl.float32, 1) + lse_rows, lse, mask=live)
