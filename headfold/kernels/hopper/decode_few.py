"""Few folded rows of a decode, up to 32: products whose rows are keys, and whose columns are queries.

A product of a warpgroup has 64 rows, which 4 or 8 queries would leave empty. Keys fill them: scores are K Qᵀ, and what is
weighed Vᵀ Pᵀ, of which the weights go through shared memory.
"""

from headfold.kernels.hopper.compat import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from headfold.kernels.hopper.layouts import accumulator
from headfold.kernels.hopper.products import operands
from headfold.kernels.hopper.unseen import zero_outside


@gluon.jit
def hide_keys(scores, row_low, row_high, key):
    """`scores` (keys, rows) of the block from `key` on, -inf where a row does not see the key."""
    index = key + gl.arange(0, scores.shape[0], gl.SliceLayout(1, scores.type.layout))
    seen = (index[:, None] >= row_low[None, :]) & (index[:, None] < row_high[None, :])
    return gl.where(seen, scores, float("-inf"))


@gluon.jit
def weigh(scores, row_max, sums, scale_log2):
    """One block of raw scores (keys, rows) into the running softmax, as `softmax.step` does.

    `sums` (keys, rows) are added up over keys once, behind the last block. Returns the weights, the factor that older sums
    shrink by, the new row maximum and `sums`.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 0))
    safe = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - (safe * scale_log2)[None, :])
    shrink = gl.exp2((row_max - safe) * scale_log2)
    return weights, shrink, new_max, sums * shrink[None, :] + weights


@gluon.jit
def hand_over(weights, buffer):
    """Put weights (keys, rows) where a product takes them from, `buffer` (rows, keys)."""
    buffer.permute([1, 0]).store(weights.to(buffer.dtype))
    fence_async_shared()
    barrier()


@gluon.jit
def attend_few(
    query,
    w_buffers,
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
    """`decode_consumer.attend` with its results turned round: (accumulator (columns, rows), row maximum, row sum, count).

    Weights have two buffers: a warp may be a product behind the others when they write the next block's.
    """
    ROWS: gl.constexpr = query.type.shape[0]
    layout: gl.constexpr = accumulator(ROWS)
    k_full, k_free, v_full, v_free = bars
    zeros = gl.zeros([BLOCK_N, ROWS], gl.float32, layout)
    stage = count % STAGES
    mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    keys = operands((k_buffers,), stage, BLOCK_N, TILE_D)[0]
    scores = warpgroup_mma(keys, query.permute([1, 0]), zeros, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_free.index(stage), count=1)
    # Only a share's first block and its last hold values that nobody sees.
    mbarrier.wait(v_full.index(stage), (count // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    unweighed = operands((v_buffers,), stage, BLOCK_N, TILE_DV)[0]
    zero_outside(unweighed, first, seen[0], seen[1], TILE_DV)
    scores = hide_keys(scores, row_low, row_high, first)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(0, layout))
    p, shrink, row_max, sums = weigh(scores, row_max, zeros, scale_log2)
    hand_over(p, w_buffers.index(count & 1))
    acc = gl.zeros([TILE_DV, ROWS], gl.float32, layout)
    count += 1
    for i in range(1, blocks):
        stage = count % STAGES
        older = (count - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (count // STAGES) & 1)
        if COPIED:
            fence_async_shared()
        keys = operands((k_buffers,), stage, BLOCK_N, TILE_D)[0]
        scores = warpgroup_mma(keys, query.permute([1, 0]), zeros, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
        if COPIED:
            fence_async_shared()
        values = operands((v_buffers,), older, BLOCK_N, TILE_DV)[0]
        weights = w_buffers.index((count - 1) & 1)
        acc = warpgroup_mma(values.permute([1, 0]), weights.permute([1, 0]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage), count=1)
        key = first + i * BLOCK_N
        if (key < full[0]) | (key + BLOCK_N > full[1]):
            scores = hide_keys(scores, row_low, row_high, key)
        p, shrink, row_max, sums = weigh(scores, row_max, sums, scale_log2)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_free.index(older), count=1)
        acc = acc * shrink[None, :]
        hand_over(p, w_buffers.index(count & 1))
        count += 1
    older = (count - 1) % STAGES
    mbarrier.wait(v_full.index(older), ((count - 1) // STAGES) & 1)
    if COPIED:
        fence_async_shared()
    values = operands((v_buffers,), older, BLOCK_N, TILE_DV)[0]
    if blocks > 1:
        zero_outside(values, first + (blocks - 1) * BLOCK_N, seen[0], seen[1], TILE_DV)
    weights = w_buffers.index((count - 1) & 1)
    acc = warpgroup_mma(values.permute([1, 0]), weights.permute([1, 0]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_free.index(older), count=1)
    return acc, row_max, gl.sum(sums, 0), count
