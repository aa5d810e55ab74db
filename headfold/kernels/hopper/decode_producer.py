"""The decode kernel's producer: one warp that has the copy engine fetch K and V of the program's shares."""

import triton.language as tl

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.decode_ahead import ask_for_rows
from headfold.kernels.hopper.decode_schedule import share
from headfold.kernels.hopper.pages import fetch_block, look_up_block


@gluon.jit
def fetch_rows(source, where, head, count, BLOCK_N: gl.constexpr):
    """Fetch block number `count` of K or of V, when its buffer is free: the rows that `where` (batch entry, row) names."""
    desc, buffers, full, free, _ = source
    SHAPE: gl.constexpr = buffers[0].type.shape
    stage = count % SHAPE[0]
    mbarrier.wait(free.index(stage), ((count // SHAPE[0]) & 1) ^ 1)
    mbarrier.expect(full.index(stage), BLOCK_N * SHAPE[4] * (desc.dtype.primitive_bitwidth // 8))
    tma_load(desc, [where[0], head, where[1], 0], full.index(stage), buffers[0].index(stage))


@gluon.jit
def produce(
    common,
    begins,
    work,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    ALIGN: gl.constexpr,
    EARLY: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Walk the program's shares, each from its first block to its last."""
    k_desc, v_desc, k_buffers, v_buffers, bars, pages, per_page, ragged, kv_head, sources = common
    k_full, k_free, v_full, v_free = bars
    k_source = (k_desc, (k_buffers,), k_full, k_free, per_page[0])
    v_source = (v_desc, (v_buffers,), v_full, v_free, per_page[1])
    x, x_end, item, start, gap = begins
    if EARLY:
        if PAGE_ROWS == 0 and not PAIRED:
            ahead, keys, values = sources
            if ahead != 0:
                seq, _, span, low, begin, end, _, _, _ = share(
                    x, x_end, item, start, gap, work, BLOCK_M, BLOCK_N, PAIRED
                )
                if begin < end:
                    first = low + begin * BLOCK_N
                    ask_for_rows(keys, seq, kv_head, first, span[7], BLOCK_N, HEAD_DIM, ALIGN)
                    ask_for_rows(values, seq, kv_head, first, span[7], BLOCK_N, HEAD_DIM_V, ALIGN)
        tl.extra.cuda.gdc_wait()
    count = 0  # blocks fetched so far: their stage and the phase of its barriers
    while x < x_end:
        seq, _, span, low, begin, end, next_start, _, _ = share(
            x, x_end, item, start, gap, work, BLOCK_M, BLOCK_N, PAIRED
        )
        if begin < end:
            entry = gl.where(ragged != 0, 0, seq)
            following = (begin, begin)  # no pages
            padding, padded_end = span[3], span[3] + span[7]
            if PAGE_ROWS > 0:
                following = look_up_block(
                    k_source, pages, seq, padding + low + begin * BLOCK_N, padded_end, PAGE_ROWS
                )
            for i in range(begin, end):
                key = low + i * BLOCK_N
                if PAGE_ROWS > 0:
                    found = following
                    # A block ahead: the answer takes half as long as a block.
                    following = look_up_block(
                        k_source, pages, seq, padding + key + BLOCK_N, padded_end, PAGE_ROWS
                    )
                    fetch_block(k_source, found, pages, kv_head, count, TILE_D)
                    fetch_block(v_source, found, pages, kv_head, count, TILE_DV)
                else:
                    where = (entry, span[2] + key)
                    fetch_rows(k_source, where, kv_head, count, BLOCK_N)
                    fetch_rows(v_source, where, kv_head, count, BLOCK_N)
                count += 1
        x = next_start
        start = next_start
        item += 1
