"""The producer: one warp that takes tiles from the counter and has the copy engine fetch Q, K, V and mask blocks."""

from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_load
from headfold.kernels.hopper.schedule import publish, sign_off, take
from headfold.kernels.hopper.spans import locate, sequence, tile_blocks


@gluon.jit
def produce(
    common,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    VARLEN: gl.constexpr,
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
    ) = common
    q_desc, k_desc, v_desc, mask_desc = descriptors
    q_buffers, k_buffers, v_buffers, mask_buffers = buffers
    q_full, q_free, k_full, k_free, v_full, v_free = bars
    mail, posted, taken = letters
    ROWS: gl.constexpr = q_buffers.type.shape[3]
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    turn = 0
    count = 0  # blocks fetched so far: their stage and the phase of its barriers
    while number < total:
        entry, head, tile = locate(number, shape)
        q_batch, q_first, sq, k_batch, k_first, sk = sequence(entry, lengths, VARLEN)
        first = tile * (ROWS * GROUPS)
        following = number
        if first < sq:  # a ragged batch has the tiles of its longest sequence for every one
            publish(number, turn, mail, posted, taken)
            shift = (sk - sq) * bottom_right
            low, high, blocks = tile_blocks(first, ROWS * GROUPS, sq, sk, shift, window, BLOCK_N)
            kv_head = head // group
            for c in gl.static_range(GROUPS):
                mbarrier.wait(q_free.index(c), (turn & 1) ^ 1)
                mbarrier.expect(q_full.index(c), q_desc.block_type.nbytes)
                tma_load(
                    q_desc,
                    [q_batch, head, q_first + first + c * ROWS, 0],
                    q_full.index(c),
                    q_buffers.index(c),
                )
            for i in range(blocks):
                if i == gl.minimum(
                    blocks - 1, STAGES
                ):  # the answer takes a microsecond, and the buffers are full
                    following = take(counter, programs)
                key = low + (blocks - 1 - i) * BLOCK_N
                stage = count % STAGES
                phase = ((count // STAGES) & 1) ^ 1
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
                    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma_load(
                    k_desc, [k_batch, kv_head, k_first + key, 0], k_full.index(stage), k_buffers.index(stage)
                )
                mbarrier.wait(v_free.index(stage), phase)
                mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
                tma_load(
                    v_desc, [k_batch, kv_head, k_first + key, 0], v_full.index(stage), v_buffers.index(stage)
                )
                count += 1
            turn += 1
        else:
            following = take(counter, programs)
        number = following
    publish(total, turn, mail, posted, taken)
    sign_off(counter, programs)
