"""Rotary embedding: load rows of q or new k turned by the angles of their positions (Su et al. 2021)."""

import triton
import triton.language as tl

from headfold.kernels.parts.fold import load_rows
from headfold.kernels.parts.kv import aligned


@triton.jit
def load_angles(Table, stride, position, known, pair, HALF: tl.constexpr, ALIGN: tl.constexpr):
    """cos or sin of each row's position for the given pairs, float32; 0 where there is no such entry."""
    rows = position.to(tl.int64) * aligned(stride, ALIGN)
    mask = known[:, None] & (pair < HALF)[None, :]
    return tl.load(Table + rows[:, None] + pair[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rotated(
    X,
    offset,
    live,
    position,
    Cos,
    Sin,
    cos_stride,
    sin_stride,
    max_positions,
    HEAD_DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Columns START..START+WIDTH of the rows at `offset`, rotated, (M, WIDTH) float32: `load_rows` and a turn.

    Column c < ROTARY_DIM (even, at most HEAD_DIM) pairs with c ^ 1 if INTERLEAVED, else with c +- ROTARY_DIM / 2,
    wherever the part of the head that is loaded ends; further columns stay as they are. START is even.
    Cos, Sin are (max_positions, ROTARY_DIM / 2), ALIGN what their row strides are multiples of, position (M,) the
    angles' rows. A live row whose position lies outside becomes NaN: nothing is read there. Round once, to what
    the rows are for.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    x = load_rows(X, offset, live, HEAD_DIM, START, WIDTH).to(tl.float32)
    if START < ROTARY_DIM:
        known = live & (position >= 0) & (position < max_positions)
        column = START + tl.arange(0, WIDTH)
        if INTERLEAVED:
            # Pairs lie side by side: they are taken apart in registers, and every load stays a wide one.
            pair = START // 2 + tl.arange(0, WIDTH // 2)
            cos = load_angles(Cos, cos_stride, position, known, pair, HALF, ALIGN)
            sin = load_angles(Sin, sin_stride, position, known, pair, HALF, ALIGN)
            even, odd = tl.split(tl.reshape(x, [x.shape[0], WIDTH // 2, 2]))
            turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
            turned = tl.reshape(turned, [x.shape[0], WIDTH])
        else:
            lower = column < HALF
            pair = tl.where(lower, column, column - HALF)
            cos = load_angles(Cos, cos_stride, position, known, pair, HALF, ALIGN)
            sin = load_angles(Sin, sin_stride, position, known, pair, HALF, ALIGN)
            partner = tl.where(lower, column + HALF, column - HALF)
            other = tl.load(
                X + offset[:, None] + partner[None, :],
                mask=live[:, None] & (column < ROTARY_DIM)[None, :],
                other=0.0,
            ).to(tl.float32)
            turned = x * cos + tl.where(lower[None, :], -other, other) * sin
        turned = tl.where((live & (known == 0))[:, None], float("nan"), turned)
        if START + WIDTH > ROTARY_DIM:
            turned = tl.where((column < ROTARY_DIM)[None, :], turned, x)
        x = turned
    return x
