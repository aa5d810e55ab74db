"""Attention for many queries: one program runs one tile over all the keys that its rows see.

Blocks that every row sees in full run without a mask; only the edges of the mask and of the keys pay for one.
"""

import triton
import triton.language as tl

from headfold.kernels.parts.attend import attend
from headfold.kernels.parts.fold import fold_rows
from headfold.kernels.parts.kv import aligned, sequence_keys
from headfold.kernels.parts.mask import alive_blocks, has_bias, is_bool
from headfold.kernels.parts.spans import sequence_span, visible_keys
from headfold.kernels.parts.tile import empty_state, load_queries, locate, store_result, tile_keys
from headfold.kernels.specialize import INTEGERS


@triton.jit(do_not_specialize=INTEGERS)
def prefill_kernel(
    Q,
    K,
    V,
    Out,
    Lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    page_table,
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
    Sink,
    Slopes,
    slopes_stride_b: tl.int64,
    Mask,
    mask_stride_b: tl.int64,
    mask_stride_h: tl.int64,
    mask_stride_q: tl.int64,
    mask_stride_k: tl.int64,
    Tree,
    tree_stride_b: tl.int64,
    tree_stride_q: tl.int64,
    cache_batch_idx,
    cache_leftpad,
    rotary_cos,
    rotary_sin,
    rotary_positions,
    cos_stride: tl.int64,
    sin_stride: tl.int64,
    max_positions: tl.int32,
    rotary_advances: tl.int32,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    SEARCH: tl.constexpr,
    SOFTCAP: tl.constexpr,
    CHUNKED: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Grid: (tiles, head units), later tiles of a sequence first: under a causal mask they are the long ones."""
    unit = tl.program_id(1)
    seq, tile = locate(tl.program_id(0), tiles_per_sequence, cu_seqlens_q, batch, fold, BLOCK_M, SEARCH)
    if not SEARCH:
        tile = tiles_per_sequence - 1 - tile
    q_offset, sq = sequence_span(
        seq, cu_seqlens_q, seqused_q, sq_capacity, aligned(q_stride_b, ALIGN), aligned(q_stride_s, ALIGN)
    )
    first_row = tile * BLOCK_M
    if first_row >= sq * fold:
        return
    out_offset, _ = sequence_span(
        seq, cu_seqlens_q, seqused_q, sq_capacity, aligned(out_stride_b, ALIGN), aligned(out_stride_s, ALIGN)
    )
    lse_offset, _ = sequence_span(seq, cu_seqlens_q, seqused_q, sq_capacity, lse_stride_b, lse_stride_s)
    kv_head = (unit * fold // group).to(tl.int64)
    K += kv_head * aligned(k_stride_h, ALIGN)
    V += kv_head * aligned(v_stride_h, ALIGN)
    pad = 0
    if cache_leftpad is not None:
        pad = tl.load(cache_leftpad + seq)
    k_offset, v_offset, cache_row, sk = sequence_keys(
        seq,
        pad,
        cu_seqlens_k,
        seqused_k,
        cache_batch_idx,
        sk_capacity,
        (k_stride_b, k_stride_s),
        (v_stride_b, v_stride_s),
        ALIGN,
    )
    table = page_table
    if page_table is None:
        K += k_offset
        V += v_offset
    else:
        table = page_table + cache_row.to(tl.int64) * table_stride

    row, position, head = fold_rows(first_row, fold, BLOCK_M)
    live = row < sq * fold
    head = unit * fold + head
    q_rows = position.to(tl.int64) * aligned(q_stride_s, ALIGN) + head.to(tl.int64) * aligned(
        q_stride_h, ALIGN
    )
    angles = position
    if ROTARY_DIM > 0:
        angles = tl.load(rotary_positions + seq) + position * rotary_advances
    queries = load_queries(
        Q + q_offset,
        q_rows,
        live,
        sign,
        angles,
        rotary_cos,
        rotary_sin,
        cos_stride,
        sin_stride,
        max_positions,
        HEAD_DIM,
        D0,
        D1,
        ROTARY_DIM,
        INTERLEAVED,
        ROTARY_ALIGN,
    )
    shift, key_low, key_high, full_low, full_high = tile_keys(
        first_row, sq, sk, fold, bottom_right, window_left, window_right, chunk, BLOCK_M, CHUNKED
    )
    row_low, row_high = visible_keys(position, shift, window_left, window_right, chunk, sk, CHUNKED)
    slope = None
    if Slopes is not None:
        slope = tl.load(Slopes + seq * slopes_stride_b + head, mask=live, other=0.0).to(tl.float32)
    mask_rows = None
    if Mask is not None:
        mask_rows = position.to(tl.int64) * aligned(mask_stride_q, MASK_ALIGN)
        mask_rows += head.to(tl.int64) * aligned(mask_stride_h, MASK_ALIGN) + seq * aligned(
            mask_stride_b, MASK_ALIGN
        )
    in_log2: tl.constexpr = has_bias(Slopes, Mask)
    tree_rows = None
    if Tree is not None:
        tree_rows = position.to(tl.int64) * tree_stride_q + seq * tree_stride_b
    blocks = tl.maximum(tl.cdiv(key_high - key_low, BLOCK_N), 0)
    # Blocks [0, left) and [right, blocks) hold a key that some row does not see.
    left = tl.minimum(tl.cdiv(tl.maximum(full_low - key_low, 0), BLOCK_N), blocks)
    right = tl.maximum(tl.maximum(full_high - key_low, 0) // BLOCK_N, left)
    right = tl.minimum(right, blocks)
    if Mask is not None or Tree is not None:
        left = blocks
        right = blocks
    first_block = 0
    last_block = left
    if is_bool(Mask):
        first_block, last_block = alive_blocks(
            Mask,
            mask_rows,
            mask_stride_k,
            key_low,
            last_block,
            row_low,
            row_high,
            sk,
            live,
            BLOCK_N,
            MASK_ALIGN,
        )

    k_desc = None
    v_desc = None
    if TMA:
        # Rows past key_high read as 0: the copy engine masks the tail.
        k_desc = tl.make_tensor_descriptor(K, [key_high, HEAD_DIM], [k_stride_s, 1], [BLOCK_N, D0])
        v_desc = tl.make_tensor_descriptor(V, [key_high, HEAD_DIM_V], [v_stride_s, 1], [BLOCK_N, DV0])
    state = empty_state(BLOCK_M, DV0, DV1)
    state = attend(
        state,
        queries,
        K,
        V,
        k_desc,
        v_desc,
        table,
        first_block,
        last_block,
        key_low,
        key_high,
        row_low,
        row_high,
        position + shift,
        slope,
        Mask,
        mask_rows,
        mask_stride_k,
        Tree,
        tree_rows,
        (sq, sk),
        live,
        (k_stride_b, k_stride_s),
        (v_stride_b, v_stride_s),
        (page_size, page_magic, page_shift, pad),
        (scale_log2, softcap_scale),
        HEAD_DIM,
        HEAD_DIM_V,
        D0,
        D1,
        DV0,
        DV1,
        BLOCK_N,
        ALIGN,
        SOFTCAP,
        MASK_ALIGN,
        True,
        TMA,
    )
    if Mask is None and Tree is None:
        state = attend(
            state,
            queries,
            K,
            V,
            k_desc,
            v_desc,
            table,
            left,
            right,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            slope,
            Mask,
            mask_rows,
            mask_stride_k,
            Tree,
            tree_rows,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            ALIGN,
            SOFTCAP,
            MASK_ALIGN,
            False,
            TMA,
        )
        state = attend(
            state,
            queries,
            K,
            V,
            k_desc,
            v_desc,
            table,
            right,
            blocks,
            key_low,
            key_high,
            row_low,
            row_high,
            position + shift,
            slope,
            Mask,
            mask_rows,
            mask_stride_k,
            Tree,
            tree_rows,
            (sq, sk),
            live,
            (k_stride_b, k_stride_s),
            (v_stride_b, v_stride_s),
            (page_size, page_magic, page_shift, pad),
            (scale_log2, softcap_scale),
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            BLOCK_N,
            ALIGN,
            SOFTCAP,
            MASK_ALIGN,
            True,
            TMA,
        )
    Out += out_offset
    out_rows = position.to(tl.int64) * aligned(out_stride_s, ALIGN) + head * aligned(out_stride_h, ALIGN)
    lse_rows = lse_offset + position.to(tl.int64) * lse_stride_s + head * lse_stride_h
    store_result(
        state,
        Out,
        Lse,
        out_rows,
        lse_rows,
        live,
        head,
        Sink,
        True,
        in_log2,
        scale_log2,
        HEAD_DIM_V,
        DV0,
        DV1,
    )
