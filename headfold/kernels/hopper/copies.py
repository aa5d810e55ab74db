"""The producer of small pages: four warps copy K and V row by row, where the copy engine's boxes would be too small.

A row is `cp.async` pieces of 16 bytes, a lane each, into the swizzled buffers that boxes would go to. A lane arrives at a
buffer's barrier when its copies have landed, without waiting for them. These copies write through the generic proxy and
products read through the async one: the consumers send a proxy fence between the barrier and the product.
"""

from headfold.kernels.hopper.compat import (
    async_copy,
    barrier,
    copy_to_shared,
    gl,
    gluon,
    mbarrier,
    tma_load,
)
from headfold.kernels.hopper.layouts import store_layout
from headfold.kernels.hopper.products import matrix
from headfold.kernels.hopper.schedule import last_place, one_each, publish, sign_off, take
from headfold.kernels.hopper.spans import find, locate, sequence, tile_blocks

WARPS = gl.constexpr(4)


@gluon.jit
def find_rows(pages, entry, key, start, end, BLOCK_N: gl.constexpr):
    """(page, row in the page) of the keys from `key` on, a lane each; page -1 for those outside [start, end).

    What the table says of keys that left the window, or past the end, may be anything.
    """
    table, stride, page_size, _ = pages
    row = key + gl.arange(0, BLOCK_N, one_each(WARPS))
    number = row // page_size
    live = (row >= start) & (row < end)
    page = gl.load(table + entry * stride + number, mask=live, other=-1)
    return page, row - number * page_size


@gluon.jit
def locate_rows(places, found, strides):
    """Write down where the rows found begin, in units of 16 bytes; -1 for none."""
    page, row = found
    place = page.to(gl.int64) * strides[0] + row.to(gl.int64) * strides[1]
    places.store(gl.where(page >= 0, place, -1).to(places.dtype))


@gluon.jit
def copy_rows(base, places, buffer, free, phase, COLUMNS: gl.constexpr):
    """Issue the copies of a block when its buffer is free. Rows placed at -1 come as zeros, and so do columns from COLUMNS
    on."""
    WIDTH: gl.constexpr = buffer.shape[1]
    layout: gl.constexpr = store_layout(WIDTH)
    # Read before the wait, all at once: from the wait on every cycle counts.
    place = places.load(gl.SliceLayout(1, layout))
    mbarrier.wait(free, phase)
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    live = (place >= 0)[:, None]
    if COLUMNS < WIDTH:
        live = live & (column < COLUMNS)[None, :]
    copy_to_shared(buffer, base + place.to(gl.int64)[:, None] * 8 + column[None, :], mask=live)


@gluon.jit
def produce_rows(
    common,
    sources,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
    COLUMNS_K: gl.constexpr,
    COLUMNS_V: gl.constexpr,
):
    """Walk this program's tiles, each from its last block to its first: the keys of a block go with the values of the block
    before it, as the consumers take them."""
    (
        descriptors, buffers, bars, letters, counter, lengths, bottom_right, shape, window, mask_steps, total, group,
        pages, tile_list,
    ) = common  # fmt: skip
    q_desc = descriptors[0]
    q_buffers, k_buffers, v_buffers, mask_buffers = buffers
    q_full, q_free, k_full, k_free, v_full, v_free, turns = bars
    mail, posted, taken = letters
    K, k_strides, V, v_strides, k_places, v_places = sources
    ROWS: gl.constexpr = q_buffers[0].type.shape[3]
    BLOCK_N: gl.constexpr = k_buffers[0].type.shape[3]
    HEAD_DIM: gl.constexpr = k_buffers[0].type.shape[4]
    HEAD_DIM_V: gl.constexpr = v_buffers[0].type.shape[4]
    VALUES: gl.constexpr = v_buffers[0].type.shape[0]
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    turn = 0
    # Blocks of the tiles before this one: they give a block's buffers and the phase of their barriers.
    count = 0
    while number < total:
        if VARLEN:
            found = find(number, last_place(turn, mail, WARPS), shape, tile_list)
        else:
            found = locate(number, shape)
        entry = found[0]
        head = found[1]
        tile = found[2]
        q_batch, q_first, sq, k_batch, k_first, sk = sequence(entry, lengths, VARLEN)
        publish(number, found, (q_first, sq, sk), turn, mail, posted, taken, VARLEN, WARPS)
        first = tile * (ROWS * GROUPS)
        following = number
        start, low, blocks = tile_blocks(
            first, ROWS * GROUPS, sq, sk, (sk - sq) * bottom_right, window, BLOCK_N, LEFT
        )
        rows = find_rows(pages, entry, low + (blocks - 1) * BLOCK_N, start, sk, BLOCK_N)
        # Not `rows`: what the first pass over a loop leaves as it is, Triton takes for a constant of the loop.
        older = find_rows(pages, entry, 0, 0, 0, BLOCK_N)
        for c in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
            tma_load(
                q_desc, [q_batch, head, q_first + first + c * ROWS, 0], q_full.index(c), q_buffers[0].index(c)
            )
        keys = K + (head // group) * k_strides[2] * 8
        values = V + (head // group) * v_strides[2] * 8
        for i in range(blocks + 1):
            locate_rows(k_places, rows, k_strides)
            locate_rows(v_places, older, v_strides)
            barrier()
            key = (count + i) % STAGES
            value = (count + i - 1) % VALUES
            if i < blocks:
                copy_rows(
                    keys, k_places, matrix(k_buffers[0].index(key), BLOCK_N, HEAD_DIM), k_free.index(key),
                    (((count + i) // STAGES) & 1) ^ 1, COLUMNS_K,
                )  # fmt: skip
                async_copy.mbarrier_arrive(k_full.index(key), increment_count=False)
            older = rows
            rows = find_rows(pages, entry, low + (blocks - 2 - i) * BLOCK_N, start, sk, BLOCK_N)
            if i > 0:
                copy_rows(
                    values, v_places, matrix(v_buffers[0].index(value), BLOCK_N, HEAD_DIM_V), v_free.index(value),
                    (((count + i - 1) // VALUES) & 1) ^ 1, COLUMNS_V,
                )  # fmt: skip
                async_copy.mbarrier_arrive(v_full.index(value), increment_count=False)
            barrier()  # all lanes have read where rows begin
            # The answer takes a microsecond, and the buffers are full.
            if i == gl.minimum(blocks, STAGES):
                following = take(counter, programs)
        count += blocks
        turn += 1
        number = following
    publish(-1, (0, 0, 0, 0), (0, 0, 0), turn, mail, posted, taken, VARLEN, WARPS)
    sign_off(counter, programs)
