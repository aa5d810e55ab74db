"""Prefetch: rows of K and V on their way into the L2 cache before anything else is ready."""

import triton
import triton.language as tl

LINE: tl.constexpr = tl.constexpr(128)  # bytes of a line of the L2 cache


@triton.jit
def prefetch_rows(X, stride, first, blocks, last, BLOCK_N: tl.constexpr, BYTES: tl.constexpr):
    """Ask for `blocks` blocks of BLOCK_N rows from row `first` on, for none beyond row `last`.

    X is the address of row 0, stride in bytes, BYTES those of a row. Nothing is read, so that it may be done while
    the rows are still being written: the L2 cache is where such writes go.
    """
    LINES: tl.constexpr = triton.next_power_of_2((BYTES + LINE - 1) // LINE)
    n = tl.arange(0, BLOCK_N * LINES)
    for block in range(blocks):
        row = tl.minimum(first + block * BLOCK_N + n // LINES, last)
        at = X + row.to(tl.int64) * stride + tl.minimum(n % LINES * LINE, BYTES - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )
