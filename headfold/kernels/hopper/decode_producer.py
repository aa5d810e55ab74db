"""The decode kernel's producer: one warp that has the copy engine fetch K and V of the program's shares."""

import triton.language as tl

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.decode_schedule import share
from headfold.kernels.hopper.pages import fetch_pages, look_up


@gluon.jit
def fetch(
    desc,
    where,
    found,
    head,
    pages,
    bar,
    buffers,
    stage,
    BLOCK_N: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
):
    """Fetch a block into buffer `stage`: of the rows `where` (batch entry, row) names, or of the pages `found`."""
    COLUMNS: gl.constexpr = buffers.type.shape[4]
    mbarrier.expect(bar, BLOCK_N * COLUMNS * (desc.dtype.primitive_bitwidth // 8))
    if PAGE_ROWS > 0:
        fetch_pages(desc, found, head, pages[2], pages[3], bar, (buffers,), stage, BLOCK_N, COLUMNS)
    else:
        tma_load(desc, [where[0], head, where[1], 0], bar, buffers.index(stage))


@gluon.jit
def produce(
    common,
    begins,
    work,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    EARLY: gl.constexpr,
    PAIRED: gl.constexpr,
):
    """Walk the program's shares, each from its first block to its last."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    k_desc, v_desc, k_buffers, v_buffers, bars, pages, ragged, kv_head = common
    k_full, k_free, v_full, v_free = bars
    x, x_end, item, start, gap = begins
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
                following = look_up(
                    pages, seq, padding + low + begin * BLOCK_N, padded_end, BLOCK_N, PAGE_ROWS
                )
            for i in range(begin, end):
                key = low + i * BLOCK_N
                found = following
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                where = (entry, span[2] + key)
                if PAGE_ROWS > 0:  # a block ahead: the answer takes half as long as a block
                    following = look_up(pages, seq, padding + key + BLOCK_N, padded_end, BLOCK_N, PAGE_ROWS)
                mbarrier.wait(k_free.index(stage), phase)
                fetch(
                    k_desc, where, found, kv_head, pages, k_full.index(stage), k_buffers, stage, BLOCK_N, PAGE_ROWS
                )  # fmt: skip
                mbarrier.wait(v_free.index(stage), phase)
                fetch(
                    v_desc, where, found, kv_head, pages, v_full.index(stage), v_buffers, stage, BLOCK_N, PAGE_ROWS
                )  # fmt: skip
                count += 1
        x = next_start
        start = next_start
        item += 1
