"""Masks and biases given as tensors: which keys a row sees, and what is added to its scores."""

import triton
import triton.language as tl


@triton.constexpr_function
def has_bias(slopes, mask):
    """True when something is added to the scores: the state's maximum is then in log2 units."""
    return slopes is not None or (mask is not None and mask.dtype.element_ty.is_floating())


@triton.jit
def tensor_mask(visible, Mask, rows, stride_key, j, sk, live, MASK_ALIGN: tl.constexpr):
    """`visible` (BLOCK_M, BLOCK_N) under a bool or additive mask; the bias in log2 units (0 for a bool mask).

    `rows` (BLOCK_M,) are the offsets of the rows in the mask. A bias of -inf hides a key, as False does.
    MASK_ALIGN > 0: keys lie side by side and rows start at multiples of it, so that loads are wide ones.
    """
    inside = live[:, None] & (j < sk)[None, :]
    if MASK_ALIGN > 0:
        offsets = rows[:, None] + j[None, :]
    else:
        offsets = rows[:, None] + j.to(tl.int64)[None, :] * stride_key
    value = tl.load(Mask + offsets, mask=inside, other=0)
    if Mask.dtype.element_ty.is_int():
        visible = visible & (value != 0)
        bias = tl.zeros(value.shape, tl.float32)
    else:
        bias = value.to(tl.float32) * 1.4426950408889634
        visible = visible & (bias > float("-inf"))
    return visible, bias


@triton.jit
def tree_visible(visible, Tree, rows, j, first_new, sq, live):
    """`visible` under a tree mask: a row sees every key before first_new, and of the newest sq those it lists."""
    column = j - first_new
    inside = live[:, None] & ((column >= 0) & (column < sq))[None, :]
    listed = tl.load(Tree + rows[:, None] + column.to(tl.int64)[None, :], mask=inside, other=0)
    return visible & ((column < 0)[None, :] | (listed != 0))


@triton.jit
def linear_bias(slope, position, j):
    """ALiBi (Press et al. 2022) in log2 units: -slope * |position - j| per row, (BLOCK_M, BLOCK_N)."""
    distance = tl.abs(position[:, None] - j[None, :]).to(tl.float32)
    return distance * (slope * -1.4426950408889634)[:, None]
