"""States: what programs that share a tile leave in the workspace."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.fold import store_rows


@triton.jit
def store_state(
    states,
    state_lses,
    state,
    live,
    out0,
    out1,
    lse,
    width,
    height,
    BLOCK_M: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
):
    """Write state number `state`: `height` rows of `width` (a multiple of 8, at least HEAD_DIM_V) float32, and LSEs."""
    rows = state.to(tl.int64) * height + tl.arange(0, BLOCK_M)
    base = pointer(states, tl.float32, 4)
    store_rows(base, rows * aligned(width, 8), live, out0, HEAD_DIM_V, 0, DV0)
    if DV1 > 0:
        store_rows(base, rows * aligned(width, 8), live, out1, HEAD_DIM_V, DV0, DV1)
    tl.store(pointer(state_lses, tl.float32, 1) + rows, lse, mask=live)


@triton.jit
def add_states(merged, states, state_lses, at, lse_at, live, column, columns):
    """`merged`, a row's (accumulator, maximum, sum), with states added where they are `live`.

    states and state_lses are addresses: `at` is where each state's floats begin, of which the first `columns` count, `lse_at`
    where its LSE is.
    """
    acc, top, total = merged
    lse = tl.load(pointer(state_lses, tl.float32, 1) + lse_at, mask=live, other=float("-inf"))
    lse *= 1.4426950408889634
    where = at[:, None] + column[None, :]
    there = live[:, None] & (column < columns)[None, :]
    values = tl.load(pointer(states, tl.float32, 4) + where, mask=there, other=0.0)
    new_top = tl.maximum(top, tl.max(lse, 0))
    safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(lse - safe)
    shrink = tl.exp2(top - safe)
    return acc * shrink + tl.sum(values * weight[:, None], 0), new_top, total * shrink + tl.sum(weight, 0)


@triton.jit
def finish_row(merged):
    """(output, LSE) of a row whose states are merged; 0 and -inf where it has seen no key."""
    acc, top, total = merged
    empty = total == 0.0
    whole = tl.where(empty, 1.0, total)
    return acc / whole, tl.where(empty, float("-inf"), (top + tl.log2(whole)) * 0.6931471805599453)
