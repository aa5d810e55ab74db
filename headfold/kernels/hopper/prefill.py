"""The kernel: buffers, barriers, and who runs what."""

import triton.language as tl

from headfold.kernels.hopper.compat import fence_async_shared, gl, gluon, mbarrier
from headfold.kernels.hopper.consumer import consume
from headfold.kernels.hopper.copies import WARPS as COPYING_WARPS
from headfold.kernels.hopper.copies import produce_rows
from headfold.kernels.hopper.layouts import GROUP_ROWS, columns_in_memory, first_part, hold, shared_layout
from headfold.kernels.hopper.masked import consume_masked
from headfold.kernels.hopper.pages import apart, fetch_values
from headfold.kernels.hopper.producer import produce
from headfold.kernels.hopper.schedule import LETTER
from headfold.kernels.hopper.short import consume_short

# Registers a thread at the start, by the number of consumers and of programs a multiprocessor, of which it has 65,536: 12
# or 16 warps hand them over to two or three consumers (240 or 160) afterwards; of the 8 of a program of one consumer, whose
# producer's warpgroup has three idle warps, the consumer has what the producer leaves of twice as many.
MAX_REGISTERS = {(2, 1): 168, (3, 1): 128, (1, 2): 128, (1, 4): 64}

INTEGERS = (
    "has_cu_q has_cu_k has_used_q has_used_k sq sk bottom_right heads group tiles section units "
    "window_left window_right chunk chunk_magic chunk_shift sinks sink_kind mask_step_b mask_step_h "
    "out_stride_b out_stride_s out_stride_h lse_stride_b lse_stride_s lse_stride_h table_stride page_size boxes "
    "k_groups v_groups k_stride_p k_stride_s k_stride_h v_stride_p v_stride_s v_stride_h"
).split()

# Read and written a number at a time: their alignment is no reason for another variant.
POINTERS = "Lse cu_seqlens_q cu_seqlens_k seqused_q seqused_k page_table tile_list counter".split()


@gluon.jit
def barriers(SLOTS: gl.constexpr, ARRIVALS: gl.constexpr):
    bars = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(bars.index(i), count=ARRIVALS)
    return bars


