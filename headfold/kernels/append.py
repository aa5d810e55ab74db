"""Append: write new keys, rotated where angles are given, and values into a cache in place."""

import triton
import triton.language as tl

from headfold.kernels.parts.fold import fold_rows, load_rows, store_rows
from headfold.kernels.parts.kv import aligned
from headfold.kernels.parts.rotary import load_rotated
from headfold.kernels.parts.spans import sequence_span
from headfold.kernels.parts.tile import locate

# Plain arguments all: see specialize.py.
APPEND_INTEGERS = (
    "new_tokens batch tiles_per_sequence heads capacity cache_rows pages page_size table_stride "
    "kc_stride_b kc_stride_s kc_stride_h vc_stride_b vc_stride_s vc_stride_h "
    "k_stride_b k_stride_s k_stride_h v_stride_b v_stride_s v_stride_h "
    "cos_stride sin_stride max_positions"
).split()


@triton.jit
def cache_rows_of(place, fits, slot, page_table, table_stride, pages, page_size, cache_rows):
    """(row or page, place in it, fits) of the tokens at `place` of a cache row; nothing is read where not fits.

    A token fits no longer where the row does not exist, or the page that the table names.
    """
    fits = fits & (slot >= 0) & (slot < cache_rows)
    if page_table is None:
        row = slot.to(tl.int64)
        spot = place
    else:
        number = place // page_size
        page = tl.load(page_table + slot.to(tl.int64) * table_stride + number, mask=fits, other=-1)
        fits = fits & (page >= 0) & (page < pages)
        row = page.to(tl.int64)
        spot = place - number * page_size
    return row, spot.to(tl.int64), fits


@triton.jit(do_not_specialize=APPEND_INTEGERS)
def append_kernel(
    KCache,
    VCache,
    K,
    V,
    Lengths,
    Cos,
    Sin,
    cache_seqlens,
    cu_seqlens_k_new,
    page_table,
    cache_batch_idx,
    rotary_seqlens,
    new_tokens: tl.int32,
    batch: tl.int32,
    tiles_per_sequence: tl.int32,
    heads: tl.int32,
    capacity: tl.int32,
    cache_rows: tl.int32,
    pages: tl.int32,
    page_size: tl.int32,
    table_stride: tl.int64,
    kc_stride_b: tl.int64,
    kc_stride_s: tl.int64,
    kc_stride_h: tl.int64,
    vc_stride_b: tl.int64,
    vc_stride_s: tl.int64,
    vc_stride_h: tl.int64,
    k_stride_b: tl.int64,
    k_stride_s: tl.int64,
    k_stride_h: tl.int64,
    v_stride_b: tl.int64,
    v_stride_s: tl.int64,
    v_stride_h: tl.int64,
    cos_stride: tl.int64,
    sin_stride: tl.int64,
    max_positions: tl.int32,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """Grid: (tiles). A tile is BLOCK_M rows, row = new token * heads + head, of one sequence.

    The first tile of a sequence, which every sequence has, writes its length after the append.
    """
    seq, tile = locate(
        tl.program_id(0),
        tiles_per_sequence,
        cu_seqlens_k_new,
        batch,
        heads,
        BLOCK_M,
        cu_seqlens_k_new is not None,
    )
    k_offset, count = sequence_span(
        seq, cu_seqlens_k_new, None, new_tokens, aligned(k_stride_b, ALIGN), aligned(k_stride_s, ALIGN)
    )
    v_offset, _ = sequence_span(
        seq, cu_seqlens_k_new, None, new_tokens, aligned(v_stride_b, ALIGN), aligned(v_stride_s, ALIGN)
    )
    length = seq * 0
    if cache_seqlens is not None:
        length = tl.load(cache_seqlens + seq)
    slot = seq
    if cache_batch_idx is not None:
        slot = tl.load(cache_batch_idx + seq)
    if tile == 0:
        # What did not fit is not there; a sequence without a cache row has nothing.
        total = tl.maximum(tl.minimum(tl.minimum(length, capacity) + count, capacity), 0)
        tl.store(Lengths + seq, tl.where((slot >= 0) & (slot < cache_rows), total, 0))
    if tile * BLOCK_M >= count * heads:
        return

    row, token, head = fold_rows(tile * BLOCK_M, heads, BLOCK_M)
    place = length + token
    fits = (row < count * heads) & (place >= 0) & (place < capacity)
    cache_row, spot, fits = cache_rows_of(
        place, fits, slot, page_table, table_stride, pages, page_size, cache_rows
    )
    token_row = token.to(tl.int64)
    head = head.to(tl.int64)

    k_rows = k_offset + token_row * aligned(k_stride_s, ALIGN) + head * aligned(k_stride_h, ALIGN)
    if ROTARY_DIM > 0:
        first = length
        if rotary_seqlens is not None:
            first = tl.load(rotary_seqlens + seq)
        keys = load_rotated(
            K,
            k_rows,
            fits,
            first + token,
            Cos,
            Sin,
            cos_stride,
            sin_stride,
            max_positions,
            HEAD_DIM,
            0,
            BLOCK_D,
            ROTARY_DIM,
            INTERLEAVED,
            ROTARY_ALIGN,
        )
    else:
        keys = load_rows(K, k_rows, fits, HEAD_DIM, 0, BLOCK_D)
    v_rows = v_offset + token_row * aligned(v_stride_s, ALIGN) + head * aligned(v_stride_h, ALIGN)
    values = load_rows(V, v_rows, fits, HEAD_DIM_V, 0, BLOCK_DV)
    kc_rows = cache_row * aligned(kc_stride_b, ALIGN) + spot * aligned(kc_stride_s, ALIGN)
    store_rows(KCache, kc_rows + head * aligned(kc_stride_h, ALIGN), fits, keys, HEAD_DIM, 0, BLOCK_D)
    vc_rows = cache_row * aligned(vc_stride_b, ALIGN) + spot * aligned(vc_stride_s, ALIGN)
    store_rows(VCache, vc_rows + head * aligned(vc_stride_h, ALIGN), fits, values, HEAD_DIM_V, 0, BLOCK_DV)
