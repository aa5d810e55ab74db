"""KV addressing: where key j of a sequence lies, in dense, ragged and paged caches."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, times


@triton.jit
def row_offsets(
    j, table, strides, page_size, page_magic, page_shift, pad, PAGED: tl.constexpr, ALIGN: tl.constexpr
):
    """Element offsets (int64) of keys j, relative to the sequence (dense, ragged) or to the cache (paged).

    strides are (cache row or page, key). Every j must be a key of the sequence: the page table is read for it
    without a mask. The quotient j // page_size is the high half of 2j * page_magic, page_magic = ceil(2**(31 +
    page_shift) / page_size) with page_shift = ceil(log2(page_size)): exact for j < 2**31 (Granlund and Montgomery
    1994), so that any page size costs the same two 32-bit instructions.
    """
    if PAGED:
        j = j + pad
        high = ((2 * j).to(tl.uint64) * page_magic.to(tl.uint64)) >> 32
        number = (high.to(tl.uint32) >> page_shift).to(tl.int32)
        # In 64 bits: 32:32 b4 s65536 in pages of 64 takes 965 us, and 977 with `times`, which has fewer instructions.
        page = tl.load(table + number).to(tl.int64) * aligned(strides[0], ALIGN)
        offsets = page + (j - number * page_size).to(tl.int64) * aligned(strides[1], ALIGN)
    else:
        offsets = times(j, strides[1], ALIGN)
    return offsets
