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
from headfold.kernels.hopper.spans import EDGE, full_blocks, hide, seen_blocks, tile_blocks


@gluon.jit
def matrix(buffer, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A box (1, 1, ROWS, COLUMNS) of shared memory as a matrix."""
    layout: gl.constexpr = shared_layout(ROWS, COLUMNS, buffer.dtype.primitive_bitwidth, 2)
    return view_as(buffer, buffer.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def issue_scores(query, keys, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Q K^T under way, both from shared memory."""
    return warpgroup_mma(
        matrix(query, GROUP_ROWS, HEAD_DIM),
        matrix(keys, BLOCK_N, HEAD_DIM).permute([1, 0]),
        gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N)),
        use_acc=False,
        is_async=True,
    )


@gluon.jit
def attend(
    state,
    query,
    k_buffers,
    v_buffers,
    bars,
    q_done,
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
    EARLY: gl.constexpr,
):
    """Blocks blocks[0]-1 down to blocks[1]: the scores of a block are under way while the one before it is weighed."""
    words, acc, row_max, row_sum = state
    k_full, k_free, v_full, v_free, turns = bars
    IN_TURN: gl.constexpr = GROUPS > 2
    # Scaling accumulators is 128 of a block's 400 instructions at d256. Measured: 3 % faster there, 4 to 7 % slower below.
    LAZY: gl.constexpr = HEAD_DIM_V > 128
    for i in range(blocks[0] - blocks[1]):
        stage = count % STAGES
        older = (count - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if IN_TURN:
            mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
            wait_turn(turns, count, GROUP)
        scores = issue_scores(query, k_buffers.index(stage), BLOCK_N, HEAD_DIM)
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
        if LAZY:
            weights, shrink, row_max, row_sum = softmax.step_lazily(
                scores, row_max, row_sum, scale_log2, MASKED
            )
        else:
            weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, MASKED)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        # The next tile's queries come while this one is finished. Above the wait this branch parts what ptxas schedules
        # together (d256, 4096: 626 TFLOP/s against 632).
        if EARLY:
            if blocks[0] - 1 - i == 0:
                mbarrier.arrive(q_done, count=1)
        if LAZY:
            acc = softmax.shrunk(acc, shrink)
        else:
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        words = softmax.pack(weights, query.dtype)
        count += 1
    return (words, acc, row_max, row_sum), count


