"""Masks and biases given as tensors: which keys a row sees, and what is added to its scores."""

import triton
import triton.language as tl


@triton.constexpr_function
def has_bias(slopes, mask):
    """True when something is added to the scores: the state's maximum is then in log2 units."""
    return slopes is not None or (mask is not None and mask.dtype.element_ty.is_floating())


@triton.constexpr_function
def is_bool(mask):
    """True for a mask that keeps or hides keys, False for one that is added, and for none."""
    return mask is not None and mask.dtype.element_ty.is_int()


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
def alive_blocks(
    Mask,
    rows,
    stride_key,
    key_low,
    blocks,
    row_low,
    row_high,
    sk,
    live,
    BLOCK_N: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
):
    """First and past-the-last block of which the mask leaves some row of the tile a key; equal if there is none.

    The mask is read twice for it, and the blocks before and after are not computed: what causal, sliding, padding
    and document masks kill. (Additive masks are dense as a rule, and 1.5 times slower with a second reading: they
    go without.) A test inside the loop would skip blocks between as well, but Triton does not pipeline a
    conditional product (1.7 times the time where no block dies, H200), and 3.6 computes some wrongly.
    """
    first = blocks
    last = 0
    for block in range(blocks):
        j = key_low + block * BLOCK_N + tl.arange(0, BLOCK_N)
        visible = (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
        visible, _ = tensor_mask(visible, Mask, rows, stride_key, j, sk, live, MASK_ALIGN)
        alive = tl.max(tl.max(visible.to(tl.int32), 1), 0)
        first = tl.minimum(first, tl.where(alive > 0, block, blocks))
        last = tl.where(alive > 0, block + 1, last)
    return first, last


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
