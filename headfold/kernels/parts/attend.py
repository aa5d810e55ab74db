"""The loop that both forward kernels run: a tile of folded queries against a range of KV blocks."""

import triton
import triton.language as tl

from headfold.kernels.parts.kv import row_offsets
from headfold.kernels.parts.mask import linear_bias, tensor_mask, tree_visible
from headfold.kernels.parts.softmax import soft_cap, softmax_step


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
def attend_block(
    state,
    queries,
    K,
    V,
    k_desc,
    v_desc,
    table,
    first,
    key_high,
    j,
    visible,
    bias,
    k_strides,
    v_strides,
    page,
    scales,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    ALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """The state after keys first..first+BLOCK_N, seen where `visible`, with `bias` (None: none) on the scores."""
    acc0, acc1, row_max, row_sum = state
    # Past the end the last key is read again and its weight set to 0: no byte beyond the tile's keys is touched,
    # and no mask on the loads keeps the copies asynchronous.
    inside = tl.minimum(j, key_high - 1) if MASKED else j
    if TMA:
        k_offset = inside
        v_offset = inside
    else:
        k_offset = row_offsets(
            inside, table, k_strides[0], k_strides[1], page[0], page[1], page[2], page[3], ALIGN
        )
        v_offset = row_offsets(
            inside, table, v_strides[0], v_strides[1], page[0], page[1], page[2], page[3], ALIGN
        )
    k = load_block(K, k_desc, k_offset, first, HEAD_DIM, 0, D0, TMA)
    scores = tl.dot(queries[0], tl.trans(k), input_precision="ieee")
    if D1 > 0:
        k = load_block(K, k_desc, k_offset, first, HEAD_DIM, D0, D1, TMA)
        scores = tl.dot(queries[1], tl.trans(k), scores, input_precision="ieee")
    if SOFTCAP:
        scores = soft_cap(scores, scales[1])
    if bias is None:
        scale_log2 = scales[0]
    else:
        scores = scores * scales[0] + bias
        scale_log2 = 1.0
    weights, shrink, row_max, row_sum = softmax_step(scores, visible, row_max, row_sum, scale_log2, MASKED)
    v = load_block(V, v_desc, v_offset, first, HEAD_DIM_V, 0, DV0, TMA)
    weights = weights.to(v.dtype)
    acc0 = tl.dot(weights, v, acc0 * shrink[:, None], input_precision="ieee")
    if DV1 > 0:
        v = load_block(V, v_desc, v_offset, first, HEAD_DIM_V, DV0, DV1, TMA)
        acc1 = tl.dot(weights, v, acc1 * shrink[:, None], input_precision="ieee")
    return acc0, acc1, row_max, row_sum


@triton.jit
def attend(
    state,
    queries,
    K,
    V,
    k_desc,
    v_desc,
    table,
    first_block,
    last_block,
    key_low,
    key_high,
    row_low,
    row_high,
    row_position,
    slope,
    Mask,
    mask_rows,
    mask_stride_k,
    Tree,
    tree_rows,
    lengths,
    live,
    k_strides,
    v_strides,
    page,
    scales,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DV0: tl.constexpr,
    DV1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MASK_ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """Run blocks first_block..last_block of the keys from key_low on; returns the state after them.

    state is (output part 0, output part 1, row maximum, row sum); queries (part 0, part 1) of the tile.
    row_low, row_high (BLOCK_M,) bound the keys that each row sees; key_high the keys of the tile; row_position
    is where a row stands among the keys; lengths is (sq, sk). With MASKED False the caller promises that every
    row sees every key of these blocks. The maximum of the state is in log2 units when there is a bias.
    """
    for block in range(first_block, last_block):
        first = key_low + block * BLOCK_N
        j = first + tl.arange(0, BLOCK_N)
        visible = None
        bias = None
        if MASKED:
            visible = (j[None, :] >= row_low[:, None]) & (j[None, :] < row_high[:, None])
        if slope is not None:
            bias = linear_bias(slope, row_position, j)
        if Tree is not None:
            visible = tree_visible(visible, Tree, tree_rows, j, lengths[1] - lengths[0], lengths[0], live)
        if Mask is not None:
            visible, mask_bias = tensor_mask(
                visible, Mask, mask_rows, mask_stride_k, j, lengths[1], live, MASK_ALIGN
            )
            if slope is not None:
                bias = bias + mask_bias
            elif Mask.dtype.element_ty.is_floating():
                bias = mask_bias
        state = attend_block(
            state,
            queries,
            K,
            V,
            k_desc,
            v_desc,
            table,
            first,
            key_high,
            j,
            visible,
            bias,
            k_strides,
            v_strides,
            page,
            scales,
            HEAD_DIM,
            HEAD_DIM_V,
            D0,
            D1,
            DV0,
            DV1,
            ALIGN,
            SOFTCAP,
            MASKED,
            TMA,
        )
    return state
