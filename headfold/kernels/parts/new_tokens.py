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
def cache_rows(
    place, live, table, pages, page, k_strides, v_strides, PAGED: tl.constexpr, ALIGN: tl.constexpr
):
    """(offsets of keys `place` of a sequence among its keys, among its values, which of them there are).

    page is (page size, its magic, its shift) of row_offsets. A page that the cache does not have takes nothing.
    """
    row = tl.zeros_like(place).to(tl.int64)
    spot = place
    if PAGED:
        number = divide(tl.maximum(place, 0), (page[1], page[2]))
        found = tl.load(table + number, mask=live, other=-1)
        live = live & (found >= 0) & (found < pages)
        row = found.to(tl.int64)
        spot = place - number * page[0]
    spot = spot.to(tl.int64)
    keys = row * aligned(k_strides[0], ALIGN) + spot * aligned(k_strides[1], ALIGN)
    values = row * aligned(v_strides[0], ALIGN) + spot * aligned(v_strides[1], ALIGN)
    return keys, values, live


@triton.jit
def append_and_load_queries(
    Q,
    q_rows,
    live,
    sign,
    positions,
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
    BLOCK_M: tl.constexpr,
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
    """Both parts of a tile's queries, turned, and the new tokens that become keys low..high of the sequence written.

    Token t becomes key length + t. new is (addresses of the new keys and values, their strides (sequence, token, head),
    tokens of a sequence, pages of the cache). The new keys are turned in the tile's last rows, which are no queries': what
    a program does once is as long as it has instructions, for none is in a cache yet (500 take 2 us), and these are done
    already. All threads have written behind this.
    """
    New_k, New_v, k_new, v_new, count, pages = new
    SHIFT: tl.constexpr = 1 if Q.dtype.element_ty.primitive_bitwidth == 16 else 2
    token = tl.arange(0, BLOCK_M) - (BLOCK_M - count)
    is_new = token >= 0
    base = (New_k - Q.to(tl.int64)) >> SHIFT
    base += seq.to(tl.int64) * aligned(k_new[0], ALIGN) + kv_head * aligned(k_new[2], ALIGN)
    k_from = aligned(base, ALIGN) + token.to(tl.int64) * aligned(k_new[1], ALIGN)
    rows = tl.where(is_new, k_from, q_rows)
    at = tl.where(is_new, angle + token, positions)
    # Before anything that waits.
    v_from = pointer(New_v, Q.dtype.element_ty, ALIGN) + (
        seq.to(tl.int64) * aligned(v_new[0], ALIGN) + kv_head * aligned(v_new[2], ALIGN)
    )
    v_token = tl.arange(0, ROWS)
    v_place = length + v_token
    v_live = (v_token < count) & (v_place >= low) & (v_place < high)
    v_offset = v_token.to(tl.int64) * aligned(v_new[1], ALIGN)
    v0 = load_rows(v_from, v_offset, v_live, HEAD_DIM_V, 0, DV0)
    x0 = load_turned(
        Q, rows, live | is_new, at, angles, HEAD_DIM, 0, D0, ANGLE, ROTARY_DIM, INTERLEAVED, ROTARY_ALIGN
    )
    x1 = x0
    if D1 > 0:
        x1 = load_turned(
            Q, rows, live | is_new, at, angles, HEAD_DIM, D0, D1, ANGLE, ROTARY_DIM, INTERLEAVED, ROTARY_ALIGN
        )
    q0 = (x0 * sign).to(Q.dtype.element_ty)
    q1 = (x1 * sign).to(Q.dtype.element_ty)
    if (length < high) & (length + count > low):
        place = length + token
        k_live = is_new & (place >= low) & (place < high)
        k_to, _, k_live = cache_rows(place, k_live, table, pages, page, k_strides, v_strides, PAGED, ALIGN)
        store_rows(K_rows, k_to, k_live, x0, HEAD_DIM, 0, D0)
        if D1 > 0:
            store_rows(K_rows, k_to, k_live, x1, HEAD_DIM, D0, D1)
        _, v_to, v_there = cache_rows(v_place, v_live, table, pages, page, k_strides, v_strides, PAGED, ALIGN)
        store_rows(V_rows, v_to, v_there, v0, HEAD_DIM_V, 0, DV0)
        if DV1 > 0:
            v1 = load_rows(v_from, v_offset, v_live, HEAD_DIM_V, DV0, DV1)
            store_rows(V_rows, v_to, v_there, v1, HEAD_DIM_V, DV0, DV1)
        # Other threads read them.
        tl.debug_barrier()
    return q0, q1
