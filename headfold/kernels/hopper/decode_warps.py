"""Buffers, barriers and warps of the decode kernels: the consumers and the producer that work off a program's shares."""

from headfold.kernels.hopper.compat import fence_async_shared, gl, gluon
from headfold.kernels.hopper.copies import WARPS as COPYING_WARPS
from headfold.kernels.hopper.decode_consumer import consume
from headfold.kernels.hopper.decode_copies import copy
from headfold.kernels.hopper.decode_producer import produce
from headfold.kernels.hopper.layouts import GROUP_ROWS, shared_layout
from headfold.kernels.hopper.prefill import barriers, grouped_buffers


@gluon.jit
def decode_buffers(
    ELEMENT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    GROUPED: gl.constexpr,
    COPIED: gl.constexpr,
):
    """((buffers of the queries, of K, of V, of the weights of few rows), barriers: K is there, K may be overwritten, and
    the same of V).

    GROUPED where boxes bring whole rows of pages, COPIED where keys are copied row by row.
    """
    GROUPS: gl.constexpr = BLOCK_M // GROUP_ROWS if BLOCK_M > GROUP_ROWS else 1
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    q_buffers = gl.allocate_shared_memory(ELEMENT, [GROUPS, ROWS, TILE_D], shared_layout(ROWS, TILE_D, 16, 2))
    w_buffers = q_buffers  # not used where weights stay in registers
    if BLOCK_M < GROUP_ROWS:
        w_buffers = gl.allocate_shared_memory(
            ELEMENT, [2, ROWS, BLOCK_N], shared_layout(ROWS, BLOCK_N, 16, 2)
        )
    if GROUPED:
        k_buffers = grouped_buffers(ELEMENT, STAGES, BLOCK_N, TILE_D)[0]
        v_buffers = grouped_buffers(ELEMENT, STAGES, BLOCK_N, TILE_DV)[0]
    else:
        k_buffers = gl.allocate_shared_memory(
            ELEMENT, [STAGES, 1, 1, BLOCK_N, TILE_D], shared_layout(BLOCK_N, TILE_D, 16, 4)
        )
        v_buffers = gl.allocate_shared_memory(
            ELEMENT, [STAGES, 1, 1, BLOCK_N, TILE_DV], shared_layout(BLOCK_N, TILE_DV, 16, 4)
        )
    # Every lane that copies rows arrives for itself.
    ARRIVALS: gl.constexpr = 32 * COPYING_WARPS if COPIED else 1
    bars = (
        barriers(STAGES, ARRIVALS), barriers(STAGES, GROUPS), barriers(STAGES, ARRIVALS), barriers(STAGES, GROUPS)
    )  # fmt: skip
    fence_async_shared()
    return (q_buffers, k_buffers, v_buffers, w_buffers), bars


@gluon.jit
def run_warps(
    common,
    fetches,
    begins,
    work,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    ALIGN: gl.constexpr,
    FETCH_REGISTERS: gl.constexpr,
    EARLY: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """One or two consumers and a producer, each over the program's shares.

    Their arguments stand there each time: constants that a variable holds are none any more.
    """
    if PAGE_ROWS == 1:
        k_places = gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        v_places = gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        places = (k_places, v_places)
        gl.warp_specialize(
            [
                (consume, (
                    0, common, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, EARLY,
                    PAIRED, True,
                )),
                (copy, (fetches, places, begins, work, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, STAGES, EARLY)),
            ],
            [COPYING_WARPS],
            [FETCH_REGISTERS],
        )  # fmt: skip
    elif BLOCK_M <= GROUP_ROWS:
        gl.warp_specialize(
            [
                (consume, (
                    0, common, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, EARLY,
                    PAIRED,
                )),
                (produce, (
                    fetches, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, PAGE_ROWS, ALIGN, EARLY,
                    PAIRED,
                )),
            ],
            [1],
            [FETCH_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    0, common, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, EARLY,
                    PAIRED,
                )),
                (consume, (
                    1, common, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, STAGES, EARLY,
                    PAIRED,
                )),
                (produce, (
                    fetches, begins, work, HEAD_DIM, HEAD_DIM_V, TILE_D, TILE_DV, BLOCK_M, BLOCK_N, PAGE_ROWS, ALIGN, EARLY,
                    PAIRED,
                )),
            ],
            [4, 1],
            [232, FETCH_REGISTERS],
        )  # fmt: skip
