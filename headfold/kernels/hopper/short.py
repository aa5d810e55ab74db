"""The consumer of short tiles: 64 rows that see few blocks, where several programs share a multiprocessor.

What one program waits for between its tiles the others fill, so nothing here is written to hide much: one loop instead of
three, whose blocks are masked where they need be, and with them less code than the instruction cache holds. Programs have
a left edge and no softcap.
"""

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import gl, gluon, mbarrier, tma_store_wait, warpgroup_mma_wait
from headfold.kernels.hopper.layouts import GROUP_ROWS
from headfold.kernels.hopper.products import (
    issue_scores,
    issue_values,
    no_values,
    operands,
    scaled,
    wait_values,
)
from headfold.kernels.hopper.results import leave_ragged, load_sink, offset, send, write_lse
from headfold.kernels.hopper.schedule import receive
from headfold.kernels.hopper.spans import (
    CHUNKS,
    blocks_of,
    by_column,
    keep,
    row_bounds,
    row_keys,
    rows_of_columns,
    seen_end,
)
from headfold.kernels.hopper.unseen import zero_front, zero_unseen
from headfold.kernels.parts.spans import OPEN


@gluon.jit
def short_spans(letter, bottom_right, window, BLOCK_N: gl.constexpr):
    """What a consumer needs to know of a tile and its keys.

    (first row, first key that the tile sees, first key of its blocks, blocks, `sides_of_blocks`, `row_bounds`,
    `seen_end`).
    """
    if window[2] < OPEN:
        spans = short_spans_of(letter, bottom_right, window, BLOCK_N, CHUNKS)
    else:
        spans = short_spans_of(letter, bottom_right, window, BLOCK_N, True)
    return spans


