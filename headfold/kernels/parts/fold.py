"""Fold: the map between (query position, head in group) and the rows of a tile."""

import triton
import triton.language as tl


@triton.jit
def fold_rows(first, fold, BLOCK_M: tl.constexpr):
    """Rows first..first+BLOCK_M of a folded query matrix: (row, position, head in group), each (BLOCK_M,)."""
    row = first + tl.arange(0, BLOCK_M)
    position = row // fold
    return row, position, row - position * fold


@triton.jit
def load_rows(X, offset, live, HEAD_DIM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Columns START..START+WIDTH of the rows at `offset`, 0 where a row is not live or a column not there."""
    column = START + tl.arange(0, WIDTH)
    mask = live[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    return tl.load(X + offset[:, None] + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(X, offset, live, value, HEAD_DIM: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr):
    """Write `value` (BLOCK_M, WIDTH) to columns START.. of the live rows at `offset`, rounded to X's dtype."""
    column = START + tl.arange(0, WIDTH)
    mask = live[:, None]
    if START + WIDTH > HEAD_DIM:
        mask = mask & (column < HEAD_DIM)[None, :]
    tl.store(X + offset[:, None] + column[None, :], value.to(X.dtype.element_ty), mask=mask)