@gluon.jit
def buffers_of(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """COUNT buffers of boxes (1, 1, ROWS, COLUMNS): those of the first part, and those of the second where there is one.

    The second part's rows have the width of the swizzling, as products.py says.
    """
    BITS: gl.constexpr = dtype.primitive_bitwidth
    FIRST: gl.constexpr = first_part(COLUMNS)
    first = gl.allocate_shared_memory(dtype, [COUNT, 1, 1, ROWS, FIRST], shared_layout(ROWS, FIRST, BITS, 4))
    second = first  # not used without a second part
    if COLUMNS > FIRST:
        REST: gl.constexpr = columns_in_memory(COLUMNS, BITS) - FIRST
        second = gl.allocate_shared_memory(
            dtype, [COUNT, 1, 1, ROWS, REST], shared_layout(ROWS, REST, BITS, 4)
        )
    return first, second


@gluon.jit
def grouped_buffers(dtype: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """COUNT buffers for boxes of whole rows, as a tuple of one part."""
    return (
        gl.allocate_shared_memory(
            dtype,
            [COUNT, ROWS // 8, COLUMNS // 64, 8, 64],
            gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 4),
        ),
    )


@gluon.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def prefill_kernel(
    q_desc,
    k_desc,
    v_desc,
    mask_desc,
    out_desc,
    Out,
    Lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_q,
    seqused_k,
    has_cu_q: gl.int32,
    has_cu_k: gl.int32,
    has_used_q: gl.int32,
    has_used_k: gl.int32,
    sq: gl.int32,
    sk: gl.int32,
    bottom_right: gl.int32,
    heads: gl.int32,
    group: gl.int32,
    tiles: gl.int32,
    section: gl.int32,
    units: gl.int32,
    window_left: gl.int32,
    window_right: gl.int32,
    chunk: gl.int32,
    chunk_magic: gl.uint32,
    chunk_shift: gl.uint32,
    sinks: gl.int64,
    sink_kind: gl.int32,
    mask_step_b: gl.int32,
    mask_step_h: gl.int32,
    out_stride_b: gl.int64,
    out_stride_s: gl.int64,
    out_stride_h: gl.int64,
    lse_stride_b: gl.int64,
    lse_stride_s: gl.int64,
    lse_stride_h: gl.int64,
    scale_log2: gl.float32,
    cap_factor: gl.float32,
    page_table,
    table_stride: gl.int64,
    page_size: gl.int32,
    boxes: gl.int32,
    k_groups: gl.int32,
    v_groups: gl.int32,
    K,
    V,
    k_stride_p: gl.int64,
    k_stride_s: gl.int64,
    k_stride_h: gl.int64,
    v_stride_p: gl.int64,
    v_stride_s: gl.int64,
    v_stride_h: gl.int64,
    tile_list,
    counter,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    COLUMNS_K: gl.constexpr,
    COLUMNS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
    VALUES: gl.constexpr,
    MASKED: gl.constexpr,
    VARLEN: gl.constexpr,
    LEFT: gl.constexpr,
    SOFTCAP: gl.constexpr,
    PAGE_ROWS: gl.constexpr,
    FAR: gl.constexpr,
    GROUPED: gl.constexpr,
    GROUPS: gl.constexpr,
):
    """Grid: one program a multiprocessor, or with GROUPS = 1 several.

    Keys of a paged cache come in boxes of PAGE_ROWS through k_desc and v_desc, or with PAGE_ROWS = 1 row by row from K and
    V, whose strides are in units of 16 bytes; FAR where not all of such a cache can be told by 32 bits of them. GROUPED
    where boxes bring whole rows: a page of K begins k_groups groups of 8 rows behind the one before it.
    """
    dtype: gl.constexpr = q_desc.dtype
    q_buffers = buffers_of(dtype, Q_STAGES * GROUPS, GROUP_ROWS, HEAD_DIM)
    if GROUPED:
        k_buffers = grouped_buffers(dtype, STAGES, BLOCK_N, HEAD_DIM)
        v_buffers = grouped_buffers(dtype, VALUES, BLOCK_N, HEAD_DIM_V)
    else:
        k_buffers = buffers_of(dtype, STAGES, BLOCK_N, HEAD_DIM)
        v_buffers = buffers_of(dtype, VALUES, BLOCK_N, HEAD_DIM_V)
    mail = gl.allocate_shared_memory(gl.int32, [2 * LETTER, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = barriers(Q_STAGES * GROUPS, 1)
    q_free = barriers(Q_STAGES * GROUPS, 1)
    # Every lane that copies rows arrives for itself.
    ARRIVALS: gl.constexpr = 32 * COPYING_WARPS if PAGE_ROWS == 1 else 1
    k_full = barriers(STAGES, ARRIVALS)
    k_free = barriers(STAGES, GROUPS)
    v_full = barriers(VALUES, ARRIVALS)
    v_free = barriers(VALUES, GROUPS)
    posted = barriers(2, 1)
    taken = barriers(2, GROUPS + apart(BLOCK_N, PAGE_ROWS))
    turns = barriers(GROUPS, 1)
    mask_buffers = k_buffers[0]  # not used without a mask
    if MASKED:
        mask_buffers = gl.allocate_shared_memory(
            mask_desc.dtype, [STAGES * GROUPS, 1, 1, GROUP_ROWS, BLOCK_N], mask_desc.layout
        )
    # Where shared memory is short the results leave where the queries lay, and the next queries come later.
    SHORT: gl.constexpr = MASKED or (HEAD_DIM > 128 and BLOCK_N > 64)
    SHARED: gl.constexpr = SHORT and hold(HEAD_DIM, HEAD_DIM_V)
    if SHARED:
        staging = q_buffers
    else:
        staging = buffers_of(dtype, GROUPS, GROUP_ROWS, 128 if HEAD_DIM_V == 256 else HEAD_DIM_V)
    fence_async_shared()
    total = tiles * units
    if VARLEN:
        total = gl.load(tile_list + units // heads) * heads
    pointers = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    lengths = (sq, sk, pointers, (has_cu_q, has_cu_k, has_used_q, has_used_k))
    shape = (heads, tiles, section, units)
    window = (window_left, window_right, chunk, (chunk_magic, chunk_shift))
    letters = (mail, posted, taken)
    results = (Out, (out_stride_b, out_stride_s, out_stride_h))
    lses = (Lse, (lse_stride_b, lse_stride_s, lse_stride_h))
    flow = (q_full, q_free, k_full, k_free, v_full, v_free, turns)
    reads = (q_buffers, k_buffers, v_buffers, staging)
    fetch = (
        (q_desc, k_desc, v_desc, mask_desc), (q_buffers, k_buffers, v_buffers, mask_buffers), flow, letters, counter,
        lengths, bottom_right, shape, window, (mask_step_b, mask_step_h), total, group,
        (page_table, table_stride, page_size, boxes), tile_list,
    )  # fmt: skip
    common = (
        reads, flow, letters, out_desc, results, lses, lengths, bottom_right, window, (scale_log2, cap_factor),
        (sinks, sink_kind),
    )  # fmt: skip
    if MASKED:
        gl.warp_specialize(
            [
                (consume_masked, (
                    0, common, mask_buffers, HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, STAGES, COLUMNS, SHARED, VARLEN,
                )),
                (consume_masked, (
                    1, common, mask_buffers, HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, STAGES, COLUMNS, SHARED, VARLEN,
                )),
                (produce, (fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, GROUPS, STAGES, True, VARLEN, False, 0)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    elif PAGE_ROWS == 1:
        # Where rows of K and of V begin, in units of 16 bytes.
        PLACE: gl.constexpr = gl.int64 if FAR else gl.int32
        k_places = gl.allocate_shared_memory(PLACE, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        v_places = gl.allocate_shared_memory(PLACE, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        sources = (
            K, (k_stride_p, k_stride_s, k_stride_h), V, (v_stride_p, v_stride_s, v_stride_h), k_places, v_places
        )  # fmt: skip
        gl.warp_specialize(
            [
                (consume, (
                    0, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP, True,
                )),
                (consume, (
                    1, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP, True,
                )),
                (produce_rows, (fetch, sources, 2, STAGES, VARLEN, LEFT, COLUMNS_K, COLUMNS)),
            ],
            [4, 4],
            [232, 40],
        )  # fmt: skip
    elif apart(BLOCK_N, PAGE_ROWS):
        v_source = (v_desc, v_buffers, v_full, v_free, v_groups)
        if GROUPS == 2:
            gl.warp_specialize(
                [
                    (consume, (
                        0, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                    )),
                    (consume, (
                        1, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                    )),
                    (produce, (
                        fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, False, VARLEN, LEFT, PAGE_ROWS, k_groups,
                    )),
                    (fetch_values, (fetch, v_source, HEAD_DIM_V, 2, VARLEN, LEFT, PAGE_ROWS)),
                ],
                [4, 1, 1],
                [240, 32, 32],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (consume, (
                        0, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                    )),
                    (consume, (
                        1, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                    )),
                    (consume, (
                        2, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                    )),
                    (produce, (
                        fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, False, VARLEN, LEFT, PAGE_ROWS, k_groups,
                    )),
                    (fetch_values, (fetch, v_source, HEAD_DIM_V, 3, VARLEN, LEFT, PAGE_ROWS)),
                ],
                [4, 4, 1, 1],
                [160, 160, 32, 32],
            )  # fmt: skip
    elif GROUPS == 1:
        gl.warp_specialize(
            [
                (consume_short, (common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, STAGES, COLUMNS, VARLEN)),
                (produce, (
                    fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 1, STAGES, False, VARLEN, LEFT, PAGE_ROWS, k_groups, v_groups,
                )),
            ],
            [1],
            [24],
        )  # fmt: skip
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (
                    0, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                )),
                (consume, (
                    1, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                )),
                (produce, (
                    fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 2, STAGES, False, VARLEN, LEFT, PAGE_ROWS, k_groups, v_groups,
                )),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    0, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                )),
                (consume, (
                    1, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                )),
                (consume, (
                    2, common, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, COLUMNS, SHARED, VARLEN, LEFT, SOFTCAP,
                )),
                (produce, (
                    fetch, HEAD_DIM, HEAD_DIM_V, BLOCK_N, 3, STAGES, False, VARLEN, LEFT, PAGE_ROWS, k_groups, v_groups,
                )),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )  # fmt: skip
    # A launch beside the kernel before it must not end before that one; any other does not wait here.
    tl.extra.cuda.gdc_wait()
