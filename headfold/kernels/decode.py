"""Split-KV attention for few queries: one program runs one split of one tile of one head unit.

With several splits the states go to a workspace, and `fixup.py` merges them; with one the result is final.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, load_float, load_index, pointer
from headfold.kernels.parts.attend import attend
from headfold.kernels.parts.fold import fold_rows
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
from headfold.kernels.specialize import ARGUMENTS


@triton.jit(do_not_specialize=ARGUMENTS)
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
):
    """Grid: (tiles, head units, splits). Lengths are read here, so a captured graph may change them.

    Tensors come as addresses, 0 for one that was not given, their elements' kinds as address.py names them. A split is
    an equal share of the tile's blocks, or with tokens_per_split > 0 the keys from split * tokens_per_split on: then
    it does not depend on the other sequences of the batch. Out is float32 where there are several splits.

    FEATURED knows softcap, sinks, chunks, ALiBi and cache rows, TENSORS masks and trees too, ROTARY turns q: all by
    arguments, each at the price of a branch. WIDE is the element size of a mask that is known to allow wide loads, or 0.
    """
    unit = tl.program_id(1)
    split = tl.program_id(2)
    seq, tile = locate(tl.program_id(0), tiles_per_sequence, cu_seqlens_q, batch, fold, BLOCK_M)
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
    key_low, key_high, full_low, full_high = tile_keys(
        first_row, sq, sk, fold, shift, window_left, window_right, chunk, BLOCK_M, FEATURED
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
    share = tl.cdiv(blocks, tl.num_programs(2)) * BLOCK_N
    start = key_low + split * share
    if tokens_per_split > 0:
        share = tokens_per_split
        start = split * share
    split_high = tl.minimum(start + share, key_high)
    split_low = tl.minimum(tl.maximum(start, key_low), split_high)
    row_high = tl.minimum(row_high, split_high)
    # Every block is masked: memory sets the pace here, and one loop keeps the program small.
    state = empty_state(BLOCK_M, DV0, DV1)
    state = attend(
        state,
        queries,
        K_rows,
        V_rows,
        None,
        None,
        table,
        0,
        tl.cdiv(split_high - split_low, BLOCK_N),
        split_low,
        split_high,
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
        TENSORS,
        WIDE,
        True,
        False,
    )
    out0, out1, lse = finish_state(state, scale_log2, tl.where(split == 0, sink, 0), sinks, FEATURED)
    out_rows = split * aligned(out_stride_split, ALIGN) + seq * aligned(out_stride_b, ALIGN)
    out_rows += (q_first + where) * aligned(out_stride_s, ALIGN) + head * aligned(out_stride_h, ALIGN)
    if tl.num_programs(2) > 1:
        store_result(pointer(Out, tl.float32, ALIGN), out_rows, live, out0, out1, HEAD_DIM_V, DV0, DV1)
    else:
        store_result(pointer(Out, ELEMENT, ALIGN), out_rows, live, out0, out1, HEAD_DIM_V, DV0, DV1)
    lse_rows = (
        split * lse_stride_split + seq * lse_stride_b + (q_first + where) * lse_stride_s + head * lse_stride_h
    )
    tl.store(pointer(Lse, tl.float32, 1) + lse_rows, lse, mask=live)
