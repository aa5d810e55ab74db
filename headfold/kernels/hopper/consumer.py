"""A consumer: one warpgroup that attends 64 rows of a tile to its blocks. Plain calls; masked.py has those with a mask."""

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    view_as,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headfold.kernels.hopper.layouts import (
    GROUP_ROWS,
    accumulator,
    shared_layout,
    store_layout,
)
from headfold.kernels.hopper.schedule import pass_turn, receive, wait_turn
from headfold.kernels.hopper.spans import EDGE, full_blocks, sequence, tile_blocks


@gluon.jit
def matrix(buffer, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A box (1, 1, ROWS, COLUMNS) of shared memory as a matrix."""
    layout: gl.constexpr = shared_layout(ROWS, COLUMNS, buffer.dtype.primitive_bitwidth, 2)
    return view_as(buffer, buffer.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def hide(scores, first, window, sk, key, LEFT: gl.constexpr):
    """`scores` of the block from `key` on, -inf where a row does not see the key. Row i stands at key `first` + i.

    A thread's columns are 8 i + 2 lane + j. Seen with a dimension for each, i is a constant that a comparison takes as
    it is; column numbers would take 32 registers. Without LEFT the left side of the window is open.
    """
    ROWS: gl.constexpr = scores.shape[0]
    COLUMNS: gl.constexpr = scores.shape[1]
    view = scores.reshape([ROWS, COLUMNS // 8, 4, 2])
    layout: gl.constexpr = view.type.layout
    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, layout))))
    eight = gl.arange(0, COLUMNS // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, layout)))) * 8
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout)))) * 2
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    column = lane[None, None, :, None] + pair[None, None, None, :]
    high = gl.minimum(row + (first + window[1] + 1 - key), sk - key)
    seen = eight[None, :, None, None] < high[:, None, None, None] - column
    if LEFT:
        low = row + (first - window[0] - key)
        seen = seen & (eight[None, :, None, None] >= low[:, None, None, None] - column)
    view = gl.where(seen, view, float("-inf"))
    return gl.convert_layout(view.reshape([ROWS, COLUMNS]), scores.type.layout, assert_trivial=True)


@gluon.jit
def attend(
    state,
    query,
    k_buffers,
    v_buffers,
    bars,
    count,
    blocks,
    low,
    sk,
    own,
    window,
    scale_log2,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    LEFT: gl.constexpr,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Blocks blocks[0]-1 down to blocks[1]: the scores of a block are under way while the one before it is weighed."""
    words, acc, row_max, row_sum = state
    k_full, k_free, v_full, v_free, turns = bars
    IN_TURN: gl.constexpr = GROUPS > 2
    for i in range(blocks[0] - blocks[1]):
        stage = count % STAGES
        older = (count - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if IN_TURN:
            mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
            wait_turn(turns, count, GROUP)
        keys = matrix(k_buffers.index(stage), BLOCK_N, HEAD_DIM)
        scores = warpgroup_mma(
            query,
            keys.permute([1, 0]),
            gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N)),
            use_acc=False,
            is_async=True,
        )
        if not IN_TURN:
            mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        values = matrix(v_buffers.index(older), BLOCK_N, HEAD_DIM_V)
        acc = warpgroup_mma(softmax.unpack(words, query.dtype), values, acc, is_async=True)
        if IN_TURN:
            pass_turn(turns, GROUP, GROUPS)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        if MASKED:
            key = low + (blocks[0] - 1 - i) * BLOCK_N
            scores = hide(scores, own, window, sk, key, LEFT)
        weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, MASKED)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        words = softmax.pack(weights, query.dtype)
        count += 1
    return (words, acc, row_max, row_sum), count


@gluon.jit
def release(free):
    """Hand shared memory that all four warps have read by ordinary loads back to the producer."""
    # What the copy engine writes next must not overtake these reads: without the fence it did (41 of 600 runs).
    fence_async_shared()
    barrier()
    mbarrier.arrive(free, count=1)


