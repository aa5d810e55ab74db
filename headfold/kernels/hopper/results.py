"""How a consumer's 64 rows leave: by the copy engine, or in pieces of 16 bytes where only some of them may be written."""

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import (
    barrier,
    fence_async_shared,
    gl,
    gluon,
    tma_store,
    tma_store_wait,
)
from headfold.kernels.hopper.layouts import GROUP_ROWS, accumulator, first_part, staged_columns, store_layout
from headfold.kernels.hopper.products import boxes_of, operands, scaled
from headfold.kernels.parts.address import load_float


@gluon.jit
def load_sink(sinks, head):
    """The sink of a query head, -inf where there are none. `sinks` are (address or 0, kind of the elements)."""
    address, kind = sinks
    given = address != 0
    return gl.where(given, load_float(address, kind, head, given), float("-inf"))


@gluon.jit
def offset(base, strides, batch, row, head, UNIT: gl.constexpr):
    """Where the rows of a sequence's head begin; strides are (batch, row, head) in units of UNIT elements."""
    return base + (batch * strides[0] + row * strides[1] + head * strides[2]) * UNIT


@gluon.jit
def write(staged, base, stride, first, sq, COLUMNS: gl.constexpr):
    """Write 64 rows of shared memory, as far as there are rows and COLUMNS."""
    WIDTH: gl.constexpr = staged.shape[1]
    layout: gl.constexpr = store_layout(WIDTH)
    row = first + gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    live = (row < sq)[:, None]
    if COLUMNS < WIDTH:
        live = live & (column < COLUMNS)[None, :]
    offsets = row.to(gl.int64)[:, None] * (stride * 8) + column[None, :]
    gl.store(base + offsets, staged.load(layout), mask=live)


@gluon.jit
def write_lse(lse, Lse, first, sq):
    """Write the LSE of 64 rows, as far as there are rows."""
    base, stride = Lse
    position = first + gl.arange(0, GROUP_ROWS, lse.type.layout)
    gl.store(base + position.to(gl.int64) * stride, lse, mask=position < sq)


@gluon.jit
def halves(acc, WIDTH: gl.constexpr):
    """The left and the right WIDTH columns of an accumulator of twice as many."""
    left, right = acc.reshape([GROUP_ROWS, 2, WIDTH]).permute([0, 2, 1]).split()
    left = gl.convert_layout(left, accumulator(WIDTH), assert_trivial=True)
    return left, gl.convert_layout(right, accumulator(WIDTH), assert_trivial=True)


@gluon.jit
def finished(acc, row_max, row_sum, scale, sinks, head):
    """(parts of the output, LSE) of 64 rows whose blocks are done; row_max is in units of 1 / scale."""
    inverse, lse = softmax.finish(row_max, row_sum, scale)
    if sinks[0] != 0:
        inverse, lse = softmax.with_sink(inverse, lse, load_sink(sinks, head))
    return scaled(acc, inverse), lse


@gluon.jit
def store(acc, lse, staging, Out, Lse, first, sq, COLUMNS: gl.constexpr):
    """Write those of 64 finished rows that exist; COLUMNS of the accumulator's are the head dimension, the rest is padding.

    `acc` are parts, and `staging` too. Wider rows than it has leave in two halves.
    """
    out_base, out_stride = Out
    write_lse(lse, Lse, first, sq)
    FIRST: gl.constexpr = acc[0].shape[1]
    WIDTH: gl.constexpr = staging[0].shape[1]
    if len(acc) > 1:
        staging[0].store(acc[0].to(staging[0].dtype))
        staging[1].store(acc[1].to(staging[1].dtype))
        write(staging[0], out_base, out_stride, first, sq, COLUMNS)
        write(staging[1], out_base + FIRST, out_stride, first, sq, COLUMNS - FIRST)
    elif WIDTH == FIRST:
        staging[0].store(acc[0].to(staging[0].dtype))
        write(staging[0], out_base, out_stride, first, sq, COLUMNS)
    else:
        left, right = halves(acc[0], WIDTH)
        staging[0].store(left.to(staging[0].dtype))
        write(staging[0], out_base, out_stride, first, sq, COLUMNS)
        staging[0].store(right.to(staging[0].dtype))
        write(staging[0], out_base + WIDTH, out_stride, first, sq, COLUMNS - WIDTH)


@gluon.jit
def send(acc, buffers, index, desc, batch, head, row, column, COLUMNS: gl.constexpr):
    """Have the copy engine store COLUMNS columns of 64 finished rows, once it has read what buffer `index` held before.

    It leaves out rows and columns that the tensor does not have. The consumer goes on while it reads.
    """
    FIRST: gl.constexpr = buffers[0].type.shape[4]
    WIDTH: gl.constexpr = desc.block_type.shape[3]
    PARTS: gl.constexpr = FIRST // WIDTH
    views = operands(buffers, index, GROUP_ROWS, COLUMNS)
    tma_store_wait(0)
    for i in gl.static_range(len(acc)):
        views[i].store(acc[i].to(desc.dtype))
    fence_async_shared()
    barrier()
    slots = boxes_of(buffers[0], GROUP_ROWS, WIDTH)
    for c in gl.static_range(PARTS):
        tma_store(desc, [batch, head, row, column + c * WIDTH], slots.index(index * PARTS + c))
    if len(acc) > 1:
        tma_store(desc, [batch, head, row, column + FIRST], buffers[1].index(index))


@gluon.jit
def send_all(acc, buffers, index, desc, batch, head, row, COLUMNS: gl.constexpr):
    """`send` all COLUMNS of 64 finished rows, in two halves where the buffers hold one."""
    WIDTH: gl.constexpr = buffers[0].type.shape[4]
    if WIDTH < first_part(COLUMNS):
        first_half, second_half = halves(acc[0], WIDTH)
        send((first_half,), buffers, index, desc, batch, head, row, 0, WIDTH)
        send((second_half,), buffers, index, desc, batch, head, row, WIDTH, WIDTH)
    else:
        send(acc, buffers, index, desc, batch, head, row, 0, COLUMNS)


@gluon.jit
def leave_ragged(
    acc,
    lse,
    staging,
    index,
    desc,
    Out,
    Lse,
    q_given,
    places,
    first,
    sq,
    HEAD_DIM_V: gl.constexpr,
    COLUMNS: gl.constexpr,
):
    """64 finished rows of a sequence, from its row `first` on: by the copy engine where all of them may be written.

    Behind the last row of a sequence comes another one, or what is not to be written; or nothing, where neither offsets nor
    lengths of queries are `q_given`. `places` are (batch index, the sequence's first row, head).
    """
    batch, q_first, head = places
    if (first + GROUP_ROWS <= sq) | (q_given == 0):
        send_all(acc, staging, index, desc, batch, head, q_first + first, HEAD_DIM_V)
        write_lse(lse, Lse, first, sq)
    else:
        tma_store_wait(0)
        staged = operands(staging, index, GROUP_ROWS, staged_columns(staging[0].type.shape[4], HEAD_DIM_V))
        store(acc, lse, staged, Out, Lse, first, sq, COLUMNS)
