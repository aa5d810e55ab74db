"""KV addressing: where key j of a sequence lies, in dense, ragged and paged caches."""

import triton
import triton.language as tl

from headfold.kernels.parts.spans import sequence_span


@triton.jit
def aligned(stride, ALIGN: tl.constexpr):
    """The same stride, known to the compiler as a multiple of ALIGN: what the host has checked.

    tl.multiple_of on an argument is lost on the way through an inlined function (Triton 3.6 to 3.9); a product
    with a constant is not, and 16-byte copies depend on it.
    """
    return stride // ALIGN * ALIGN if ALIGN > 1 else stride


@triton.jit
def row_offsets(
    j, table, stride_page, stride_row, page_size, page_magic, page_shift, pad, ALIGN: tl.constexpr
):
    """Element offsets (int64) of keys j, relative to the sequence (dense, ragged) or to the cache (paged).

    Every j must be a key of the sequence: the page table is read for it without a mask. The quotient
    j // page_size is the high half of 2j * page_magic, page_magic = ceil(2**(31 + page_shift) / page_size) with
    page_shift = ceil(log2(page_size)): exact for j < 2**31 (Granlund and Montgomery 1994), so that any page size
    costs the same two 32-bit instructions.
    """
    stride_row = aligned(stride_row, ALIGN)
    if table is None:
        offsets = j.to(tl.int64) * stride_row
    else:
        j = j + pad
        high = ((2 * j).to(tl.uint64) * page_magic.to(tl.uint64)) >> 32
        number = (high.to(tl.uint32) >> page_shift).to(tl.int32)
        page = tl.load(table + number).to(tl.int64) * aligned(stride_page, ALIGN)
        offsets = page + (j - number * page_size).to(tl.int64) * stride_row
    return offsets


@triton.jit
def sequence_keys(
    seq,
    pad,
    cu_seqlens_k,
    seqused_k,
    cache_batch_idx,
    capacity,
    k_strides,
    v_strides,
    ALIGN: tl.constexpr,
):
    """Where the keys of a sequence begin and how many there are: (offset in K, offset in V, its row of the cache or
    page table, length). `pad` keys of the row are skipped; strides are (row of the cache, key)."""
    k_offset, sk = sequence_span(
        seq, cu_seqlens_k, seqused_k, capacity, aligned(k_strides[0], ALIGN), aligned(k_strides[1], ALIGN)
    )
    v_offset, _ = sequence_span(
        seq, cu_seqlens_k, seqused_k, capacity, aligned(v_strides[0], ALIGN), aligned(v_strides[1], ALIGN)
    )
    row = seq
    if cache_batch_idx is not None:
        row = tl.load(cache_batch_idx + seq)
        k_offset = row.to(tl.int64) * aligned(k_strides[0], ALIGN)
        v_offset = row.to(tl.int64) * aligned(v_strides[0], ALIGN)
    k_offset += pad * aligned(k_strides[1], ALIGN)
    v_offset += pad * aligned(v_strides[1], ALIGN)
    return k_offset, v_offset, row, tl.maximum(sk - pad, 0)
