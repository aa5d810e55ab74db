"""Tile: where a program's folded queries come from and where their results go. Shared by decode and prefill."""

import triton
import triton.language as tl

from headfold.kernels.parts.fold import load_rows, store_rows
from headfold.kernels.parts.rotary import load_rotated
from headfold.kernels.parts.softmax import add_sink, softmax_finish
from headfold.kernels.parts.spans import find_sequence, visible_keys


@triton.jit
def locate(tile, tiles_per_sequence, cu_seqlens_q, batch, fold, BLOCK_M: tl.constexpr, SEARCH: tl.constexpr):
    """(sequence, tile within it) of a program's tile number."""
    if SEARCH:
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
    ROTARY_ALIGN: tl.constexpr,
):
    """Columns START..START+WIDTH of a tile's queries, rotated where asked and rounded as a stored q would be."""
    if ROTARY_DIM > 0:
        part = load_rotated(
            Q,
            rows,
            live,
            angles,
            Cos,
            Sin,
            cos_stride,
            sin_stride,
            max_positions,
            HEAD_DIM,
            START,
            WIDTH,
            ROTARY_DIM,
            INTERLEAVED,
            ROTARY_ALIGN,
        ).to(Q.dtype.element_ty)
    else:
        part = load_rows(Q, rows, live, HEAD_DIM, START, WIDTH)
    return (part * sign).to(Q.dtype.element_ty)


@triton.jit
def load_queries(
    Q,
    rows,
    live,
    sign,
    angles,
    Cos,
    Sin,
    cos_stride,
    sin_stride,
    max_positions,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROTARY_ALIGN: tl.constexpr,
):
    """Both parts of a tile's queries, negated when the softmax scale is negative (exact in any precision)."""
    q0 = load_part(
        Q,
        rows,
        live,
        sign,
        angles,
        Cos,
        Sin,
        cos_stride,
        sin_stride,
        max_positions,
        HEAD_DIM,
        0,
        D0,
        ROTARY_DIM,
        INTERLEAVED,
        ROTARY_ALIGN,
    )
    q1 = q0
    if D1 > 0:
        q1 = load_part(
            Q,
            rows,
            live,
            sign,
            angles,
            Cos,
            Sin,
            cos_stride,
            sin_stride,
            max_positions,
            HEAD_DIM,
            D0,
            D1,
            ROTARY_DIM,
            INTERLEAVED,
            ROTARY_ALIGN,
        )
    return q0, q1


@triton.jit
def tile_keys(
    first_row,
    sq,
    sk,
    fold,
    bottom_right,
    window_left,
    window_right,
    chunk,
    BLOCK_M: tl.constexpr,
    CHUNKED: tl.constexpr,
):
    """What the mask leaves of the keys of a tile: (shift of the diagonal, first key that any row sees, end of
    the keys that any row sees, first key that all rows see, end of the keys that all rows see)."""
    shift = (sk - sq) * bottom_right
    last_row = tl.minimum(first_row + BLOCK_M, sq * fold) - 1
    low, full_high = visible_keys(first_row // fold, shift, window_left, window_right, chunk, sk, CHUNKED)
    full_low, high = visible_keys(last_row // fold, shift, window_left, window_right, chunk, sk, CHUNKED)
    return shift, low, high, full_low, full_high


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr):
    """The state of a tile before its first block."""
    acc0 = tl.zeros([BLOCK_M, DV0], tl.float32)
    acc1 = acc0
    if DV1 > 0:
        acc1 = tl.zeros([BLOCK_M, DV1], tl.float32)
    return acc0, acc1, tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def store_result(
    state,
    Out,
    Lse,
    out_rows,
    lse_rows,
    live,
    head,
    Sink,
    with_sink,
    IN_LOG2: tl.constexpr,
    scale_log2,
    HEAD_DIM_V: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
):
    """Finish a tile's state and write its live rows. Of several splits of a tile one takes the sink."""
    acc0, acc1, row_max, row_sum = state
    unit_log2 = 1.0 if IN_LOG2 else scale_log2
    if Sink is not None:
        sink = tl.load(Sink + head, mask=live, other=0.0).to(tl.float32)
        sink = tl.where(with_sink, sink, float("-inf"))
        acc0, acc1, row_max, row_sum = add_sink(acc0, acc1, row_max, row_sum, sink, unit_log2)
        unit_log2 = 1.0
    inverse, lse = softmax_finish(row_max, row_sum, unit_log2)
    store_rows(Out, out_rows, live, acc0 * inverse[:, None], HEAD_DIM_V, 0, DV0)
    if DV1 > 0:
        store_rows(Out, out_rows, live, acc1 * inverse[:, None], HEAD_DIM_V, DV0, DV1)
    tl.store(Lse + lse_rows, lse, mask=live)
