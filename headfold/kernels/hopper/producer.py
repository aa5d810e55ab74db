"""The producer: one warp that takes tiles from the counter and has the copy engine fetch Q, K, V and mask blocks."""

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.layouts import columns_in_memory
from headfold.kernels.hopper.pages import apart, fetch_block, look_up_block
from headfold.kernels.hopper.products import boxes_of
from headfold.kernels.hopper.schedule import asking_block, last_place, publish, sign_off, take
from headfold.kernels.hopper.spans import find, locate, sequence, tile_blocks


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
    k_groups=0,
    v_groups=0,
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
    k_source = (k_desc, k_buffers, k_full, k_free, k_groups)
    v_source = (v_desc, v_buffers, v_full, v_free, v_groups)
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
        # A block ahead where V has a producer of its own, else in front of the wait.
        ahead = (0, 0)
        if apart(BLOCK_N, PAGE_ROWS):
            ahead = look_up_block(k_source, pages, entry, low + (blocks - 1) * BLOCK_N, sk, PAGE_ROWS)
        for i in range(blocks):
            if i == asking_block(blocks, STAGES, VARLEN):
                following = take(counter, programs)
            key = low + (blocks - 1 - i) * BLOCK_N
            stage = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            if apart(BLOCK_N, PAGE_ROWS):
                where = ahead
                fetch_block(k_source, where, pages, kv_head, count, HEAD_DIM)
                ahead = look_up_block(k_source, pages, entry, key - BLOCK_N, sk, PAGE_ROWS)
            elif PAGE_ROWS > 0:
                where = look_up_block(k_source, pages, entry, key, sk, PAGE_ROWS)
                fetch_block(k_source, where, pages, kv_head, count, HEAD_DIM)
                fetch_block(v_source, where, pages, kv_head, count, HEAD_DIM_V)
            else:
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
                fetch_rows(
                    k_desc, k_batch, kv_head, k_first + key, k_full.index(stage), k_buffers, stage, HEAD_DIM
                )
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), BLOCK_N * ROW_BYTES_V)
                fetch_rows(
                    v_desc, k_batch, kv_head, k_first + key, v_full.index(stage), v_buffers, stage, HEAD_DIM_V
                )
            count += 1
        turn += 1
        number = following
    publish(-1, (0, 0, 0, 0), (0, 0, 0), turn, mail, posted, taken, VARLEN)
    sign_off(counter, programs)
