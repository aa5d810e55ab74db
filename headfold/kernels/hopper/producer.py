"""The producer: one warp that takes tiles from the counter and has the copy engine fetch Q, K, V and mask blocks."""

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.layouts import columns_in_memory
from headfold.kernels.hopper.products import boxes_of
from headfold.kernels.hopper.schedule import asking_block, last_place, one_each, publish, sign_off, take
from headfold.kernels.hopper.spans import find, locate, sequence, tile_blocks

LANES = gl.constexpr(32)  # of the producer's warp


@gluon.jit
def look_up(pages, entry, key, end, BLOCK_N: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """(pages of the boxes of the block from `key` on, a lane each, and the first one's row in its page).

    `entry` is the number of the sequence. Boxes from key `end` on are looked up nowhere: their page is -1, outside the
    tensor, and they come as zeros.
    """
    table, stride, page_size, boxes = pages
    box = gl.arange(0, LANES, one_each(1))
    first = key + box * PAGE_ROWS
    live = (first < end) & (box < BLOCK_N // PAGE_ROWS)
    found = gl.load(table + entry * stride + first // page_size, mask=live, other=-1)
    return found, key - key // page_size * page_size


@gluon.jit
def fetch_rows(desc, batch, head, row, bar, buffers, index, COLUMNS: gl.constexpr):
    """Issue a block of rows: one box, or with two parts a box for the columns of each swizzled row."""
    FIRST: gl.constexpr = buffers[0].type.shape[4]
    if FIRST == COLUMNS:
        tma_load(desc, [batch, head, row, 0], bar, buffers[0].index(index))
    else:
        ROWS: gl.constexpr = desc.block_type.shape[2]
        WIDTH: gl.constexpr = desc.block_type.shape[3]
        PARTS: gl.constexpr = FIRST // WIDTH
        slots = boxes_of(buffers[0], ROWS, WIDTH)
        for c in gl.static_range(PARTS):
            tma_load(desc, [batch, head, row, c * WIDTH], bar, slots.index(index * PARTS + c))
        tma_load(desc, [batch, head, row, FIRST], bar, buffers[1].index(index))


@gluon.jit
def fetch_pages(
    desc, found, head, page_size, count, bar, buffers, stage, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr
):
    """Issue the boxes of a block, each of which lies in one page and takes the columns of one swizzled row.

    `count` = BLOCK_N // PAGE_ROWS comes as a number: the compiler would unroll a constant loop, and run out of registers.
    """
    pages, row = found
    PAGE_ROWS: gl.constexpr = desc.block_type.shape[2]
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    BOXES: gl.constexpr = BLOCK_N // PAGE_ROWS
    FIRST: gl.constexpr = buffers[0].type.shape[4]
    PARTS: gl.constexpr = FIRST // WIDTH
    slots = boxes_of(buffers[0], PAGE_ROWS, WIDTH)
    box = gl.arange(0, LANES, one_each(1))
    for i in range(count):
        page = gl.max(gl.where(box == i, pages, -1), 0)
        for c in gl.static_range(PARTS):
            tma_load(desc, [page, head, row, c * WIDTH], bar, slots.index((stage * PARTS + c) * BOXES + i))
        if COLUMNS > FIRST:
            second = boxes_of(buffers[1], PAGE_ROWS, WIDTH)
            tma_load(desc, [page, head, row, FIRST], bar, second.index(stage * BOXES + i))
        row += PAGE_ROWS
        row = gl.where(row == page_size, 0, row)


@gluon.jit
def produce(
    common,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
):
    """Walk this program's tiles, each from its last block to its first."""
    (
        descriptors,
        buffers,
        bars,
        letters,
        counter,
        lengths,
        bottom_right,
        shape,
        window,
        mask_steps,
        total,
        group,
        pages,
        tile_list,
    ) = common
    q_desc, k_desc, v_desc, mask_desc = descriptors
    q_buffers, k_buffers, v_buffers, mask_buffers = buffers
    q_full, q_free, k_full, k_free, v_full, v_free, turns = bars
    mail, posted, taken = letters
    ROWS: gl.constexpr = q_buffers[0].type.shape[3]
    Q_STAGES: gl.constexpr = q_buffers[0].type.shape[0] // GROUPS
    BITS: gl.constexpr = k_desc.dtype.primitive_bitwidth
    ROW_BYTES: gl.constexpr = columns_in_memory(HEAD_DIM, BITS) * BITS // 8
    ROW_BYTES_V: gl.constexpr = columns_in_memory(HEAD_DIM_V, BITS) * BITS // 8
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    turn = 0
    count = 0  # blocks fetched so far: their stage and the phase of its barriers
    while number < total:
        if VARLEN:
            found = find(number, last_place(turn, mail), shape, tile_list)
        else:
            found = locate(number, shape)
        entry = found[0]
        head = found[1]
        tile = found[2]
        q_batch, q_first, sq, k_batch, k_first, sk = sequence(entry, lengths, VARLEN)
        publish(number, found, (q_first, sq, sk), turn, mail, posted, taken, VARLEN)
        first = tile * (ROWS * GROUPS)
        following = number
        shift = (sk - sq) * bottom_right
        _, low, blocks = tile_blocks(first, ROWS * GROUPS, sq, sk, shift, window, BLOCK_N, LEFT)
        kv_head = head // group
        for c in gl.static_range(GROUPS):
            slot = turn % Q_STAGES * GROUPS + c
            row = q_first + first + c * ROWS
            mbarrier.wait(q_free.index(slot), ((turn // Q_STAGES) & 1) ^ 1)
            mbarrier.expect(q_full.index(slot), ROWS * ROW_BYTES)
            fetch_rows(q_desc, q_batch, head, row, q_full.index(slot), q_buffers, slot, HEAD_DIM)
        for i in range(blocks):
            if i == asking_block(blocks, STAGES, VARLEN):
                following = take(counter, programs)
            key = low + (blocks - 1 - i) * BLOCK_N
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            if PAGE_ROWS > 0:  # before the wait, which takes longer
                where = look_up(pages, entry, key, sk, BLOCK_N, PAGE_ROWS)
            mbarrier.wait(k_free.index(stage), phase)
            if MASKED:
                mbarrier.expect(
                    k_full.index(stage), k_desc.block_type.nbytes + GROUPS * mask_desc.block_type.nbytes
                )
                for c in gl.static_range(GROUPS):
                    tma_load(
                        mask_desc,
                        [q_batch * mask_steps[0], head * mask_steps[1], first + c * ROWS, key],
                        k_full.index(stage),
                        mask_buffers.index(stage * GROUPS + c),
                    )
            else:
                mbarrier.expect(k_full.index(stage), BLOCK_N * ROW_BYTES)
            if PAGE_ROWS > 0:
                fetch_pages(
                    k_desc, where, kv_head, pages[2], pages[3], k_full.index(stage), k_buffers, stage, BLOCK_N,
                    HEAD_DIM,
                )  # fmt: skip
            else:
                fetch_rows(
                    k_desc, k_batch, kv_head, k_first + key, k_full.index(stage), k_buffers, stage, HEAD_DIM
                )
            mbarrier.wait(v_free.index(stage), phase)
            mbarrier.expect(v_full.index(stage), BLOCK_N * ROW_BYTES_V)
            if PAGE_ROWS > 0:
                fetch_pages(
                    v_desc, where, kv_head, pages[2], pages[3], v_full.index(stage), v_buffers, stage, BLOCK_N,
                    HEAD_DIM_V,
                )  # fmt: skip
            else:
                fetch_rows(
                    v_desc, k_batch, kv_head, k_first + key, v_full.index(stage), v_buffers, stage, HEAD_DIM_V
                )
            count += 1
        turn += 1
        number = following
    publish(-1, (0, 0, 0, 0), (0, 0, 0), turn, mail, posted, taken, VARLEN)
    sign_off(counter, programs)
