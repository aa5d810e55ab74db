"""States: what programs that share a tile leave in the workspace, and how their states become the tile's result."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import aligned, pointer
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.fold import store_rows

# Rows that a merging program holds at a time.
ROWS: tl.constexpr = tl.constexpr(4)


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
def merge_states(
    states,
    state_lses,
    first_state,
    first_step,
    step,
    n,
    width,
    height,
    first_part,
    parts,
    rows,
    first_row,
    by_fold,
    fold,
    first_head,
    Out,
    out_strides,
    Lse,
    lse_strides,
    ALIGN: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    WIDTH: tl.constexpr,
    STATES: tl.constexpr,
):
    """Merge the n states of a tile of `rows` rows, in their order, into Out and Lse.

    State 0 is number first_state, state i > 0 number first_state + first_step + (i - 1) * step. The work comes in
    parts of 4 rows x WIDTH columns, of which this program takes every `parts`-th from `first_part` on. Each thread
    holds its elements of STATES states at once: all loads of a part are in flight together and no sum crosses
    threads (summing over an axis took 22 barriers, 5 us on an H200).

    Out and Lse point to the sequence's first row, their strides (position, head).
    """
    columns: tl.constexpr = (HEAD_DIM_V + WIDTH - 1) // WIDTH
    base = pointer(states, tl.float32, 4)
    lse_base = pointer(state_lses, tl.float32, 1)
    for part in range(first_part, tl.cdiv(rows, ROWS) * columns, parts):
        row = part // columns * ROWS + tl.arange(0, ROWS)
        column = part % columns * WIDTH + tl.arange(0, WIDTH)
        live = row < rows
        inside = live[:, None] & (column < HEAD_DIM_V)[None, :]
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        state = first_state
        for s0 in range(0, n, STATES):
            lses = ()
            outs = ()
            for s in tl.static_range(STATES):
                there = s0 + s < n
                at = state.to(tl.int64) * height + row
                # `.cg` reads what other multiprocessors wrote: past the first-level cache.
                lse = tl.load(lse_base + at, mask=live & there, other=float("-inf"), cache_modifier=".cg")
                lses = lses + (lse * 1.4426950408889634,)
                at = base + (at * aligned(width, 8))[:, None] + column[None, :]
                outs = outs + (tl.load(at, mask=inside & there, other=0.0, cache_modifier=".cg"),)
                state += tl.where(s0 + s == 0, first_step, step)
            new_top = top
            for s in tl.static_range(STATES):
                new_top = tl.maximum(new_top, lses[s])
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - safe)
            acc *= shrink[:, None]
            total *= shrink
            for s in tl.static_range(STATES):
                weight = tl.exp2(lses[s] - safe)
                acc += outs[s] * weight[:, None]
                total += weight
            top = new_top
        empty = total == 0.0
        whole = tl.where(empty, 1.0, total)
        position = divide(first_row + row, by_fold)
        head = first_head + first_row + row - position * fold
        at = position.to(tl.int64) * aligned(out_strides[0], ALIGN) + head.to(tl.int64) * aligned(
            out_strides[1], ALIGN
        )
        result = (acc / whole[:, None]).to(Out.dtype.element_ty)
        tl.store(Out + at[:, None] + column[None, :], result, mask=inside)
        lse = tl.where(empty, float("-inf"), (top + tl.log2(whole)) * 0.6931471805599453)
        at = position.to(tl.int64) * lse_strides[0] + head.to(tl.int64) * lse_strides[1]
        tl.store(Lse + at, lse, mask=live & (part % columns == 0))