@gluon.jit
def skip(blocks, count, bars, STAGES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr):
    """Hand a tile's last blocks back, of which no row of this consumer sees anything."""
    k_full, k_free, v_full, v_free, turns = bars
    for _ in range(blocks):
        stage = count % STAGES
        phase = (count // STAGES) & 1
        if GROUPS > 2:
            wait_turn(turns, count, GROUP)
            pass_turn(turns, GROUP, GROUPS)
        mbarrier.wait(k_full.index(stage), phase)
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.wait(v_full.index(stage), phase)
        mbarrier.arrive(v_free.index(stage), count=1)
        count += 1
    return count


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
    """Finish 64 rows and write those that exist; COLUMNS of the accumulator's are the head dimension, the rest is padding.

    Wider rows than `staging` has leave in two halves.
    """
    lse_base, lse_stride = Lse
    inverse, lse = softmax.finish(row_max, row_sum, scale)
    acc = acc * gl.convert_layout(inverse, gl.SliceLayout(1, acc.type.layout))[:, None]
    position = first + gl.arange(0, GROUP_ROWS, row_max.type.layout)
    gl.store(lse_base + position.to(gl.int64) * lse_stride, lse, mask=position < sq)
    WIDTH: gl.constexpr = staging.shape[1]
    if WIDTH == acc.shape[1]:
        store_columns(acc, 0, staging, Out, first, sq, COLUMNS)
    else:
        left, right = acc.reshape([GROUP_ROWS, 2, WIDTH]).permute([0, 2, 1]).split()
        store_columns(left, 0, staging, Out, first, sq, COLUMNS)
        store_columns(right, WIDTH, staging, Out, first, sq, COLUMNS)


@gluon.jit
def store_columns(results, start: gl.constexpr, staging, Out, first, sq, COLUMNS: gl.constexpr):
    """Write the columns of 64 rows from `start` on, through shared memory in 16-byte pieces, the unit of Out's strides."""
    base, stride = Out
    WIDTH: gl.constexpr = staging.shape[1]
    layout: gl.constexpr = store_layout(WIDTH)
    results = gl.convert_layout(results, accumulator(WIDTH), assert_trivial=True)
    staging.store(results.to(staging.dtype))
    row = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    column = start + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    live = (row < sq)[:, None]
    if COLUMNS < start + WIDTH:
        live = live & (column < COLUMNS)[None, :]
    offsets = row.to(gl.int64)[:, None] * (stride * 8) + column[None, :]
    gl.store(base + offsets, staging.load(layout), mask=live)


@gluon.jit
def own_spans(
    letter, bottom_right, window, GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr
):  # fmt: skip
    """What a consumer needs to know of its rows of a tile, and their keys.

    (own first row, what to add to it for its key, first key that the tile sees, first key of its blocks, last blocks
    that are hidden from all own rows, blocks before those, which of them all own rows see in full: [left, right)).
    """
    _, _, tile, _, _, sq, sk = letter
    first = tile * (GROUP_ROWS * GROUPS)
    shift = (sk - sq) * bottom_right
    start, low, blocks = tile_blocks(first, GROUP_ROWS * GROUPS, sq, sk, shift, window, BLOCK_N, LEFT)
    own = first + GROUP * GROUP_ROWS
    seen = seen_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, blocks, BLOCK_N)
    left, right = full_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, seen, BLOCK_N)
    return own, shift, start, low, blocks - seen, seen, left, right


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
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
):
    """Rows GROUP * 64 to GROUP * 64 + 63 of every tile that the producer announces."""
    reads, bars, letters, Out, Lse, lengths, bottom_right, window, scale_log2 = common
    q_buffers, k_buffers, v_buffers, staging = reads
    q_full, q_free, k_full, k_free, v_full, v_free, turns = bars
    mail, posted, taken = letters
    out_base, out_strides = Out
    lse_base, lse_strides = Lse
    flow = (k_full, k_free, v_full, v_free, turns)
    IN_TURN: gl.constexpr = GROUPS > 2
    Q_STAGES: gl.constexpr = q_buffers.type.shape[0] // GROUPS
    EARLY: gl.constexpr = Q_STAGES == 1
    turn = 0
    count = 0
    letter = receive(turn, lengths, mail, posted, taken, VARLEN)
    spans = own_spans(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
    while letter[0] >= 0:
        _, head, _, q_batch, q_first, sq, sk = letter
        own, shift, start, low, hidden, blocks, left, right = spans
        count = skip(hidden, count, flow, STAGES, GROUP, GROUPS)
        stage = count % STAGES
        q_slot = turn % Q_STAGES * GROUPS + GROUP
        query = q_buffers.index(q_slot)
        q_done = q_free.index(q_slot)
        mbarrier.wait(q_full.index(q_slot), (turn // Q_STAGES) & 1)
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if IN_TURN:
            wait_turn(turns, count, GROUP)
        scores = issue_scores(query, k_buffers.index(stage), BLOCK_N, HEAD_DIM)
        if IN_TURN:
            pass_turn(turns, GROUP, GROUPS)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        if EARLY:
            mbarrier.arrive(q_done, count=1, pred=blocks == 1)
        zero_unseen(
            v_buffers, v_full, count, low + (blocks - 1) * BLOCK_N, sq + shift + window[1], sk,
            BLOCK_N, HEAD_DIM_V, STAGES, VARLEN,
        )  # fmt: skip
        count += 1
        if (right < blocks) | (left == blocks):
            scores = hide(scores, own + shift, window, sk, low + (blocks - 1) * BLOCK_N, LEFT)
        left = gl.minimum(left, blocks - 1)
        right = gl.minimum(right, blocks - 1)
        row_max, row_sum = softmax.begin(BLOCK_N)
        weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
        acc = gl.zeros([GROUP_ROWS, HEAD_DIM_V], gl.float32, accumulator(HEAD_DIM_V))
        state = (softmax.pack(weights, query.dtype), acc, row_max, row_sum)
        # Blocks that some row does not see in full lie at both ends.
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, q_done, count, (blocks - 1, right), low, sk, own + shift, window,
            scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, GROUP, GROUPS, EARLY,
        )  # fmt: skip
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, q_done, count, (right, left), low, sk, own + shift, window,
            scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, False, LEFT, GROUP, GROUPS, EARLY,
        )  # fmt: skip
        if LEFT:
            state, count = attend(
                state, query, k_buffers, v_buffers, flow, q_done, count, (left, 0), low, sk, own + shift, window,
                scale_log2, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, GROUP, GROUPS, EARLY,
            )  # fmt: skip
        if not EARLY:
            mbarrier.arrive(q_done, count=1)
        words, acc, row_max, row_sum = state
        older = (count - 1) % STAGES
        mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        values = matrix(v_buffers.index(older), BLOCK_N, HEAD_DIM_V)
        if LEFT:
            if start > low:
                zero_front(values, start - low, HEAD_DIM_V)
        acc = warpgroup_mma(softmax.unpack(words, query.dtype), values, acc, is_async=True)
        turn += 1
        letter = receive(turn, lengths, mail, posted, taken, VARLEN)
        spans = own_spans(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        store(
            acc,
            row_max,
            row_sum,
            scale_log2 * 0.6931471805599453,
            matrix(staging.index(GROUP), GROUP_ROWS, staging.type.shape[4]),
            (offset(out_base, out_strides, q_batch, q_first, head, 8), out_strides[1]),
            (offset(lse_base, lse_strides, q_batch, q_first, head, 1), lse_strides[1]),
            own,
            sq,
            COLUMNS,
        )
