"""The decode kernel's producer: one warp that has the copy engine fetch K and V of the program's shares."""

import triton.language as tl

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.decode_schedule import share
from headfold.kernels.hopper.layouts import is_grouped
from headfold.kernels.hopper.pages import fetch_groups, fetch_pages, look_up, look_up_groups


@gluon.jit
def fetch(
    desc,
    where,
    found,
    head,
    pages,
    per_page,
    bar,
    buffers,
    stage,
    BLOCK_N: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
):
    """Fetch a block into buffer `stage`: of the rows `where` (batch entry, row) names, or of the pages `found`.

    Where boxes bring whole rows, a page begins `per_page` groups of 8 rows behind the one before it.
    """
    SHAPE: gl.constexpr = buffers.type.shape
    COLUMNS: gl.constexpr = SHAPE[2] * SHAPE[4]  # of rows in groups of 8 in pieces; of others in one
    mbarrier.expect(bar, BLOCK_N * COLUMNS * (desc.dtype.primitive_bitwidth // 8))
    if is_grouped(SHAPE):
        fetch_groups(desc, found, per_page, head, pages[3], bar, (buffers,), stage, BLOCK_N)
    elif PAGE_ROWS > 0:
        fetch_pages(desc, found, head, pages[2], pages[3], bar, (buffers,), stage, BLOCK_N, COLUMNS)
    else:
        tma_load(desc, [where[0], head, where[1], 0], bar, buffers.index(stage))


@gluon.jit
def look_up_block(
    pages, seq, key, end, BLOCK_N: gl.constexpr, PAGE_ROWS: gl.constexpr, GROUPED: gl.constexpr
):
    """What `fetch` needs to know of the pages of the block from `key` on."""
    if GROUPED:
        return look_up_groups(pages, seq, key, end, BLOCK_N, PAGE_ROWS)
    else:
        return look_up(pages, seq, key, end, BLOCK_N, PAGE_ROWS)


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
    k_desc, v_desc, k_buffers, v_buffers, bars, pages, per_page, ragged, kv_head, sources = common
    GROUPED: gl.constexpr = is_grouped(k_buffers.type.shape)
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
                following = look_up_block(
                    pages, seq, padding + low + begin * BLOCK_N, padded_end, BLOCK_N, PAGE_ROWS, GROUPED
                )
            for i in range(begin, end):
                key = low + i * BLOCK_N
                found = following
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
                where = (entry, span[2] + key)
                if PAGE_ROWS > 0:  # a block ahead: the answer takes half as long as a block
                    following = look_up_block(
                        pages, seq, padding + key + BLOCK_N, padded_end, BLOCK_N, PAGE_ROWS, GROUPED
                    )
                mbarrier.wait(k_free.index(stage), phase)
                fetch(
                    k_desc, where, found, kv_head, pages, per_page[0], k_full.index(stage), k_buffers, stage,
                    BLOCK_N, PAGE_ROWS,
                )  # fmt: skip
                mbarrier.wait(v_free.index(stage), phase)
                fetch(
                    v_desc, where, found, kv_head, pages, per_page[1], v_full.index(stage), v_buffers, stage,
                    BLOCK_N, PAGE_ROWS,
                )  # fmt: skip
                count += 1
        x = next_start
        start = next_start
        item += 1
