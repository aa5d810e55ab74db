"""New tokens of a decoding step: rotated and written into the cache by the program that is going to read them."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.fold import load_rows, store_rows
from headfold.kernels.parts.rotary import load_rotated
from headfold.planner.tiles import MOST_NEW

ROWS: tl.constexpr = tl.constexpr(MOST_NEW)


@triton.jit
def load_turned(
    X,
    offset,
    live,
    position,
    angles,
    HEAD_DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ANGLE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """Columns START..START+WIDTH of the rows at `offset`, rotated where the call has angles, and rounded as X is stored.

    angles is (address of cos, of sin, their row strides, number of positions), of kind ANGLE.
    """
    if ROTARY_DIM > 0:
        x = load_rotated(
            X,
            offset,
            live,
            position,
            pointer(angles[0], ANGLE, ROTARY_ALIGN),
            pointer(angles[1], ANGLE, ROTARY_ALIGN),
            angles[2],
            angles[3],
            angles[4],
            HEAD_DIM,
            START,
            WIDTH,
            ROTARY_DIM,
            INTERLEAVED,
            ROTARY_ALIGN,
        ).to(X.dtype.element_ty)
    else:
        x = load_rows(X, offset, live, HEAD_DIM, START, WIDTH)
    return x


@triton.jit
def load_turned_queries(
    Q,
    rows,
    live,
    sign,
    position,
    angles,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ANGLE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """`load_queries` of tile.py with rotation by constants: wide loads, one program a model."""
    q0 = load_turned(
        Q, rows, live, position, angles, HEAD_DIM, 0, D0, ANGLE, ROTARY_DIM, INTERLEAVED, ROTARY_ALIGN
    )
    q0 = (q0 * sign).to(Q.dtype.element_ty)
    q1 = q0
    if D1 > 0:
        q1 = load_turned(
            Q, rows, live, position, angles, HEAD_DIM, D0, D1, ANGLE, ROTARY_DIM, INTERLEAVED, ROTARY_ALIGN
        )
        q1 = (q1 * sign).to(Q.dtype.element_ty)
    return q0, q1


@triton.jit
def write_new_tokens(
    new,
    seq,
    kv_head,
    length,
    low,
    high,
    angle,
    angles,
    K_rows,
    V_rows,
    table,
    k_strides,
    v_strides,
    page,
    ELEMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    PAGED: tl.constexpr,
    ALIGN: tl.constexpr,
    ANGLE: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """Write those new tokens of a sequence that become keys low..high of it, for one KV head.

    Token t becomes key length + t. new is (addresses of the new keys and values, their strides (sequence, token, head),
    tokens of a sequence, pages of the cache); page is (page size, its magic, its shift) of row_offsets. A page that the
    cache does not have takes nothing. Whoever reads the keys must wait for all threads of the program.
    """
    New_k, New_v, k_new, v_new, count, pages = new
    token = tl.arange(0, ROWS)
    place = length + token
    live = (token < count) & (place >= low) & (place < high)
    # Every load comes before the first store.
    k_at = pointer(New_k, ELEMENT, ALIGN) + (
        seq.to(tl.int64) * aligned(k_new[0], ALIGN) + kv_head * aligned(k_new[2], ALIGN)
    )
    k_offset = token.to(tl.int64) * aligned(k_new[1], ALIGN)
    v_at = pointer(New_v, ELEMENT, ALIGN) + (
        seq.to(tl.int64) * aligned(v_new[0], ALIGN) + kv_head * aligned(v_new[2], ALIGN)
    )
    v_offset = token.to(tl.int64) * aligned(v_new[1], ALIGN)
    row = tl.zeros([ROWS], tl.int64)
    spot = place
    there = live
    if PAGED:
        number = divide(tl.maximum(place, 0), (page[1], page[2]))
        found = tl.load(table + number, mask=live, other=-1)
        there = live & (found >= 0) & (found < pages)
        row = found.to(tl.int64)
        spot = place - number * page[0]
    v0 = load_rows(v_at, v_offset, live, HEAD_DIM_V, 0, DV0)
    k0 = load_turned(
        k_at,
        k_offset,
        live,
        angle + token,
        angles,
        HEAD_DIM,
        0,
        D0,
        ANGLE,
        ROTARY_DIM,
        INTERLEAVED,
        ROTARY_ALIGN,
    )
    if D1 > 0:
        k1 = load_turned(
            k_at, k_offset, live, angle + token, angles, HEAD_DIM, D0, D1, ANGLE, ROTARY_DIM, INTERLEAVED,
            ROTARY_ALIGN,
        )  # fmt: skip
    if DV1 > 0:
        v1 = load_rows(v_at, v_offset, live, HEAD_DIM_V, DV0, DV1)
    k_to = row * aligned(k_strides[0], ALIGN) + spot.to(tl.int64) * aligned(k_strides[1], ALIGN)
    v_to = row * aligned(v_strides[0], ALIGN) + spot.to(tl.int64) * aligned(v_strides[1], ALIGN)
    store_rows(K_rows, k_to, there, k0, HEAD_DIM, 0, D0)
    store_rows(V_rows, v_to, there, v0, HEAD_DIM_V, 0, DV0)
    if D1 > 0:
        store_rows(K_rows, k_to, there, k1, HEAD_DIM, D0, D1)
    if DV1 > 0:
        store_rows(V_rows, v_to, there, v1, HEAD_DIM_V, DV0, DV1)