@gluon.jit
def short_spans_of(letter, bottom_right, window, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """`short_spans`, with chunks where LEFT says so."""
    _, _, tile, _, _, sq, sk, _ = letter
    first = tile * GROUP_ROWS
    shift = (sk - sq) * bottom_right
    start, low, blocks = blocks_of(first, GROUP_ROWS, sq, sk, shift, window, BLOCK_N, LEFT)
    sides = sides_of_blocks(first, sq, sk, shift, window, low, BLOCK_N, LEFT)
    bounds = row_bounds(first, shift, window, sk, BLOCK_N, LEFT)
    return first, start, low, blocks, sides, bounds, seen_end(sq, sk, shift, window, LEFT)


@gluon.jit
def sides_of_blocks(first, sq, sk, shift, window, low, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """(how many blocks begin before a key that the last row sees, from which block on the first row does not see all).

    `low` is the first key of the blocks. The former are masked on their left side, the latter on their right.
    """
    last = gl.maximum(gl.minimum(first + GROUP_ROWS, sq) - 1, 0)
    _, high = row_keys(first, shift, window, sk, LEFT)
    low_of_last, _ = row_keys(last, shift, window, sk, LEFT)
    return gl.cdiv(gl.maximum(low_of_last - low, 0), BLOCK_N), gl.maximum(high - low, 0) // BLOCK_N


@gluon.jit
def hide_side(scores, bound, key, BEFORE: gl.constexpr):
    """`spans.hide` on one side: -inf before each row's key `bound` or from it on, in the block from `key` on.

    A block of a short tile is seldom masked on both sides, and a side takes half of `hide`'s 140 instructions.
    """
    view, eight, column = by_column(scores)
    edge = gl.convert_layout(bound, rows_of_columns(view.type.layout)) - key
    edge = edge[:, None, None, None] - column
    if BEFORE:
        seen = eight >= edge
    else:
        seen = eight < edge
    return keep(scores, view, seen)


@gluon.jit
def hide_sides(scores, bounds, sides, key, block):
    """`spans.hide` of block number `block`, from `key` on, on the sides where some row does not see all of it."""
    if block >= sides[1]:
        scores = hide_side(scores, bounds[1], key, False)
    if block < sides[0]:
        scores = hide_side(scores, bounds[0], key, True)
    return scores


@gluon.jit
def consume_short(
    common,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    VARLEN: gl.constexpr,
):
    """All rows of every tile that the producer announces."""
    reads, bars, letters, out_desc, Out, Lse, lengths, bottom_right, window, scales, sinks = common
    q_buffers, k_buffers, v_buffers, staging = reads
    q_full, q_free, k_full, k_free, v_full, v_free, _turns = bars
    mail, posted, taken = letters
    out_base, out_strides = Out
    lse_base, lse_strides = Lse
    scale_log2 = scales[0]
    Q_STAGES: gl.constexpr = q_buffers[0].type.shape[0]
    dtype: gl.constexpr = q_buffers[0].dtype
    # Where shared memory has room for one buffer of queries four programs share registers, too few for scores beside weights.
    OVERLAP: gl.constexpr = Q_STAGES > 1
    turn = 0
    count = 0
    letter = receive(turn, lengths, mail, posted, taken, VARLEN)
    spans = short_spans(letter, bottom_right, window, BLOCK_N)
    next_sink = load_sink(sinks, letter[1])
    while letter[0] >= 0:
        _, head, tile, q_batch, q_first, sq, sk, _ = letter
        own, start, low, blocks, sides, bounds, end = spans
        sink = next_sink
        stage = count % STAGES
        slot = turn % Q_STAGES
        query = operands(q_buffers, slot, GROUP_ROWS, HEAD_DIM)
        mbarrier.wait(q_full.index(slot), (turn // Q_STAGES) & 1)
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        zero_unseen(
            v_buffers, v_full, count, low + (blocks - 1) * BLOCK_N, start, end, sk,
            BLOCK_N, HEAD_DIM_V, STAGES, VARLEN, True,
        )  # fmt: skip
        count += 1
        scores = hide_sides(scores, bounds, sides, low + (blocks - 1) * BLOCK_N, blocks - 1)
        row_max, row_sum = softmax.begin(BLOCK_N)
        weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
        acc = no_values(HEAD_DIM_V)
        words = softmax.pack(weights, dtype)
        for i in range(blocks - 1):
            block = blocks - 2 - i
            stage = count % STAGES
            older = (count - 1) % STAGES
            if OVERLAP:
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
            mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
            values = operands(v_buffers, older, BLOCK_N, HEAD_DIM_V)
            acc = issue_values(softmax.unpack(words, dtype), values, acc)
            if OVERLAP:
                scores = warpgroup_mma_wait(len(acc), deps=[scores])
            else:
                mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
                acc = wait_values(acc)
                mbarrier.arrive(v_free.index(older), count=1)
                scores = issue_scores(query, operands(k_buffers, stage, BLOCK_N, HEAD_DIM), BLOCK_N)
                scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_free.index(stage), count=1)
            scores = hide_sides(scores, bounds, sides, low + block * BLOCK_N, block)
            weights, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
            if OVERLAP:
                acc = wait_values(acc)
                mbarrier.arrive(v_free.index(older), count=1)
            acc = scaled(acc, shrink)
            words = softmax.pack(weights, dtype)
            count += 1
        mbarrier.arrive(q_free.index(slot), count=1)
        older = (count - 1) % STAGES
        mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        values = operands(v_buffers, older, BLOCK_N, HEAD_DIM_V)
        # Of a sequence's first tile alone: what lies before a later one's first key some row before it sees.
        if (start > low) & (tile == 0):
            zero_front(values, start - low)
        acc = issue_values(softmax.unpack(words, dtype), values, acc)
        turn += 1
        letter = receive(turn, lengths, mail, posted, taken, VARLEN)
        spans = short_spans(letter, bottom_right, window, BLOCK_N)
        next_sink = load_sink(sinks, letter[1])  # a tile before it is used: memory answers meanwhile
        acc = wait_values(acc)
        mbarrier.arrive(v_free.index(older), count=1)
        lse_out = (offset(lse_base, lse_strides, q_batch, q_first, head, 1), lse_strides[1])
        inverse, lse = softmax.finish(row_max, row_sum, scale_log2 * 0.6931471805599453)
        if sinks[0] != 0:
            inverse, lse = softmax.with_sink(inverse, lse, sink)
        acc = scaled(acc, inverse)
        if VARLEN:
            out = (offset(out_base, out_strides, q_batch, q_first, head, 8), out_strides[1])
            leave_ragged(
                acc, lse, staging, 0, out_desc, out, lse_out, lengths[3][0] + lengths[3][2], (q_batch, q_first, head),
                own, sq, HEAD_DIM_V, COLUMNS,
            )  # fmt: skip
        else:
            send(acc, staging, 0, out_desc, q_batch, head, own, 0, HEAD_DIM_V)
            write_lse(lse, lse_out, own, sq)
    tma_store_wait(0)  # shared memory is another program's afterwards
