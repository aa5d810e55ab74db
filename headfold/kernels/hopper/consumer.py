"""A consumer: one warpgroup that attends 64 rows of a tile to its blocks. Plain calls; masked.py has those with a mask."""

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma_store_wait,
    warpgroup_mma_wait,
)
from headfold.kernels.hopper.layouts import GROUP_ROWS, first_part, staged_columns
from headfold.kernels.hopper.products import (
    issue_scores,
    issue_values,
    no_values,
    operands,
    scaled,
    wait_values,
)
from headfold.kernels.hopper.results import finished, halves, leave_ragged, offset, send, store, write_lse
from headfold.kernels.hopper.schedule import pass_turn, receive, wait_turn
from headfold.kernels.hopper.spans import (
    CHUNKS,
    blocks_of,
    full_blocks,
    hide,
    row_bounds,
    seen_blocks,
    seen_end,
)
from headfold.kernels.hopper.unseen import zero_front, zero_unseen
from headfold.kernels.parts.spans import OPEN


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
    bounds,
    scales,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    MASKED: gl.constexpr,
    LEFT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    GROUP: gl.constexpr,
    GROUPS: gl.constexpr,
    EARLY: gl.constexpr,
    COPIED: gl.constexpr = False,
):
    """Blocks blocks[0]-1 down to blocks[1], the weights of the one before them at hand."""
    words, acc, row_max, row_sum = state
    scale_log2, cap_factor = scales
    k_full, k_free, v_full, v_free, turns = bars
    IN_TURN: gl.constexpr = GROUPS > 2
    VALUES: gl.constexpr = v_buffers[0].type.shape[0]
    # Accumulators that are seldom scaled: faster where a consumer has more than 128 columns of them, or one of three more
    # than 64 (docs/hopper.md).
    LAZY: gl.constexpr = HEAD_DIM_V > 128 or (GROUPS > 2 and HEAD_DIM_V > 64)
    # Three consumers have no registers for scores, the weights before them and accumulators of more than 64 columns.
    OVERLAP: gl.constexpr = GROUPS == 2 or HEAD_DIM_V <= 64
    for i in range(blocks[0] - blocks[1]):
        stage = count % STAGES
        older = (count - 1) % VALUES
        if OVERLAP:
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            if COPIED:
                fence_async_shared()
            if IN_TURN:
                mbarrier.wait(v_full.index(older), ((count - 1) // VALUES) & 1)
                wait_turn(turns, count, GROUP)
            scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
            if not IN_TURN:
                mbarrier.wait(v_full.index(older), ((count - 1) // VALUES) & 1)
            if COPIED:
                fence_async_shared()
            values = operands(v_buffers, older, BLOCK_N, HEAD_DIM_V)
            acc = issue_values(softmax.unpack(words, query[0].dtype), values, acc)
            if IN_TURN:
                pass_turn(turns, GROUP, GROUPS)
            scores = warpgroup_mma_wait(len(acc), deps=[scores])
            mbarrier.arrive(k_free.index(stage), count=1)
        else:
            mbarrier.wait(v_full.index(older), ((count - 1) // VALUES) & 1)
            wait_turn(turns, count, GROUP)
            values = operands(v_buffers, older, BLOCK_N, HEAD_DIM_V)
            acc = issue_values(softmax.unpack(words, query[0].dtype), values, acc)
            mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
            acc = wait_values(acc)
            mbarrier.arrive(v_free.index(older), count=1)
            scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
            pass_turn(turns, GROUP, GROUPS)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(stage), count=1)
        if SOFTCAP:
            scores = softmax.capped(scores, cap_factor)
        if MASKED:
            key = low + (blocks[0] - 1 - i) * BLOCK_N
            scores = hide(scores, bounds, key, LEFT)
        if LAZY:
            weights, shrink, row_max, row_sum = softmax.step_lazily(
                scores, row_max, row_sum, scale_log2, MASKED
            )
        else:
            weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, MASKED)
        if OVERLAP:
            acc = wait_values(acc)
            mbarrier.arrive(v_free.index(older), count=1)
        # The next tile's queries come while this one is finished. Above the wait this branch parts what ptxas schedules
        # together (d256, 16384, causal: 619 TFLOP/s against 638).
        if EARLY:
            if blocks[0] - 1 - i == 0:
                mbarrier.arrive(q_done, count=1)
        if LAZY:
            acc = softmax.shrunk(acc, shrink)
        else:
            acc = scaled(acc, shrink)
        words = softmax.pack(weights, query[0].dtype)
        count += 1
    return (words, acc, row_max, row_sum), count


@gluon.jit
def skip(
    blocks, count, bars, STAGES: gl.constexpr, VALUES: gl.constexpr, GROUP: gl.constexpr, GROUPS: gl.constexpr
):
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
        value = count % VALUES
        mbarrier.wait(v_full.index(value), (count // VALUES) & 1)
        mbarrier.arrive(v_free.index(value), count=1)
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
def own_spans(
    letter, bottom_right, window, GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr
):  # fmt: skip
    """What a consumer needs to know of its rows of a tile, and their keys.

    (own first row, what to add to it for its key, first key that the tile sees, first key of its blocks, last blocks
    that are hidden from all own rows, blocks before those, which of them all own rows see in full: [left, right)).
    """
    if LEFT:
        if window[2] < OPEN:
            spans = spans_of(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, CHUNKS)
        else:
            spans = spans_of(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
    else:
        spans = spans_of(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
    return spans


@gluon.jit
def spans_of(
    letter, bottom_right, window, GROUP: gl.constexpr, GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, LEFT: gl.constexpr
):  # fmt: skip
    """`own_spans`, with chunks where LEFT says so."""
    _, _, tile, _, _, sq, sk, _ = letter
    first = tile * (GROUP_ROWS * GROUPS)
    shift = (sk - sq) * bottom_right
    start, low, blocks = blocks_of(first, GROUP_ROWS * GROUPS, sq, sk, shift, window, BLOCK_N, LEFT)
    own = first + GROUP * GROUP_ROWS
    seen = seen_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, blocks, BLOCK_N, LEFT)
    left, right = full_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, seen, BLOCK_N, LEFT)
    return own, shift, start, low, blocks - seen, seen, left, right


@gluon.jit
def own_bounds(own, sq, sk, shift, window, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """(`row_bounds`, `seen_end`) of a consumer's rows."""
    if LEFT:
        if window[2] < OPEN:
            bounds = row_bounds(own, shift, window, sk, BLOCK_N, CHUNKS)
            end = seen_end(sq, sk, shift, window, CHUNKS)
        else:
            bounds = row_bounds(own, shift, window, sk, BLOCK_N, LEFT)
            end = seen_end(sq, sk, shift, window, LEFT)
    else:
        bounds = row_bounds(own, shift, window, sk, BLOCK_N, LEFT)
        end = seen_end(sq, sk, shift, window, LEFT)
    return bounds, end


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
    SOFTCAP: gl.constexpr,
    COPIED: gl.constexpr = False,
):
    """Rows GROUP * 64 to GROUP * 64 + 63 of every tile that the producer announces.

    COPIED: keys and values come by ordinary copies, which a fence must part from products, and rows before the first key that a
    tile sees as zeros.
    """
    reads, bars, letters, out_desc, Out, Lse, lengths, bottom_right, window, scales, sinks = common
    q_buffers, k_buffers, v_buffers, staging = reads
    q_full, q_free, k_full, k_free, v_full, v_free, turns = bars
    mail, posted, taken = letters
    out_base, out_strides = Out
    lse_base, lse_strides = Lse
    flow = (k_full, k_free, v_full, v_free, turns)
    IN_TURN: gl.constexpr = GROUPS > 2
    Q_STAGES: gl.constexpr = q_buffers[0].type.shape[0] // GROUPS
    VALUES: gl.constexpr = v_buffers[0].type.shape[0]
    EARLY: gl.constexpr = Q_STAGES == 1 and not SHARED
    SENT: gl.constexpr = out_desc is not None
    STAGED: gl.constexpr = staging[0].type.shape[4]
    IN_HALVES: gl.constexpr = SENT and not VARLEN and STAGED < first_part(HEAD_DIM_V)
    turn = 0
    count = 0
    letter = receive(turn, lengths, mail, posted, taken, VARLEN)
    spans = own_spans(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
    while letter[0] >= 0:
        _, head, _, q_batch, q_first, sq, sk, _ = letter
        own, shift, start, low, hidden, blocks, left, right = spans
        count = skip(hidden, count, flow, STAGES, VALUES, GROUP, GROUPS)
        stage = count % STAGES
        q_slot = turn % Q_STAGES * GROUPS + GROUP
        query = operands(q_buffers, q_slot, GROUP_ROWS, HEAD_DIM)
        q_done = q_free.index(q_slot)
        mbarrier.wait(q_full.index(q_slot), (turn // Q_STAGES) & 1)
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if COPIED:
            fence_async_shared()
        if IN_TURN:
            wait_turn(turns, count, GROUP)
        scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
        if IN_TURN:
            pass_turn(turns, GROUP, GROUPS)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        if EARLY:
            mbarrier.arrive(q_done, count=1, pred=blocks == 1)
        bounds, end = own_bounds(own, sq, sk, shift, window, BLOCK_N, LEFT)
        zero_unseen(
            v_buffers, v_full, count, low + (blocks - 1) * BLOCK_N, start, end, sk,
            BLOCK_N, HEAD_DIM_V, VALUES, VARLEN, LEFT,
        )  # fmt: skip
        count += 1
        if SOFTCAP:
            scores = softmax.capped(scores, scales[1])
        if (right < blocks) | (left == blocks):
            scores = hide(scores, bounds, low + (blocks - 1) * BLOCK_N, LEFT)
        left = gl.minimum(left, blocks - 1)
        right = gl.minimum(right, blocks - 1)
        row_max, row_sum = softmax.begin(BLOCK_N)
        weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scales[0], True)
        acc = no_values(HEAD_DIM_V)
        state = (softmax.pack(weights, query[0].dtype), acc, row_max, row_sum)
        # Blocks that some row does not see in full lie at both ends.
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, q_done, count, (blocks - 1, right), low, bounds, scales,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, SOFTCAP, GROUP, GROUPS, EARLY, COPIED,
        )  # fmt: skip
        state, count = attend(
            state, query, k_buffers, v_buffers, flow, q_done, count, (right, left), low, bounds, scales,
            HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, False, LEFT, SOFTCAP, GROUP, GROUPS, EARLY, COPIED,
        )  # fmt: skip
        if LEFT:
            state, count = attend(
                state, query, k_buffers, v_buffers, flow, q_done, count, (left, 0), low, bounds, scales,
                HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, True, LEFT, SOFTCAP, GROUP, GROUPS, EARLY, COPIED,
            )  # fmt: skip
        if not EARLY and not SHARED:
            mbarrier.arrive(q_done, count=1)
        words, acc, row_max, row_sum = state
        older = (count - 1) % VALUES
        mbarrier.wait(v_full.index(older), ((count - 1) // VALUES) & 1)
        if COPIED:
            fence_async_shared()
        values = operands(v_buffers, older, BLOCK_N, HEAD_DIM_V)
        if LEFT and not COPIED:
            if start > low:
                zero_front(values, start - low)
        acc = issue_values(softmax.unpack(words, query[0].dtype), values, acc)
        turn += 1
        if not IN_HALVES:
            letter = receive(turn, lengths, mail, posted, taken, VARLEN)
            spans = own_spans(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
        acc = wait_values(acc)
        mbarrier.arrive(v_free.index(older), count=1)
        if SOFTCAP:
            row_max = softmax.uncapped(row_max)
        lse_out = (offset(lse_base, lse_strides, q_batch, q_first, head, 1), lse_strides[1])
        staged = operands(staging, GROUP, GROUP_ROWS, staged_columns(STAGED, HEAD_DIM_V))
        out = (offset(out_base, out_strides, q_batch, q_first, head, 8), out_strides[1])
        acc, lse = finished(acc, row_max, row_sum, scales[0] * 0.6931471805599453, sinks, head)
        if not SENT:
            store(acc, lse, staged, out, lse_out, own, sq, COLUMNS)
        elif VARLEN:
            leave_ragged(
                acc, lse, staging, GROUP, out_desc, out, lse_out, lengths[3][0] + lengths[3][2],
                (q_batch, q_first, head), own, sq, HEAD_DIM_V, COLUMNS,
            )  # fmt: skip
        elif IN_HALVES:
            first_half, second_half = halves(acc[0], STAGED)
            send((first_half,), staging, GROUP, out_desc, q_batch, head, own, 0, STAGED)
            # The copy engine reads the first half meanwhile.
            letter = receive(turn, lengths, mail, posted, taken, VARLEN)
            spans = own_spans(letter, bottom_right, window, GROUP, GROUPS, BLOCK_N, LEFT)
            write_lse(lse, lse_out, own, sq)
            send((second_half,), staging, GROUP, out_desc, q_batch, head, own, STAGED, STAGED)
        else:
            send(acc, staging, GROUP, out_desc, q_batch, head, own, 0, HEAD_DIM_V)
            write_lse(lse, lse_out, own, sq)
        if SHARED:
            release(q_done)
    if SENT:
        tma_store_wait(0)  # shared memory is another program's afterwards