@gluon.jit
def zero_unseen(
    v_buffers,
    v_full,
    count,
    key,
    end,
    sk,
    BLOCK_N: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    STAGES: gl.constexpr,
    VARLEN: gl.constexpr,
):
    """Zero the values from key `end` on in a tile's last block, number `count`, whose first key is `key`.

    `end` is where the keys end that the last query sees. What lies between it and sk may hold NaN, and a weight of 0
    does not help against that; beyond sk the copy engine fills in zeros. Each consumer writes for itself: the other
    reads the same bytes or these zeros.
    """
    outside = end < sk
    if VARLEN:  # beyond sk comes another sequence, or what an earlier one left
        outside = True
        end = gl.minimum(end, sk)
    if (end < key + BLOCK_N) & outside:
        PART: gl.constexpr = 32
        layout: gl.constexpr = store_layout(HEAD_DIM_V)
        stage = count % STAGES
        mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
        values = matrix(v_buffers.index(stage), BLOCK_N, HEAD_DIM_V)
        for i in gl.static_range(BLOCK_N // PART):
            if end < key + (i + 1) * PART:
                part = values.slice(i * PART, PART)
                index = key + i * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
                loaded = part.load(layout)
                part.store(gl.where((index < end)[:, None], loaded, gl.zeros_like(loaded)))
        fence_async_shared()
        barrier()


@gluon.jit
def zero_front(values, rows, HEAD_DIM_V: gl.constexpr):
    """Zero the first `rows` values of a tile's first block, fewer than EDGE, which lie before the first key it sees."""
    layout: gl.constexpr = store_layout(HEAD_DIM_V)
    part = values.slice(0, EDGE)
    index = gl.arange(0, EDGE, gl.SliceLayout(1, layout))
    loaded = part.load(layout)
    part.store(gl.where((index >= rows)[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
    barrier()


@gluon.jit
def offset(base, strides, batch, row, head, UNIT: gl.constexpr):
    """Where the rows of a sequence's head begin; strides are (batch, row, head) in units of UNIT elements."""
    return base + (batch * strides[0] + row * strides[1] + head * strides[2]) * UNIT


@gluon.jit
def store(acc, row_max, row_sum, scale, staging, Out, Lse, first, sq, COLUMNS: gl.constexpr):
    """Finish 64 rows and write those that exist, through shared memory in 16-byte pieces, the unit of Out's strides.

    COLUMNS of the accumulator's are the head dimension, the rest is padding.
    """
    out_base, out_stride = Out
    lse_base, lse_stride = Lse
    inverse, lse = softmax.finish(row_max, row_sum, scale)
    layout: gl.constexpr = store_layout(acc.shape[1])
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
    staging.store(acc.to(staging.dtype))
    position = first + gl.arange(0, GROUP_ROWS, row_max.type.layout)
    gl.store(lse_base + position.to(gl.int64) * lse_stride, lse, mask=position < sq)
    row = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    live = (row < sq)[:, None]
    if COLUMNS < acc.shape[1]:
        live = live & (column < COLUMNS)[None, :]
    offsets = row.to(gl.int64)[:, None] * (out_stride * 8) + column[None, :]
    gl.store(out_base + offsets, staging.load(layout), mask=live)


@gluon.jit
def consume(
    GROUP: gl.constexpr,
    common,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    SHARED: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
):
    """Rows GROUP * 64 to GROUP * 64 + 63 of every tile that the producer announces."""
    reads, bars, letters, Out, Lse, lengths, bottom_right, shape, window, scale_log2 = common
    q_buffers, k_buffers, v_buffers, staging = reads
    q_full, q_free, k_full, k_free, v_full, v_free, turns = bars
    mail, posted, taken = letters
    out_base, out_strides = Out
    lse_base, lse_strides = Lse
    IN_TURN: gl.constexpr = GROUPS > 2
    query = matrix(q_buffers.index(GROUP), GROUP_ROWS, HEAD_DIM)
    turn = 0
    count = 0
    number, entry, head, tile = receive(turn, shape, mail, posted, taken, VARLEN)
    while number >= 0:
        q_batch, q_first, sq, k_batch, k_first, sk = sequence(entry, lengths, VARLEN)
        first = tile * (GROUP_ROWS * GROUPS)
        shift = (sk - sq) * bottom_right
        start, low, blocks = tile_blocks(first, GROUP_ROWS * GROUPS, sq, sk, shift, window, BLOCK_N, LEFT)
        own = first + GROUP * GROUP_ROWS
        left, right = full_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, blocks, BLOCK_N)

        stage = count % STAGES
        zero_unseen(
            v_buffers, v_full, count, low + (blocks - 1) * BLOCK_N, sq + shift + window[1], sk,
            BLOCK_N, HEAD_DIM_V, STAGES, VARLEN,
        )  # fmt: skip
        mbarrier.wait(q_full.index(GROUP), turn & 1)
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if IN_TURN:
            wait_turn(turns, count, GROUP)
        keys = matrix(k_buffers.index(stage), BLOCK_N, HEAD_DIM)
        scores = warpgroup_mma(
            query,
            keys.permute([1, 0]),
            gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N)),
            use_acc=False,
            is_async=True,
        )
        if IN_TURN:
            pass_turn(turns, GROUP, GROUPS)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        count += 1
        if (right < blocks) | (left == blocks):
            scores = hide(scores, own + shift, window, sk, low + (blocks - 1) * BLOCK_N, LEFT)
        left = gl.minimum(left, blocks - 1)
        right = gl.minimum(right, blocks - 1)
        row_max, row_sum = softmax.begin(BLOCK_N)
        weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
        acc = gl.zeros([GROUP_ROWS, HEAD_DIM_V], gl.float32, accumulator(HEAD_DIM_V))
        state = (softmax.pack(weights, query.dtype), acc, row_max, row_sum)
        flow = (k_full, k_free, v_full, v_free, turns)
        # Blocks that some row does not see in full lie at both ends.
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, count, (blocks - 1, right), low, sk, own + shift, window,
            scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, GROUP, GROUPS,
        )  # fmt: skip
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, count, (right, left), low, sk, own + shift, window,
            scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, False, LEFT, GROUP, GROUPS,
        )  # fmt: skip
        if LEFT:
            state, count = attend(
                state, query, k_buffers, v_buffers, flow, count, (left, 0), low, sk, own + shift, window,
                scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, GROUP, GROUPS,
            )  # fmt: skip
        # The next tile's queries come while this one is finished.
        if not SHARED:
            mbarrier.arrive(q_free.index(GROUP), count=1)
        words, acc, row_max, row_sum = state
        older = (count - 1) % STAGES
        mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        values = matrix(v_buffers.index(older), BLOCK_N, HEAD_DIM_V)
        if LEFT:
            if start > low:
                zero_front(values, start - low, HEAD_DIM_V)
        acc = warpgroup_mma(softmax.unpack(words, query.dtype), values, acc, is_async=True)
        turn += 1
        # Divisions, while the tensor cores work.
        number, following, next_head, tile = receive(turn, shape, mail, posted, taken, VARLEN)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        store(
            acc,
            row_max,
            row_sum,
            scale_log2 * 0.6931471805599453,
            matrix(staging.index(GROUP), GROUP_ROWS, HEAD_DIM_V),
            (offset(out_base, out_strides, q_batch, q_first, head, 8), out_strides[1]),
            (offset(lse_base, lse_strides, q_batch, q_first, head, 1), lse_strides[1]),
            own,
            sq,
            COLUMNS,
        )
        if SHARED:
            release(q_free.index(GROUP))
        entry = following
        head = next_head
