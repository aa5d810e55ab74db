"""Append: write new keys, rotated where angles are given, and values into a cache in place, and rotate q with them."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, load_index, load_kept, pointer
from headfold.kernels.parts.fold import fold_rows, load_rows, store_rows
from headfold.kernels.parts.rotary import load_rotated
from headfold.kernels.parts.tile import locate

# Plain arguments all: see specialize.py.
APPEND_ARGUMENTS = (
    "KCache VCache K V Lengths Q Turned cos sin cache_seqlens cu_seqlens_k_new page_table cache_batch_idx "
    "rotary_seqlens cu_seqlens_q new_tokens batch key_tiles tiles_per_sequence heads capacity cache_rows pages "
    "page_size table_stride kc_stride_b kc_stride_s kc_stride_h vc_stride_b vc_stride_s vc_stride_h "
    "k_stride_b k_stride_s k_stride_h v_stride_b v_stride_s v_stride_h cos_stride sin_stride max_positions "
    "queries q_tiles_per_sequence q_heads q_advances q_stride_b q_stride_s q_stride_h "
    "turned_stride_b turned_stride_s turned_stride_h"
).split()


@triton.jit
def cache_rows_of(place, fits, slot, page_table, table_stride, pages, page_size, cache_rows):
    """(row or page, place in it, fits) of the tokens at `place` of a cache row; nothing is read where not fits.

    A token fits no longer where the row does not exist, or the page that the table names. page_table is an address.
    """
    fits = fits & (slot >= 0) & (slot < cache_rows)
    paged = page_table != 0
    number = tl.where(paged, place // page_size, 0)
    entries = pointer(page_table, tl.int32, 1) + slot.to(tl.int64) * table_stride
    page = tl.load(entries + number, mask=fits & paged, other=-1)
    fits = fits & ((paged == 0) | ((page >= 0) & (page < pages)))
    row = tl.where(paged, page, slot).to(tl.int64)
    return row, (place - number * page_size).to(tl.int64), fits


@triton.jit(do_not_specialize=APPEND_ARGUMENTS)
def append_kernel(
    KCache: tl.int64,
    VCache: tl.int64,
    K: tl.int64,
    V: tl.int64,
    Lengths: tl.int64,
    Q: tl.int64,
    Turned: tl.int64,
    cos: tl.int64,
    sin: tl.int64,
    cache_seqlens: tl.int64,
    cu_seqlens_k_new: tl.int64,
    page_table: tl.int64,
    cache_batch_idx: tl.int64,
    rotary_seqlens: tl.int64,
    cu_seqlens_q: tl.int64,
    new_tokens: tl.int32,
    batch: tl.int32,
    key_tiles: tl.int32,
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
    queries: tl.int32,
    q_tiles_per_sequence: tl.int32,
    q_heads: tl.int32,
    q_advances: tl.int32,
    q_stride_b: tl.int64,
    q_stride_s: tl.int64,
    q_stride_h: tl.int64,
    turned_stride_b: tl.int64,
    turned_stride_s: tl.int64,
    turned_stride_h: tl.int64,
    ELEMENT: tl.constexpr,
    ANGLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ALIGN: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Grid: (key_tiles + tiles of q). A tile is BLOCK_M rows, row = token * heads + head, of one sequence.

    Tensors come as addresses, 0 for one that was not given. The first tile of keys of a sequence, which every sequence
    has, writes its length after the append. The tiles of q write it, rotated, to Turned.

    EARLY: launched while the kernel before this one ends, and waits for it here; the attention that follows starts early.
    """
    if EARLY:
        # In this order: the attention reads the lengths of before the append as soon as it starts.
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    number = tl.program_id(0)
    turns_q = number >= key_tiles
    if turns_q:
        number -= key_tiles
        tiles_per_sequence = q_tiles_per_sequence
        cu_seqlens_k_new = cu_seqlens_q
        heads = q_heads
        new_tokens = queries
    seq, tile = locate(number, tiles_per_sequence, cu_seqlens_k_new, batch, heads, BLOCK_M)
    first = load_index(cu_seqlens_k_new, seq, 0)
    count = load_index(cu_seqlens_k_new, seq + 1, new_tokens) - first
    length = load_kept(cache_seqlens, seq, 0)
    angle = tl.where(rotary_seqlens != 0, load_kept(rotary_seqlens, seq, 0), length)
    slot = load_index(cache_batch_idx, seq, seq)
    if tile * BLOCK_M < count * heads:
        row, token, head = fold_rows(tile * BLOCK_M, heads, BLOCK_M)
        live = row < count * heads
        token_row = (first + token).to(tl.int64)
        head = head.to(tl.int64)
        batch_row = seq.to(tl.int64)
        cos_rows = pointer(cos, ANGLE, ROTARY_ALIGN)
        sin_rows = pointer(sin, ANGLE, ROTARY_ALIGN)
        if turns_q:
            if ROTARY_DIM > 0:
                q_rows = batch_row * aligned(q_stride_b, ALIGN) + token_row * aligned(q_stride_s, ALIGN)
                turned = load_rotated(
                    pointer(Q, ELEMENT, ALIGN),
                    q_rows + head * aligned(q_stride_h, ALIGN),
                    live,
                    angle + token * q_advances,
                    cos_rows,
                    sin_rows,
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
                t_rows = batch_row * aligned(turned_stride_b, ALIGN)
                t_rows += token_row * aligned(turned_stride_s, ALIGN) + head * aligned(turned_stride_h, ALIGN)
                store_rows(pointer(Turned, ELEMENT, ALIGN), t_rows, live, turned, HEAD_DIM, 0, BLOCK_D)
        else:
            # Every load that does not wait for the length comes before those that do, and before any store.
            v_rows = batch_row * aligned(v_stride_b, ALIGN) + token_row * aligned(v_stride_s, ALIGN)
            v_rows += head * aligned(v_stride_h, ALIGN)
            values = load_rows(pointer(V, ELEMENT, ALIGN), v_rows, live, HEAD_DIM_V, 0, BLOCK_DV)
            k_rows = batch_row * aligned(k_stride_b, ALIGN) + token_row * aligned(k_stride_s, ALIGN)
            k_rows += head * aligned(k_stride_h, ALIGN)
            if ROTARY_DIM > 0:
                keys = load_rotated(
                    pointer(K, ELEMENT, ALIGN),
                    k_rows,
                    live,
                    angle + token,
                    cos_rows,
                    sin_rows,
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
                keys = load_rows(pointer(K, ELEMENT, ALIGN), k_rows, live, HEAD_DIM, 0, BLOCK_D)
            place = length + token
            fits = live & (place >= 0) & (place < capacity)
            cache_row, spot, fits = cache_rows_of(
                place, fits, slot, page_table, table_stride, pages, page_size, cache_rows
            )
            kc_rows = cache_row * aligned(kc_stride_b, ALIGN) + spot * aligned(kc_stride_s, ALIGN)
            kc_rows += head * aligned(kc_stride_h, ALIGN)
            store_rows(pointer(KCache, ELEMENT, ALIGN), kc_rows, fits, keys, HEAD_DIM, 0, BLOCK_D)
            vc_rows = cache_row * aligned(vc_stride_b, ALIGN) + spot * aligned(vc_stride_s, ALIGN)
            vc_rows += head * aligned(vc_stride_h, ALIGN)
            store_rows(pointer(VCache, ELEMENT, ALIGN), vc_rows, fits, values, HEAD_DIM_V, 0, BLOCK_DV)
    if (tile == 0) & (turns_q == 0):
        # What did not fit is not there; a sequence without a cache row has nothing.
        total = tl.maximum(tl.minimum(tl.minimum(length, capacity) + count, capacity), 0)
        total = tl.where((slot >= 0) & (slot < cache_rows), total, 0)
        tl.store(pointer(Lengths, tl.int32, 1) + seq, total)
