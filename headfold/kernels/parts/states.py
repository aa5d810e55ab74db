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
