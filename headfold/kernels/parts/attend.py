"""The loop that both forward kernels run: a tile of folded queries against a range of KV blocks."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import load_index
from headfold.kernels.parts.kv import row_offsets
from headfold.kernels.parts.mask import linear_bias, mask_bias, tree_visible
from headfold.kernels.parts.softmax import soft_cap, softmax_step, softmax_step_log2


@triton.jit
def load_block(
    X,
    desc,
    offset,
    first,
    HEAD_DIM: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    TMA: tl.constexpr,
):
    """Columns START..START+WIDTH of one block of K or V, (BLOCK_N, WIDTH); columns past HEAD_DIM are 0."""
    column = START + tl.arange(0, WIDTH)
    if TMA:
        rows = desc.load([first, START])
    elif START + WIDTH > HEAD_DIM:
        rows = tl.load(X + offset[:, None] + column[None, :], mask=(column < HEAD_DIM)[None, :], other=0.0)
    else:
        rows = tl.load(X + offset[:, None] + column[None, :])
    return rows


@triton.jit
def tensor_bias(
    first, j, lengths, live, mask, tree, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    """What a mask and a tree add to the scores of keys j, (BLOCK_M, BLOCK_N) float32 in log2 units, -inf to hide."""
    bias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if WIDE > 0:
        # Not under a branch: the loop's pipeline fetches it ahead.
        bias = mask_bias(mask, first, lengths[1], live, BLOCK_N, WIDE)
    else:
        if mask[0] != 0:
            bias = mask_bias(mask, first, lengths[1], live, BLOCK_N, WIDE)
        first_new = lengths[1] - lengths[0]
        if (tree[0] != 0) & (first + BLOCK_N > first_new):
            bias = tl.where(tree_visible(tree, j, first_new, lengths[0], live), bias, float("-inf"))
    return bias


@triton.jit
def shape_scores(scores, j, row_position, scales, slopes):
    """Raw scores under softcap and ALiBi, in log2 units.

    What a call does not use costs a branch that all threads of a program take alike. No product stands in one: Triton
    does not pipeline a conditional product, and 3.6 computes some wrongly.
    """
    if scales[1] > 0.0:
        scores = soft_cap(scores, scales[1])
    scores = scores * scales[0]
    if slopes[0] != 0:
        scores += linear_bias(slopes[1], row_position, j)
    return scores


@triton.jit
def attend(
    state,
    queries,
    K,
    V,
    k_desc,
    v_desc,
    table,
    listed,
    first_block,
    last_block,
    key_low,
    key_high,
    row_low,
    row_high,
    row_position,
    lengths,
    live,
    k_strides,
    v_strides,
    page,
    scales,
    slopes,
    mask,
    tree,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGED: tl.constexpr,
    ALIGN: tl.constexpr,
    FEATURED: tl.constexpr,
    TENSORS: tl.constexpr,
    WIDE: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Run blocks first_block..last_block of the keys from key_low on; returns the state after them.

    With an address in `listed`, not None and not 0, these are places in the list of block numbers (int32) there.
    state is (output part 0, output part 1, row maximum, row sum); queries (part 0, part 1) of the tile.
    row_low, row_high (BLOCK_M,) bound the keys that each row sees; key_high the keys of the tile; row_position
    is where a row stands among the keys; lengths is (sq, sk); scales (softmax, softcap); slopes (address or 0, slope
    of each row); mask and tree as their functions take them, addresses 0 for none. With MASKED False the caller
    promises that every row sees every key of these blocks. The maximum of the state is of raw scores, or with
    FEATURED in log2 units.
    """
    acc0, acc1, row_max, row_sum = state
    for i in range(first_block, last_block):
        block = i
        if listed is not None:
            block = load_index(listed, i, i)
        first = key_low + block * BLOCK_N
        j = first + tl.arange(0, BLOCK_N)
        # Past the end the last key is read again and its weight set to 0: no byte beyond the tile's keys is touched,
        # and no mask on the loads keeps the copies asynchronous.
        inside = tl.minimum(j, key_high - 1) if MASKED else j
        k_offset = inside
        v_offset = inside
        if not TMA:
            k_offset = row_offsets(inside, table, k_strides, page[0], page[1], page[2], page[3], PAGED, ALIGN)
            v_offset = row_offsets(inside, table, v_strides, page[0], page[1], page[2], page[3], PAGED, ALIGN)
        bias = 0.0
        if TENSORS:
            # Before the product: loads after it would give the layouts of theirs to the softmax (Triton 3.6 to 3.9).
            bias = tensor_bias(first, j, lengths, live, mask, tree, row_low.shape[0], BLOCK_N, WIDE)
        k = load_block(K, k_desc, k_offset, first, HEAD_DIM, 0, D0, TMA)
        scores = tl.dot(queries[0], tl.trans(k), input_precision="ieee")
        if D1 > 0:
            k = load_block(K, k_desc, k_offset, first, HEAD_DIM, D0, D1, TMA)
            scores = tl.dot(queries[1], tl.trans(k), scores, input_precision="ieee")
        visible = None
        if MASKED:
            visible = (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
        if FEATURED:
            scores = shape_scores(scores, j, row_position, scales, slopes)
            if TENSORS:
                scores = tl.where(bias > float("-inf"), scores + bias, float("-inf"))
            if MASKED:
                scores = tl.where(visible, scores, float("-inf"))
            weights, shrink, row_max, row_sum = softmax_step_log2(scores, row_max, row_sum)
        else:
            weights, shrink, row_max, row_sum = softmax_step(
                scores, visible, row_max, row_sum, scales[0], MASKED
            )
        v = load_block(V, v_desc, v_offset, first, HEAD_DIM_V, 0, DV0, TMA)
        weights = weights.to(v.dtype)
        acc0 = tl.dot(weights, v, acc0 * shrink[:, None], input_precision="ieee")
        if DV1 > 0:
            v = load_block(V, v_desc, v_offset, first, HEAD_DIM_V, DV0, DV1, TMA)
            acc1 = tl.dot(weights, v, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, row_max, row_sum
