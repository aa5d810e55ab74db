"""The decode kernel's producer of small pages: four warps that copy K and V row by row, as those of the prefill do."""

import triton.language as tl

from headfold.kernels.hopper.compat import async_copy, barrier, gl, gluon
from headfold.kernels.hopper.copies import copy_rows, find_rows, locate_rows
from headfold.kernels.hopper.decode_schedule import share
from headfold.kernels.hopper.products import matrix


@gluon.jit
def copy(
    common,
    places,
    begins,
    work,
    COLUMNS_K: gl.constexpr,
    COLUMNS_V: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Walk the program's shares, each from its first block to its last. COLUMNS of a row are copied, others are 0."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    k_desc, v_desc, k_buffers, v_buffers, bars, pages, per_page, ragged, kv_head, sources = common
    K, k_strides, V, v_strides = sources
    k_places, v_places = places
    k_full, k_free, v_full, v_free = bars
    TILE_D: gl.constexpr = k_buffers.type.shape[4]
    TILE_DV: gl.constexpr = v_buffers.type.shape[4]
    keys = K + kv_head * k_strides[2] * 8
    values = V + kv_head * v_strides[2] * 8
    x, x_end, item, start, gap = begins
    count = 0  # blocks copied so far: their stage and the phase of its barriers
    while x < x_end:
        seq, _, span, low, begin, end, next_start, _, _ = share(
            x, x_end, item, start, gap, work, BLOCK_M, BLOCK_N, False
        )
        if begin < end:
            key_low, key_high = span[6], span[7]
            rows = find_rows(pages, seq, low + begin * BLOCK_N, key_low, key_high, BLOCK_N)
            for i in range(begin, end):
                locate_rows(k_places, rows, k_strides)
                locate_rows(v_places, rows, v_strides)
                barrier()
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                rows = find_rows(pages, seq, low + (i + 1) * BLOCK_N, key_low, key_high, BLOCK_N)
                copy_rows(
                    keys, k_places, matrix(k_buffers.index(stage), BLOCK_N, TILE_D), k_free.index(stage), phase, COLUMNS_K
                )  # fmt: skip
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                copy_rows(
                    values, v_places, matrix(v_buffers.index(stage), BLOCK_N, TILE_DV), v_free.index(stage), phase,
                    COLUMNS_V,
                )  # fmt: skip
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                barrier()  # all lanes have read where rows begin
                count += 1
        x = next_start
        start = next_start
        item += 1
