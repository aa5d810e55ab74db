"""The products of a block over the columns that a head dimension has.

Tensors have powers of two, head dimensions need not: 96 columns are a part of 64 and one of 32, 192 are 128 and 64. A
product over keys adds both parts up in the same scores; one over values has an accumulator a part. In shared memory the
second part lies in rows of 128 bytes, the width of the swizzling, of which it may fill less: the copy engine writes
zeros past the tensor's columns, and the products leave them alone.
"""

from headfold.kernels.hopper.compat import gl, gluon, view_as, warpgroup_mma, warpgroup_mma_wait
from headfold.kernels.hopper.layouts import (
    GROUP_ROWS,
    accumulator,
    first_part,
    grouped_layout,
    is_grouped,
    shared_layout,
)


@gluon.jit
def matrix(buffer, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A box (1, 1, ROWS, COLUMNS) of shared memory as a matrix."""
    layout: gl.constexpr = shared_layout(ROWS, COLUMNS, buffer.dtype.primitive_bitwidth, 2)
    return view_as(buffer, buffer.dtype, [ROWS, COLUMNS], layout)


@gluon.jit
def boxes_of(buffers, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Buffers (stages, 1, 1, rows, columns) as boxes (1, 1, ROWS, COLUMNS), COLUMNS being those of a swizzled row.

    Wider rows lie in shared memory as one such matrix after the other.
    """
    COUNT: gl.constexpr = (
        buffers.type.shape[0] * (buffers.type.shape[3] // ROWS) * (buffers.type.shape[4] // COLUMNS)
    )
    layout: gl.constexpr = shared_layout(ROWS, COLUMNS, buffers.dtype.primitive_bitwidth, 4)
    return view_as(buffers, buffers.dtype, [COUNT, 1, 1, ROWS, COLUMNS], layout)


@gluon.jit
def operands(buffers, index, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Buffer `index` as matrices of the columns that products are over, one a part."""
    FIRST: gl.constexpr = first_part(COLUMNS)
    if is_grouped(buffers[0].type.shape):
        one = buffers[0].index(index)
        return (view_as(one, one.dtype, [ROWS, COLUMNS], grouped_layout(ROWS, COLUMNS)),)
    elif COLUMNS == FIRST:
        return (matrix(buffers[0].index(index), ROWS, FIRST),)
    else:
        first = matrix(buffers[0].index(index), ROWS, FIRST)
        WIDTH: gl.constexpr = buffers[1].type.shape[4]
        return first, matrix(buffers[1].index(index), ROWS, WIDTH).slice(0, COLUMNS - FIRST, dim=1)


@gluon.jit
def issue_scores(query, keys, BLOCK_N: gl.constexpr):
    """Q Kᵀ of a block, in flight."""
    scores = warpgroup_mma(
        query[0],
        keys[0].permute([1, 0]),
        gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, accumulator(BLOCK_N)),
        use_acc=False,
        is_async=True,
    )
    for i in gl.static_range(1, len(query)):
        scores = warpgroup_mma(query[i], keys[i].permute([1, 0]), scores, is_async=True)
    return scores


@gluon.jit
def no_values(COLUMNS: gl.constexpr):
    """Accumulators of nothing, one a part."""
    FIRST: gl.constexpr = first_part(COLUMNS)
    acc = gl.zeros([GROUP_ROWS, FIRST], gl.float32, accumulator(FIRST))
    if FIRST == COLUMNS:
        return (acc,)
    else:
        REST: gl.constexpr = COLUMNS - FIRST
        return acc, gl.zeros([GROUP_ROWS, REST], gl.float32, accumulator(REST))


@gluon.jit
def issue_values(weights, values, acc):
    """A block's values, weighed, on top of the accumulators; in flight."""
    first = warpgroup_mma(weights, values[0], acc[0], is_async=True)
    if len(acc) == 1:
        return (first,)
    else:
        return first, warpgroup_mma(weights, values[1], acc[1], is_async=True)


@gluon.jit
def wait_values(acc):
    """The accumulators, when no product is in flight any more."""
    if len(acc) == 1:
        return (warpgroup_mma_wait(0, deps=[acc[0]]),)
    else:
        return warpgroup_mma_wait(0, deps=[acc[0], acc[1]])


@gluon.jit
def scaled(acc, factor):
    """The accumulators times a factor a row."""
    first = acc[0] * gl.convert_layout(factor, gl.SliceLayout(1, acc[0].type.layout))[:, None]
    if len(acc) == 1:
        return (first,)
    else:
        return first, acc[1] * gl.convert_layout(factor, gl.SliceLayout(1, acc[1].type.layout))[:, None]
