"""Prefetch: rows of K and V on their way into the L2 cache before anything else is ready."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import times

LINE: tl.constexpr = tl.constexpr(128)  # bytes of a line of the L2 cache
PREFETCH: tl.constexpr = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")


@triton.jit
def prefetch_rows(
    X,
    stride,
    first,
    last,
    BLOCK_N: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Ask for the block of BLOCK_N rows from row `first` on, for none beyond row `last`.

    X is the address of row 0, stride in elements of SIZE bytes, HEAD_DIM those of a row. Nothing is read, so that it may
    be done while the rows are still being written: the L2 cache is where such writes go.
    """
    BYTES: tl.constexpr = HEAD_DIM * SIZE
    LINES: tl.constexpr = triton.next_power_of_2((BYTES + LINE - 1) // LINE)
    n = tl.arange(0, BLOCK_N * LINES)
    row = tl.minimum(first + n // LINES, last)
    at = X + times(row, stride, ALIGN) * SIZE + tl.minimum(n % LINES * LINE, BYTES - 1)
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)
