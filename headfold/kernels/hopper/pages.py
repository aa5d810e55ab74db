"""Pages: where the keys of a paged cache lie, and the warps that have the copy engine fetch them in boxes.

One warp issues a box at a time. So K and V have a warp each, or two where boxes are small, each of which fetches its share
of every block's keys. Where the cache's strides allow, a box brings whole rows of a page (`fetch_groups`).
"""

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load, view_as
from headfold.kernels.hopper.layouts import (
    GROUP_ROWS,
    columns_in_memory,
    groups_layout,
    is_grouped,
    rows_of,
    shared_layout,
)
from headfold.kernels.hopper.schedule import one_each, receive, take
from headfold.kernels.hopper.spans import tile_blocks

OUTSIDE = gl.constexpr(-(2**30))  # before any tensor, in groups of 8 rows
LANES = gl.constexpr(32)  # of a producer's warp


@gluon.constexpr_function
def sharers(page_rows):
    """Warps that share the boxes of K, and as many those of V."""
    return 2 if page_rows < 64 else 1


@gluon.jit
def look_up(pages, entry, key, end, KEYS: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """(pages of the boxes of the KEYS keys from `key` on, a lane each, and the first one's row in its page).

    `entry` is the number of the sequence. Boxes from key `end` on are looked up nowhere, and none where `key` is negative:
    their page is -1, outside the tensor, and they come as zeros.
    """
    table, stride, page_size, boxes = pages
    box = gl.arange(0, LANES, one_each(1))
    first = key + box * PAGE_ROWS
    live = (first < end) & (box < KEYS // PAGE_ROWS) & (key >= 0)
    found = gl.load(table + entry * stride + first // page_size, mask=live, other=-1)
    return found, key - key // page_size * page_size


@gluon.jit
def look_up_groups(pages, per_page, entry, key, end, KEYS: gl.constexpr, PAGE_ROWS: gl.constexpr):
    """The places of the boxes of the KEYS keys from `key` on, a lane each, in groups of 8 rows; a page has `per_page`.

    As `look_up` else; what is looked up nowhere lies far before the tensor.
    """
    table, stride, page_size, boxes = pages
    box = gl.arange(0, LANES, one_each(1))
    first = key + box * PAGE_ROWS
    live = (first < end) & (box < KEYS // PAGE_ROWS) & (key >= 0)
    number = first // page_size
    page = gl.load(table + entry * stride + number, mask=live, other=-1)
    return gl.where(page >= 0, page * per_page + (first - number * page_size) // 8, OUTSIDE)


@gluon.jit
def fetch_groups(
    desc, places, head, count, bar, buffers, stage, BLOCK_N: gl.constexpr, SHARE: gl.constexpr, SHARES: gl.constexpr
):  # fmt: skip
    """Issue a share of a block's boxes, each of which brings the whole rows of one page."""
    PAGE_ROWS: gl.constexpr = desc.block_type.shape[1] * 8
    PARTS: gl.constexpr = desc.block_type.shape[2]
    BOXES: gl.constexpr = BLOCK_N // PAGE_ROWS
    BEGIN: gl.constexpr = SHARE * BOXES // SHARES
    COUNT: gl.constexpr = buffers[0].type.shape[0] * BOXES
    slots = view_as(
        buffers[0],
        desc.dtype,
        [COUNT, 1, PAGE_ROWS // 8, PARTS, 8, 64],
        groups_layout(desc.dtype.primitive_bitwidth),
    )
    box = gl.arange(0, LANES, one_each(1))
    for i in range(count):
        place = gl.max(gl.where(box == i, places, OUTSIDE), 0)
        tma_load(desc, [head, place, 0, 0, 0], bar, slots.index(stage * BOXES + BEGIN + i))


@gluon.jit
def boxes_of(buffers, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Buffers (stages, 1, 1, rows, columns) as boxes (1, 1, ROWS, COLUMNS), COLUMNS being those of a swizzled row.

    Wider rows lie in shared memory as one such matrix after the other.
    """
    COUNT: gl.constexpr = (
        buffers.type.shape[0] * (buffers.type.shape[3] // ROWS) * (buffers.type.shape[4] // COLUMNS)
    )
    layout: gl.constexpr = shared_layout(ROWS, COLUMNS, buffers.dtype.primitive_bitwidth, 4)
    return view_as(buffers, buffers.dtype, [COUNT, 1, 1, ROWS, COLUMNS], layout)


@gluon.jit
def fetch_pages(
    desc,
    found,
    head,
    page_size,
    count,
    bar,
    buffers,
    stage,
    BLOCK_N: gl.constexpr,
    COLUMNS: gl.constexpr,
    SHARE: gl.constexpr = 0,
    SHARES: gl.constexpr = 1,
):
    """Issue a share of a block's boxes, each of which lies in one page and takes the columns of one swizzled row.

    `count` = BLOCK_N // PAGE_ROWS // SHARES comes as a number: the compiler would unroll a constant loop, and run out of
    registers.
    """
    pages, row = found
    PAGE_ROWS: gl.constexpr = desc.block_type.shape[2]
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    BOXES: gl.constexpr = BLOCK_N // PAGE_ROWS
    FIRST: gl.constexpr = buffers[0].type.shape[4]
    PARTS: gl.constexpr = FIRST // WIDTH
    BEGIN: gl.constexpr = SHARE * BOXES // SHARES
    slots = boxes_of(buffers[0], PAGE_ROWS, WIDTH)
    box = gl.arange(0, LANES, one_each(1))
    for i in range(count):
        page = gl.max(gl.where(box == i, pages, -1), 0)
        for c in gl.static_range(PARTS):
            slot = (stage * PARTS + c) * BOXES + BEGIN + i
            tma_load(desc, [page, head, row, c * WIDTH], bar, slots.index(slot))
        if COLUMNS > FIRST:
            second = boxes_of(buffers[1], PAGE_ROWS, WIDTH)
            tma_load(desc, [page, head, row, FIRST], bar, second.index(stage * BOXES + BEGIN + i))
        row += PAGE_ROWS
        row = gl.where(row == page_size, 0, row)


@gluon.jit
def fetch_blocks(
    source,
    pages,
    entry,
    head,
    low,
    blocks,
    end,
    counter,
    programs,
    number,
    count,
    COLUMNS: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    SHARE: gl.constexpr,
    SHARES: gl.constexpr,
    LEADS: gl.constexpr,
):
    """Fetch a share of a tile's blocks, of K or of V, from the last to the first.

    Returns the number of the next tile, which the warp that LEADS takes from the counter, and `count` behind the blocks.
    """
    desc, buffers, full, free, per_page = source
    STAGES: gl.constexpr = buffers[0].type.shape[0]
    GROUPED: gl.constexpr = is_grouped(buffers[0].type.shape)
    BLOCK_N: gl.constexpr = rows_of(buffers[0].type.shape)
    BITS: gl.constexpr = desc.dtype.primitive_bitwidth
    ROW_BYTES: gl.constexpr = columns_in_memory(COLUMNS, BITS) * BITS // 8
    KEYS: gl.constexpr = BLOCK_N // SHARES
    following = number
    key = low + (blocks - 1) * BLOCK_N + SHARE * KEYS
    if GROUPED:
        ahead = look_up_groups(pages, per_page, entry, key, end, KEYS, PAGE_ROWS)
    else:
        ahead = look_up(pages, entry, key, end, KEYS, PAGE_ROWS)
    for i in range(blocks):
        if LEADS:
            if i == gl.minimum(
                blocks - 1, STAGES
            ):  # the answer takes a microsecond, and the buffers are full
                following = take(counter, programs)
        stage = count % STAGES
        found = ahead
        mbarrier.wait(free.index(stage), ((count // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), KEYS * ROW_BYTES)
        if GROUPED:
            fetch_groups(
                desc,
                found,
                head,
                pages[3] // SHARES,
                full.index(stage),
                buffers,
                stage,
                BLOCK_N,
                SHARE,
                SHARES,
            )
        else:
            fetch_pages(
                desc, found, head, pages[2], pages[3] // SHARES, full.index(stage), buffers, stage, BLOCK_N, COLUMNS,
                SHARE, SHARES,
            )  # fmt: skip
        # A block ahead: the divisions and the table's answer pass before the next buffer is free.
        key -= BLOCK_N
        if GROUPED:
            ahead = look_up_groups(pages, per_page, entry, key, end, KEYS, PAGE_ROWS)
        else:
            ahead = look_up(pages, entry, key, end, KEYS, PAGE_ROWS)
        count += 1
    return following, count


@gluon.jit
def assist(
    common,
    source,
    COLUMNS: gl.constexpr,
    GROUPS: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    SHARE: gl.constexpr,
    SHARES: gl.constexpr,
):
    """A producer beside the one that takes the tiles: fetches a share of K or of V for every tile that is announced."""
    (
        descriptors, buffers, bars, letters, counter, lengths, bottom_right, shape, window, mask_steps, total, group,
        pages, tile_list,
    ) = common  # fmt: skip
    mail, posted, taken = letters
    ROWS: gl.constexpr = GROUP_ROWS * GROUPS
    BLOCK_N: gl.constexpr = rows_of(source[1][0].type.shape)
    turn = 0
    count = 0  # blocks fetched so far: their stage and the phase of its barriers
    letter = receive(turn, lengths, mail, posted, taken, VARLEN, 1)
    while letter[0] >= 0:
        number, head, tile, q_batch, q_first, sq, sk, entry = letter
        shift = (sk - sq) * bottom_right
        start, low, blocks = tile_blocks(tile * ROWS, ROWS, sq, sk, shift, window, BLOCK_N, LEFT)
        number, count = fetch_blocks(
            source, pages, entry, head // group, low, blocks, sk, counter, 0, number, count,
            COLUMNS, PAGE_ROWS, SHARE, SHARES, False,
        )  # fmt: skip
        turn += 1
        letter = receive(turn, lengths, mail, posted, taken, VARLEN, 1)
