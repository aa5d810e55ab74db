"""Tile: where a program's folded queries come from and where their results go. Shared by decode and prefill."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import pointer
from headfold.kernels.parts.fold import load_rows, store_rows
from headfold.kernels.parts.rotary import turn_rows
from headfold.kernels.parts.softmax import add_sink, softmax_finish
from headfold.kernels.parts.spans import find_sequence, visible_keys


@triton.jit
def locate(tile, tiles_per_sequence, cu_seqlens_q, batch, fold, BLOCK_M: tl.constexpr):
    """(sequence, tile within it) of a program's tile number; tiles_per_sequence 0: packed tiles, which search."""
    if tiles_per_sequence == 0:
        seq, tile = find_sequence(tile, cu_seqlens_q, batch, fold, BLOCK_M)
    else:
        seq = tile // tiles_per_sequence
        tile = tile - seq * tiles_per_sequence
    return seq, tile


@triton.jit
def load_part(
    Q,
    rows,
    live,
    sign,
    angles,
    rotary,
    HEAD_DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Columns START..START+WIDTH of a tile's queries, rotated where asked and rounded as a stored q would be."""
    part = load_rows(Q, rows, live, HEAD_DIM, START, WIDTH)
    if ROTARY:
        if rotary[6] > 0:
            part = turn_rows(part, Q, rows, live, angles, rotary, START, WIDTH)
    return (part * sign).to(Q.dtype.element_ty)


@triton.jit
def load_queries(
    Q,
    rows,
    live,
    sign,
    angles,
    rotary,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Both parts of a tile's queries, negated when the softmax scale is negative (exact in any precision)."""
    q0 = load_part(Q, rows, live, sign, angles, rotary, HEAD_DIM, 0, D0, ROTARY)
    q1 = q0
    if D1 > 0:
        q1 = load_part(Q, rows, live, sign, angles, rotary, HEAD_DIM, D0, D1, ROTARY)
    return q0, q1


@triton.jit
def tile_keys(first, last, sk, shift, window_left, window_right, chunk, FEATURED: tl.constexpr):
    """What the mask leaves of the keys of a tile of the query positions first..last: (first key that any row sees, end of
    the keys that any row sees, first key that all rows see, end of the keys that all rows see)."""
    low, full_high = visible_keys(first, shift, window_left, window_right, chunk, sk, FEATURED)
    full_low, high = visible_keys(last, shift, window_left, window_right, chunk, sk, FEATURED)
    return low, high, full_low, full_high


@triton.jit
def slopes_of(slopes, offset, live):
    """The ALiBi slopes of a tile's rows, (BLOCK_M,) float32, 0 where there are none."""
    return tl.load(pointer(slopes, tl.float32, 1) + offset, mask=live & (slopes != 0), other=0.0)


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr):
    """The state of a tile before its first block."""
    acc0 = tl.zeros([BLOCK_M, DV0], tl.float32)
    acc1 = acc0
    if DV1 > 0:
        acc1 = tl.zeros([BLOCK_M, DV1], tl.float32)
    return acc0, acc1, tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def finish_state(state, scale_log2, has_sink, sinks, FEATURED: tl.constexpr):
    """(output part 0, part 1, LSE) of a tile whose blocks are done; sinks (BLOCK_M,) count where has_sink is not 0."""
    acc0, acc1, row_max, row_sum = state
    if FEATURED:
        if has_sink != 0:
            acc0, acc1, row_max, row_sum = add_sink(acc0, acc1, row_max, row_sum, sinks)
        inverse, lse = softmax_finish(row_max, row_sum, 1.0)
    else:
        inverse, lse = softmax_finish(row_max, row_sum, scale_log2)
    return acc0 * inverse[:, None], acc1 * inverse[:, None], lse


@triton.jit
def store_result(Out, rows, live, out0, out1, HEAD_DIM_V: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr):
    """Write both parts of a tile's output to its live rows, rounded to Out's dtype."""
    store_rows(Out, rows, live, out0, HEAD_DIM_V, 0, DV0)
    if DV1 > 0:
        store_rows(Out, rows, live, out1, HEAD_DIM_V, DV0, DV1)
