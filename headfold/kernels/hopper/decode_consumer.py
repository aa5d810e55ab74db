"""The decode kernel's consumers: each a warpgroup that attends 64 folded rows of a tile, or few, to the program's blocks."""

import triton.language as tl

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headfold.kernels.hopper.decode_few import attend_few
from headfold.kernels.hopper.decode_schedule import share
from headfold.kernels.hopper.layouts import GROUP_ROWS, accumulator, store_layout, weights_layout
from headfold.kernels.hopper.products import operands
from headfold.kernels.hopper.spans import hide
from headfold.kernels.hopper.unseen import zero_outside
from headfold.kernels.parts.division import divide
from headfold.kernels.parts.spans import visible_keys


@gluon.jit
def row_places(first_row, unit, fold, by_fold, ROWS: gl.constexpr, layout: gl.constexpr):
    """(query position, head, folded row) of the ROWS rows from `first_row` on."""
    row = first_row + gl.arange(0, ROWS, layout)
    position = divide(row, by_fold)
    return position, unit * fold + row - position * fold, row


@gluon.jit
def load_queries(base, strides, first_row, rows, unit, fold, by_fold, buffer, HEAD_DIM: gl.constexpr):
    """Gather folded rows, 0 from row `rows` on, into shared memory. HEAD_DIM columns of them exist."""
    ROWS: gl.constexpr = buffer.type.shape[0]
    COLUMNS: gl.constexpr = buffer.type.shape[1]
    layout: gl.constexpr = store_layout(COLUMNS)
    position, head, row = row_places(first_row, unit, fold, by_fold, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
    at = position.to(gl.int64) * strides[0] + head.to(gl.int64) * strides[1]
    live = (row < rows)[:, None] & (column < HEAD_DIM)[None, :]
    loaded = gl.load(base + (at[:, None] + column[None, :]), mask=live, other=0.0)
    barrier()  # all warps have done with the tile before
    buffer.store(loaded)
    fence_async_shared()
    barrier()


@gluon.jit
def store_rows(base, offsets, live, values, COLUMNS: gl.constexpr, FEW: gl.constexpr):
    """Write the first COLUMNS columns of the live rows at `offsets`, rounded to the pointer's type.

    `values` are (rows, columns), or with FEW (columns, rows).
    """
    if FEW:
        column = gl.arange(0, values.shape[0], gl.SliceLayout(1, values.type.layout))
        places = offsets[None, :] + column[:, None]
        mask = live[None, :] & (column < COLUMNS)[:, None]
    else:
        column = gl.arange(0, values.shape[1], gl.SliceLayout(0, values.type.layout))
        places = offsets[:, None] + column[None, :]
        mask = live[:, None] & (column < COLUMNS)[None, :]
    gl.store(base + places, values.to(base.dtype.element_ty), mask=mask)


@gluon.jit
def note_ends(place, r, first, last):
    """Write down at `place` that range r has a tile's first blocks, and behind it that it has the last."""
    gl.store(place, r, mask=first)
    gl.store(place + 1, r, mask=last)


@gluon.jit
def attend(
    query,
    k_buffers,
    v_buffers,
    bars,
    count,
    first,
    blocks,
    seen,
    full,
    row_low,
    row_high,
    scale_log2,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    COPIED: gl.constexpr,
):
    """`blocks` blocks of keys from key `first` on: (accumulator, row maximum, row sum in parts, blocks counted so far).

    The scores of a block are under way while the values of the one before it are weighed. `seen` are the keys that some
    row of the tile sees, `full` those that every row of these 64 sees. COPIED: keys and values come by ordinary copies, which a
    fence must part from products.
    """
    k_full, k_free, v_full, v_free = bars
    zeros = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N))
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    keys = operands((k_buffers,), stage, BLOCK_N, TILE_D)[0]
    scores = warpgroup_mma(query, keys.permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    # Only a share's first block and its last hold values that nobody sees.
    mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    unweighed = operands((v_buffers,), stage, BLOCK_N, TILE_DV)[0]
    zero_outside(unweighed, first, seen[0], seen[1], TILE_DV)
    scores = hide(scores, (row_low, row_high), first, True)
    row_max, row_sum = softmax.begin(BLOCK_N)
    p, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
    weights = gl.convert_layout(p.to(query.dtype), weights_layout(BLOCK_N))
    acc = gl.zeros([GROUP_ROWS, TILE_DV], gl.float32, accumulator(TILE_DV))
    count += 1
    for i in range(1, blocks):
        stage = count % STAGES
        older = (count - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if COPIED:
            fence_async_shared()
        keys = operands((k_buffers,), stage, BLOCK_N, TILE_D)[0]
        scores = warpgroup_mma(query, keys.permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        if COPIED:
            fence_async_shared()
        values = operands((v_buffers,), older, BLOCK_N, TILE_DV)[0]
        acc = warpgroup_mma(weights, values, acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        key = first + i * BLOCK_N
        if (key < full[0]) | (key + BLOCK_N > full[1]):
            scores = hide(scores, (row_low, row_high), key, True)
        p, shrink, row_max, row_sum = softmax.step(scores, row_max, row_sum, scale_log2, True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        weights = gl.convert_layout(p.to(query.dtype), weights_layout(BLOCK_N))
        count += 1
    older = (count - 1) % STAGES
    mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    values = operands((v_buffers,), older, BLOCK_N, TILE_DV)[0]
    if blocks > 1:
        zero_outside(values, first + (blocks - 1) * BLOCK_N, seen[0], seen[1], TILE_DV)
    acc = warpgroup_mma(weights, values, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(older), count=1)
    return acc, row_max, row_sum, count


@gluon.jit
def consume(
    GROUP: gl.constexpr,
    common,
    begins,
    work,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    TILE_D: gl.constexpr,
    TILE_DV: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
    PAIRED: gl.constexpr,
    COPIED: gl.constexpr = False,
):
    """Rows GROUP * 64 to GROUP * 64 + 63 of the tile, or all of one of fewer, over all of the program's shares.

    PAIRED: the kernel is `hopper_pair_kernel`. All results are states then, and the first and the last program of each tile
    say so for `pair_merge_kernel`.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    buffers, bars, Q, Out, Lse, states, unit, fold, by_fold, window, lane, scale_log2 = common
    q_buffers, k_buffers, v_buffers, w_buffers = buffers
    x, x_end, item, start, gap = begins
    FEW: gl.constexpr = BLOCK_M < GROUP_ROWS
    ROWS: gl.constexpr = BLOCK_M if FEW else GROUP_ROWS
    rows: gl.constexpr = (
        gl.SliceLayout(0, accumulator(ROWS)) if FEW else gl.SliceLayout(1, accumulator(BLOCK_N))
    )
    out_rows: gl.constexpr = rows if FEW else gl.SliceLayout(1, accumulator(TILE_DV))
    query = q_buffers.index(GROUP)
    count = 0
    while x < x_end:
        seq, first_row, span, low, begin, end, next_start, shared, state = share(
            x, x_end, item, start, gap, work, BLOCK_M, BLOCK_N, PAIRED
        )
        if PAIRED:
            one = (begin < end) & (unit == 0)
            place = states[5] + 2 * (item * states[6] + work[2])
            note_ends(place, work[0], one & (begin == 0), one & (next_start - gap <= x_end))
        if begin < end:
            q_first, sq, _, _, sk, shift, key_low, key_high = span
            own = first_row + GROUP * GROUP_ROWS
            many = sq * fold
            sequence = seq.to(gl.int64)
            base = Q[0] + (sequence * Q[1] + q_first.to(gl.int64) * Q[2])
            load_queries(base, (Q[2], Q[3]), own, many, unit, fold, by_fold, query, HEAD_DIM)
            position, _, _ = row_places(own, unit, fold, by_fold, ROWS, rows)
            row_low, row_high = visible_keys(position, shift, window[0], window[1], 0, sk, False)
            last = gl.maximum(gl.minimum(own + ROWS, many) - 1, 0)
            _, full_high = visible_keys(divide(own, by_fold), shift, window[0], window[1], 0, sk, False)
            full_low, _ = visible_keys(divide(last, by_fold), shift, window[0], window[1], 0, sk, False)
            if FEW:
                acc, row_max, total, count = attend_few(
                    query, w_buffers, k_buffers, v_buffers, bars, count, low + begin * BLOCK_N, end - begin,
                    (key_low, key_high), (full_low, full_high), row_low, row_high, scale_log2, TILE_D, TILE_DV, BLOCK_N,
                    STAGES, COPIED,
                )  # fmt: skip
                inverse, lse = softmax.finish_total(row_max, total, scale_log2 * 0.6931471805599453)
                acc = acc * inverse[None, :]
            else:
                acc, row_max, row_sum, count = attend(
                    query, k_buffers, v_buffers, bars, count, low + begin * BLOCK_N, end - begin, (key_low, key_high),
                    (full_low, full_high), row_low, row_high, scale_log2, TILE_D, TILE_DV, BLOCK_N, STAGES, COPIED,
                )  # fmt: skip
                inverse, lse = softmax.finish(row_max, row_sum, scale_log2 * 0.6931471805599453)
                acc = acc * gl.convert_layout(inverse, out_rows)[:, None]
            position, head, row = row_places(own, unit, fold, by_fold, ROWS, out_rows)
            lse = gl.convert_layout(lse, out_rows)
            live = row < many
            if PAIRED:
                number = gl.where(shared, state, states[4] + item)  # an uncut tile's states are counted apart
                at = (number * lane[1] + lane[0]).to(gl.int64) * states[3] + (row - first_row)
                store_rows(states[0], at * states[2], live, acc, HEAD_DIM_V, FEW)
                gl.store(states[1] + at, lse, mask=live)
            elif shared:
                # Row by row as store_state of the Triton kernels leaves them for merge_kernel.
                at = (state * lane[1] + lane[0]).to(gl.int64) * states[3] + (row - first_row)
                store_rows(states[0], at * states[2], live, acc, HEAD_DIM_V, FEW)
                gl.store(states[1] + at, lse, mask=live)
            else:
                where = position.to(gl.int64)
                there = Out[0] + (sequence * Out[1] + q_first.to(gl.int64) * Out[2])
                store_rows(there, where * Out[2] + head.to(gl.int64) * Out[3], live, acc, HEAD_DIM_V, FEW)
                at = where * Lse[2] + head.to(gl.int64) * Lse[3]
                gl.store(Lse[0] + (sequence * Lse[1] + q_first.to(gl.int64) * Lse[2]) + at, lse, mask=live)
        x = next_start
        start = next_start
        item += 1
