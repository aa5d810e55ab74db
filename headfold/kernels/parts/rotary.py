"""Rotary embedding: load rows of q or new k turned by the angles of their positions (Su et al. 2021)."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, load_float
from headfold.kernels.parts.fold import load_rows


@triton.jit
def load_angles(Table, stride, position, known, pair, HALF: tl.constexpr, ALIGN: tl.constexpr):
    """cos or sin of each row's position for the given pairs, float32; 0 where there is no such entry."""
    rows = position.to(tl.int64) * aligned(stride, ALIGN)
    mask = known[:, None] & (pair < HALF)[None, :]
    # Every layer reads the same few rows, and between two of them the cache streams through L2.
    angles = tl.load(
        Table + rows[:, None] + pair[None, :], mask=mask, other=0.0, eviction_policy="evict_last"
    )
    return angles.to(tl.float32)


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
            turned = tl.join(tl.fma(even, cos, -odd * sin), tl.fma(odd, cos, even * sin))
            turned = tl.reshape(turned, [x.shape[0], WIDTH])
        else:
            lower = column < HALF
            pair = tl.where(lower, column, column - HALF)
            partner = tl.where(lower, column + HALF, column - HALF)
            # Before the angles, whose addresses wait for the position.
            other = tl.load(
                X + offset[:, None] + partner[None, :],
                mask=live[:, None] & (column < ROTARY_DIM)[None, :],
                other=0.0,
            ).to(tl.float32)
            cos = load_angles(Cos, cos_stride, position, known, pair, HALF, ALIGN)
            sin = load_angles(Sin, sin_stride, position, known, pair, HALF, ALIGN)
            # Which product is rounded is said, not left to the compiler: other kernels must get the same bits.
            turned = tl.fma(x, cos, tl.where(lower[None, :], -other, other) * sin)
        turned = tl.where((live & (known == 0))[:, None], float("nan"), turned)
        if START + WIDTH > ROTARY_DIM:
            turned = tl.where((column < ROTARY_DIM)[None, :], turned, x)
        x = turned
    return x


@triton.jit
def turn_rows(x, X, offset, live, position, rotary, START: tl.constexpr, WIDTH: tl.constexpr):
    """`load_rotated` of columns x (M, WIDTH) that are already loaded from X, whatever the pairs and the angles.

    rotary is (address of cos, of sin, kind of both, their row strides, number of positions, rotary_dim, whether pairs
    lie side by side), all known at run time only: one program serves every model, at the price of narrow loads.
    """
    cos_address, sin_address, kind, cos_stride, sin_stride, positions, dim, side_by_side = rotary
    half = dim // 2
    column = START + tl.arange(0, WIDTH)
    lower = tl.where(side_by_side != 0, column % 2 == 0, column < half)
    pair = tl.where(side_by_side != 0, column // 2, tl.where(lower, column, column - half))
    step = tl.where(side_by_side != 0, 1, half)
    partner = tl.where(lower, column + step, column - step)
    turns = (column < dim)[None, :]
    known = live & (position >= 0) & (position < positions)
    rows = position.to(tl.int64)[:, None]
    cos = load_float(cos_address, kind, rows * cos_stride + pair[None, :], known[:, None] & turns)
    sin = load_float(sin_address, kind, rows * sin_stride + pair[None, :], known[:, None] & turns)
    other = tl.load(X + offset[:, None] + partner[None, :], mask=live[:, None] & turns, other=0.0).to(
        tl.float32
    )
    turned = tl.fma(x.to(tl.float32), cos, tl.where(lower[None, :], -other, other) * sin)
    turned = tl.where((live & (known == 0))[:, None], float("nan"), turned)
    return tl.where(turns, turned.to(x.dtype), x)
