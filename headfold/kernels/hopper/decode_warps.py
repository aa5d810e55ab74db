"""Buffers, barriers and warps of the decode kernels: the consumers and the producer that work off a program's shares."""

from headfold.kernels.hopper.compat import fence_async_shared, gl, gluon
from headfold.kernels.hopper.decode_consumer import consume
from headfold.kernels.hopper.decode_producer import produce
from headfold.kernels.hopper.layouts import GROUP_ROWS, shared_layout
from headfold.kernels.hopper.prefill import barriers


@gluon.jit
def decode_buffers(
    ELEMENT: gl.constexpr,
    GROUPS: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """((buffers of the queries, of K, of V), barriers: K is there, K may be overwritten, and the same of V)."""
    q_buffers = gl.allocate_shared_memory(
        ELEMENT, [GROUPS, GROUP_ROWS, TILE_D], shared_layout(GROUP_ROWS, TILE_D, 16, 2)
    )
    k_buffers = gl.allocate_shared_memory(
        ELEMENT, [STAGES, 1, 1, BLOCK_N, TILE_D], shared_layout(BLOCK_N, TILE_D, 16, 4)
    )
    v_buffers = gl.allocate_shared_memory(
        ELEMENT, [STAGES, 1, 1, BLOCK_N, TILE_DV], shared_layout(BLOCK_N, TILE_DV, 16, 4)
    )
    bars = (barriers(STAGES, 1), barriers(STAGES, GROUPS), barriers(STAGES, 1), barriers(STAGES, GROUPS))
    fence_async_shared()
    return (q_buffers, k_buffers, v_buffers), bars


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
    FETCH_REGISTERS: gl.constexpr,
    EARLY: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """One or two consumers and a producer, each over the program's shares."""
    if BLOCK_M == GROUP_ROWS:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        0,
                        common,
                        begins,
                        work,
                        HEAD_DIM,
                        HEAD_DIM_V,
                        TILE_D,
                        TILE_DV,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        EARLY,
                        PAIRED,
                    ),
                ),
                (produce, (fetches, begins, work, BLOCK_M, BLOCK_N, STAGES, PAGE_ROWS, EARLY, PAIRED)),
            ],
            [1],
            [FETCH_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        0,
                        common,
                        begins,
                        work,
                        HEAD_DIM,
                        HEAD_DIM_V,
                        TILE_D,
                        TILE_DV,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        EARLY,
                        PAIRED,
                    ),
                ),
                (
                    consume,
                    (
                        1,
                        common,
                        begins,
                        work,
                        HEAD_DIM,
                        HEAD_DIM_V,
                        TILE_D,
                        TILE_DV,
                        BLOCK_M,
                        BLOCK_N,
                        STAGES,
                        EARLY,
                        PAIRED,
                    ),
                ),
                (produce, (fetches, begins, work, BLOCK_M, BLOCK_N, STAGES, PAGE_ROWS, EARLY, PAIRED)),
            ],
            [4, 1],
            [232, FETCH_REGISTERS],
        )
