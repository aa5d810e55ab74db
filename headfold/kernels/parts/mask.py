"""Masks and biases: which keys a row sees beyond a band, and what is added to its scores (in log2 units)."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import BYTE, FLOAT, aligned, load_index, pointer, to_float


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
def to_bias(raw, kind):
    """What elements of a mask, as they were loaded, add to scores: float32 in log2 units, -inf to hide a key."""
    if raw.dtype == tl.uint8:
        bias = tl.where(raw != 0, 0.0, float("-inf"))
    elif raw.dtype == tl.float32:
        bias = raw * 1.4426950408889634
    else:
        bias = to_float(raw, kind) * 1.4426950408889634
    return bias


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
        bias = to_bias(mask_elements(address, rows, first, stride_key, inside, tl.uint8, 16, BLOCK_N), kind)
    elif WIDE == 2:
        bias = to_bias(mask_elements(address, rows, first, stride_key, inside, tl.int16, 8, BLOCK_N), kind)
    else:
        bias = any_mask_bias(mask, first, inside, BLOCK_N)
    return bias


@triton.jit
def any_mask_bias(mask, first, inside, BLOCK_N: tl.constexpr):
    """`mask_bias` of any kind and layout, under branches that all threads of a program take alike."""
    address, kind, wide, stride_key, rows = mask
    if kind == BYTE:
        if wide != 0:
            raw = mask_elements(address, rows, first, stride_key, inside, tl.uint8, 16, BLOCK_N)
        else:
            raw = mask_elements(address, rows, first, stride_key, inside, tl.uint8, 1, BLOCK_N)
        bias = to_bias(raw, kind)
    elif kind == FLOAT:
        if wide != 0:
            numbers = mask_elements(address, rows, first, stride_key, inside, tl.float32, 4, BLOCK_N)
        else:
            numbers = mask_elements(address, rows, first, stride_key, inside, tl.float32, 1, BLOCK_N)
        bias = to_bias(numbers, kind)
    else:
        if wide != 0:
            bits = mask_elements(address, rows, first, stride_key, inside, tl.int16, 8, BLOCK_N)
        else:
            bits = mask_elements(address, rows, first, stride_key, inside, tl.int16, 1, BLOCK_N)
        bias = to_bias(bits, kind)
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
def untouched_blocks(key_low, blocks, sq, sk, mask, tree, BLOCK_N: tl.constexpr):
    """How many of `blocks` blocks of keys from key_low on come before all that a mask or a tree (addresses, 0 for none)
    says something about: none under a mask, those that end before the newest sq keys under a tree, else all."""
    before = tl.minimum(tl.maximum(sk - sq - key_low, 0) // BLOCK_N, blocks)
    return tl.where(mask != 0, 0, tl.where(tree != 0, before, blocks))


@triton.jit
def list_at(lists, offset, blocks):
    """(address of the block numbers of the list at `offset`, 0 without lists; how many they are, else `blocks`)."""
    numbers = tl.where(lists != 0, lists + 4 * offset + 4, 0)
    return numbers, load_index(numbers, -1, blocks)


@triton.jit
def linear_bias(slope, position, j):
    """ALiBi (Press et al. 2022) in log2 units: -slope * |position - j| per row, (BLOCK_M, BLOCK_N)."""
    distance = tl.abs(position[:, None] - j[None, :]).to(tl.float32)
    return distance * (slope * -1.4426950408889634)[:, None]
