"""Masks and biases: which keys a row sees beyond a band, and what is added to its scores (in log2 units)."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import BYTE, FLOAT, aligned, pointer, to_float


@triton.jit
def mask_elements(
    address, rows, first, stride_key, inside, TYPE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr
):
    """(BLOCK_M, BLOCK_N) elements of a mask, 0 where not inside. ALIGN > 1: keys lie side by side, and rows (offsets,
    (BLOCK_M,)) and first are multiples of it: what wide loads take."""
    j = aligned(first, ALIGN) + tl.arange(0, BLOCK_N)
    if ALIGN > 1:
        offsets = aligned(rows, ALIGN)[:, None] + j[None, :]
    else:
        offsets = rows[:, None] + j.to(tl.int64)[None, :] * stride_key
    return tl.load(pointer(address, TYPE, ALIGN) + offsets, mask=inside, other=0)


@triton.jit
def mask_bias(mask, first, sk, live, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """The bias of a mask for keys first.. of the rows of a tile, (BLOCK_M, BLOCK_N) float32: -inf hides a key.

    mask is (address, kind, wide, stride of a key, offsets of the rows (BLOCK_M,)): bool bytes, True keeps a key, or
    numbers that are added. wide: see mask_elements, in 16-byte units; WIDE > 0 promises so for elements of as many
    bytes. Rows that are not live and keys from sk on are not read.
    """
    address, kind, wide, stride_key, rows = mask
    inside = live[:, None] & (first + tl.arange(0, BLOCK_N) < sk)[None, :]
    if WIDE == 1:
        kept = mask_elements(address, rows, first, stride_key, inside, tl.uint8, 16, BLOCK_N)
        bias = tl.where(kept != 0, 0.0, float("-inf"))
    elif WIDE == 2:
        raw = mask_elements(address, rows, first, stride_key, inside, tl.int16, 8, BLOCK_N)
        bias = to_float(raw, kind) * 1.4426950408889634
    else:
        bias = any_mask_bias(mask, first, inside, BLOCK_N)
    return bias


@triton.jit
def any_mask_bias(mask, first, inside, BLOCK_N: tl.constexpr):
    """`mask_bias` of any kind and layout, under branches that all threads of a program take alike."""
    address, kind, wide, stride_key, rows = mask
    if kind == BYTE:
        if wide != 0:
            kept = mask_elements(address, rows, first, stride_key, inside, tl.uint8, 16, BLOCK_N)
        else:
            kept = mask_elements(address, rows, first, stride_key, inside, tl.uint8, 1, BLOCK_N)
        bias = tl.where(kept != 0, 0.0, float("-inf"))
    elif kind == FLOAT:
        if wide != 0:
            bias = mask_elements(address, rows, first, stride_key, inside, tl.float32, 4, BLOCK_N)
        else:
            bias = mask_elements(address, rows, first, stride_key, inside, tl.float32, 1, BLOCK_N)
        bias = bias * 1.4426950408889634
    else:
        if wide != 0:
            raw = mask_elements(address, rows, first, stride_key, inside, tl.int16, 8, BLOCK_N)
        else:
            raw = mask_elements(address, rows, first, stride_key, inside, tl.int16, 1, BLOCK_N)
        bias = to_float(raw, kind) * 1.4426950408889634
    return bias


@triton.jit
def tree_visible(tree, j, first_new, sq, live):
    """Where a tree mask lets rows see keys j: every key before first_new, and of the newest sq those it lists.

    tree is (address of bytes, offsets of the rows (BLOCK_M,)).
    """
    address, rows = tree
    column = j - first_new
    inside = live[:, None] & ((column >= 0) & (column < sq))[None, :]
    at = pointer(address, tl.uint8, 1) + rows[:, None] + column.to(tl.int64)[None, :]
    listed = tl.load(at, mask=inside, other=0)
    return (column < 0)[None, :] | (listed != 0)


@triton.jit
def linear_bias(slope, position, j):
    """ALiBi (Press et al. 2022) in log2 units: -slope * |position - j| per row, (BLOCK_M, BLOCK_N)."""
    distance = tl.abs(position[:, None] - j[None, :]).to(tl.float32)
    return distance * (slope * -1.4426950408889634)[:, None]
