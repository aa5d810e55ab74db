"""Values that no row of a tile sees: they are zeroed in shared memory, for they may hold NaN, and 0 · NaN is NaN."""

from headfold.kernels.hopper.compat import barrier, fence_async_shared, gl, gluon, mbarrier
from headfold.kernels.hopper.layouts import store_layout
from headfold.kernels.hopper.products import operands
from headfold.kernels.hopper.spans import EDGE


@gluon.jit
def zero_part(values, key, start, end, LEFT: gl.constexpr):
    """Zero rows of shared memory from key `end` on, and with LEFT those before key `start`, the first row being key `key`."""
    layout: gl.constexpr = store_layout(values.shape[1])
    index = key + gl.arange(0, values.shape[0], gl.SliceLayout(1, layout))
    loaded = values.load(layout)
    seen = index < end
    if LEFT:
        seen = seen & (index >= start)
    values.store(gl.where(seen[:, None], loaded, gl.zeros_like(loaded)))


@gluon.jit
def zero_before(values, rows):
    """Zero the first `rows` rows of shared memory."""
    layout: gl.constexpr = store_layout(values.shape[1])
    index = gl.arange(0, values.shape[0], gl.SliceLayout(1, layout))
    loaded = values.load(layout)
    values.store(gl.where((index >= rows)[:, None], loaded, gl.zeros_like(loaded)))


@gluon.jit
def zero_unseen(
    v_buffers,
    v_full,
    count,
    key,
    start,
    end,
    sk,
    BLOCK_N: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    VALUES: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
):
    """Zero the values from key `end` on in a tile's last block, number `count`, whose first key is `key`.

    `end` is `seen_end`. What lies between it and sk may hold NaN, and a weight of 0 does not help against that; beyond sk
    the copy engine fills in zeros. Each consumer writes for itself: the other reads the same bytes or these zeros. Values
    before the tile's first key `start` are zeroed too where they lie in this block: written back as they were, they would
    undo the other's `zero_front` under its product.
    """
    outside = end < sk
    if VARLEN:  # beyond sk comes another sequence, or what an earlier one left
        outside = True
        end = gl.minimum(end, sk)
    if (end < key + BLOCK_N) & outside:
        PART: gl.constexpr = 32
        stage = count % VALUES
        mbarrier.wait(v_full.index(stage), (count // VALUES) & 1)
        values = operands(v_buffers, stage, BLOCK_N, HEAD_DIM_V)
        for i in gl.static_range(BLOCK_N // PART):
            if end < key + (i + 1) * PART:
                for j in gl.static_range(len(values)):
                    zero_part(values[j].slice(i * PART, PART), key + i * PART, start, end, LEFT)
        fence_async_shared()
        barrier()


@gluon.jit
def zero_front(values, rows):
    """Zero the first `rows` values of a tile's first block, fewer than EDGE, which lie before the first key it sees."""
    for i in gl.static_range(len(values)):
        zero_before(values[i].slice(0, EDGE), rows)
    fence_async_shared()
    barrier()


@gluon.jit
def zero_outside(values, key, low, high, HEAD_DIM_V: gl.constexpr):
    """Zero the values of a block from `key` on that lie outside keys low..high, which no row of the tile sees.

    They may hold NaN, and a weight of 0 does not help against that. Every consumer writes for itself: the others read
    the same bytes or these zeros.
    """
    PART: gl.constexpr = 32
    ROWS: gl.constexpr = values.type.shape[0]
    layout: gl.constexpr = store_layout(HEAD_DIM_V)
    if (key < low) | (key + ROWS > high):
        for i in gl.static_range(ROWS // PART):
            first = key + i * PART
            if (first < low) | (first + PART > high):
                part = values.slice(i * PART, PART)
                index = first + gl.arange(0, PART, gl.SliceLayout(1, layout))
                loaded = part.load(layout)
                seen = (index >= low) & (index < high)
                part.store(gl.where(seen[:, None], loaded, gl.zeros_like(loaded)))
        fence_async_shared()
        barrier()
