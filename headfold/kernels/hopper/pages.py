"""Pages: where the keys of a paged cache lie, and the warps that have the copy engine fetch them in boxes.

One warp issues a box at a time. Where boxes are small K and V have a warp each. Where the cache's strides allow, a box brings
whole rows of a page (`fetch_groups`).
"""

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load, view_as
from headfold.kernels.hopper.layouts import (
    GROUP_ROWS,
    columns_in_memory,
    groups_layout,
    is_grouped,
    rows_of,
)
from headfold.kernels.hopper.products import boxes_of
from headfold.kernels.hopper.schedule import one_each, receive
from headfold.kernels.hopper.spans import tile_blocks

LANES = gl.constexpr(32)  # of a producer's warp


@gluon.constexpr_function
def apart(keys, page_rows):
    """Whether V has a producer of its own: where a block of `keys` takes many boxes.

    On an H200 (32:8 d128, b4, 8192 keys, causal) pages of 16, eight boxes of whole rows, take 3689 us with two producers, with
    one of half as wide boxes 4074; pages of 128 take 3755 and 3629.
    """
    return page_rows > 1 and keys // page_rows > 4


@gluon.jit
def pages_of(pages, entry, key, end, KEYS: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """(page of each box of the KEYS keys from `key` on, a lane each, its first key, that key's number of a page).

    `entry` is the number of the sequence. Boxes from key `end` on are looked up nowhere, and none where `key` is negative:
    their page is -1, outside the tensor, and they come as zeros.
    """
    table, stride, page_size, boxes = pages
    box = gl.arange(0, LANES, one_each(1))
    first = key + box * PAGE_ROWS
    live = (first < end) & (box < KEYS // PAGE_ROWS) & (key >= 0)
    number = first // page_size
    return gl.load(table + entry * stride + number, mask=live, other=-1), first, number


@gluon.jit
def look_up(pages, entry, key, end, KEYS: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """(the pages of `pages_of`, the first box's row in its page)."""
    found, _, _ = pages_of(pages, entry, key, end, KEYS, PAGE_ROWS)
    return found, key - key // pages[2] * pages[2]


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
def look_up_groups(pages, entry, key, end, KEYS: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """(the pages of `pages_of`, which group of 8 rows in its page each box begins with), a lane each."""
    page, first, number = pages_of(pages, entry, key, end, KEYS, PAGE_ROWS)
    return page, (first - number * pages[2]) // 8


@gluon.jit
def fetch_groups(desc, found, per_page, head, count, bar, buffers, stage, BLOCK_N: gl.constexpr):
    """Issue the boxes of a block, each of which brings whole rows of one page, which begins `per_page` groups of 8 rows behind
    the one before it."""
    pages, rows = found
    PAGE_ROWS: gl.constexpr = desc.block_type.shape[1] * 8
    PARTS: gl.constexpr = desc.block_type.shape[2]
    BOXES: gl.constexpr = BLOCK_N // PAGE_ROWS
    COUNT: gl.constexpr = buffers[0].type.shape[0] * BOXES
    layout: gl.constexpr = groups_layout(desc.dtype.primitive_bitwidth)
    slots = view_as(buffers[0], desc.dtype, [COUNT, 1, PAGE_ROWS // 8, PARTS, 8, 64], layout)
    box = gl.arange(0, LANES, one_each(1))
    places = pages * per_page + rows
    for i in range(count):
        place = gl.max(gl.where(box == i, places, -(2**31)), 0)
        tma_load(desc, [head, place, 0, 0, 0], bar, slots.index(stage * BOXES + i))


@gluon.jit
def look_up_block(source, pages, entry, key, end, PAGE_ROWS: gl.constexpr):
    """What `fetch_block` needs to know of the pages of the block from `key` on."""
    BLOCK_N: gl.constexpr = rows_of(source[1][0].type.shape)
    if is_grouped(source[1][0].type.shape):
        return look_up_groups(pages, entry, key, end, BLOCK_N, PAGE_ROWS)
    else:
        return look_up(pages, entry, key, end, BLOCK_N, PAGE_ROWS)


@gluon.jit
def fetch_block(source, found, pages, head, count, COLUMNS: gl.constexpr):
    """Fetch block number `count` of K or of V, when its buffer is free."""
    desc, buffers, full, free, per_page = source
    STAGES: gl.constexpr = buffers[0].type.shape[0]
    BLOCK_N: gl.constexpr = rows_of(buffers[0].type.shape)
    BITS: gl.constexpr = desc.dtype.primitive_bitwidth
    ROW_BYTES: gl.constexpr = columns_in_memory(COLUMNS, BITS) * BITS // 8
    stage = count % STAGES
    bar = full.index(stage)
    mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
    mbarrier.expect(bar, BLOCK_N * ROW_BYTES)
    if is_grouped(buffers[0].type.shape):
        fetch_groups(desc, found, per_page, head, pages[3], bar, buffers, stage, BLOCK_N)
    else:
        fetch_pages(desc, found, head, pages[2], pages[3], bar, buffers, stage, BLOCK_N, COLUMNS)


@gluon.jit
def fetch_values(
    common,
    source,
    COLUMNS: gl.constexpr,
    GROUPS: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
):
    """The producer of V beside the one that takes the tiles: fetches the blocks of every tile that is announced."""
    (
        descriptors, buffers, bars, letters, counter, lengths, bottom_right, shape, window, mask_steps, total, group,
        pages, tile_list,
    ) = common  # fmt: skip
    mail, posted, taken = letters
    ROWS: gl.constexpr = GROUP_ROWS * GROUPS
    BLOCK_N: gl.constexpr = rows_of(source[1][0].type.shape)
    turn = 0
    count = 0  # blocks fetched so far
    letter = receive(turn, lengths, mail, posted, taken, VARLEN, 1)
    while letter[0] >= 0:
        number, head, tile, q_batch, q_first, sq, sk, entry = letter
        shift = (sk - sq) * bottom_right
        start, low, blocks = tile_blocks(tile * ROWS, ROWS, sq, sk, shift, window, BLOCK_N, LEFT)
        key = low + (blocks - 1) * BLOCK_N
        ahead = look_up_block(source, pages, entry, key, sk, PAGE_ROWS)
        for _ in range(blocks):
            found = ahead
            fetch_block(source, found, pages, head // group, count, COLUMNS)
            key -= BLOCK_N
            ahead = look_up_block(source, pages, entry, key, sk, PAGE_ROWS)
            count += 1
        turn += 1
        letter = receive(turn, lengths, mail, posted, taken, VARLEN, 1)
