"""A consumer of calls with a mask given as a tensor: 64 rows of a tile, block by block, dead blocks left out."""

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import (
    gl,
    gluon,
    mbarrier,
    view_as,
    warpgroup_mma,
)
from headfold.kernels.hopper.consumer import release
from headfold.kernels.hopper.layouts import (
    GROUP_ROWS,
    accumulator,
    shared_layout,
    staged_columns,
    weights_layout,
)
from headfold.kernels.hopper.products import matrix, operands
from headfold.kernels.hopper.results import finished, offset, store
from headfold.kernels.hopper.schedule import receive
from headfold.kernels.hopper.spans import full_blocks, hide, row_bounds, seen_end, tile_blocks
from headfold.kernels.hopper.unseen import zero_unseen

# Rows of a mask block that are looked at first. Where the diagonal of a causal mask cuts a block, its last rows live.
SAMPLE = gl.constexpr(16)


@gluon.constexpr_function
def _dead_word(dtype):
    """32 bits of a mask that hides all its keys."""
    return {"bf16": -0x7F0080, "fp16": -0x3FF0400}.get(dtype.name, 0)


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def is_alive(buffer, BLOCK_N: gl.constexpr):
    """Whether a mask block (1, 1, 64, BLOCK_N) in shared memory leaves any key to any row; read as 32-bit words."""
    WORDS: gl.constexpr = BLOCK_N * buffer.dtype.primitive_bitwidth // 32
    ACROSS: gl.constexpr = WORDS // 4
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [32 // ACROSS, ACROSS], [4, 1], [1, 0])
    words = view_as(buffer, gl.int32, [GROUP_ROWS, WORDS], shared_layout(GROUP_ROWS, WORDS, 32, 2))
    sample = words.slice(GROUP_ROWS - SAMPLE, SAMPLE).load(layout)
    found = gl.reduce(sample ^ _dead_word(buffer.dtype), None, _either)
    if found == 0:
        found = gl.reduce(words.load(layout) ^ _dead_word(buffer.dtype), None, _either)
    return found != 0


@gluon.jit
def to_float(bias):
    """A mask block in float32. Triton takes three instructions for two bfloat16 elements, which two can do."""
    if bias.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [bias],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return bias.to(gl.float32)


@gluon.jit
def consume_masked(
    GROUP: gl.constexpr,
    common,
    mask_buffers,
    HEAD_DIM: gl.constexpr,
    HEAD_DIM_V: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    STAGES: gl.constexpr,
    COLUMNS: gl.constexpr,
    SHARED: gl.constexpr,
    VARLEN: gl.constexpr,
):
    """Rows GROUP * 64 to GROUP * 64 + 63 of every tile that the producer announces."""
    reads, flow, letters, out_desc, Out, Lse, lengths, bottom_right, window, scales, sinks = common
    q_buffers, k_buffers, v_buffers, staging = reads
    q_full, q_free, k_full, k_free, v_full, v_free, turns = flow
    mail, posted, taken = letters
    out_base, out_strides = Out
    lse_base, lse_strides = Lse
    layout: gl.constexpr = accumulator(BLOCK_N)
    ADDED: gl.constexpr = mask_buffers.dtype.is_floating()
    query = matrix(q_buffers[0].index(GROUP), GROUP_ROWS, HEAD_DIM)
    scale_log2 = scales[0]
    scale = scale_log2 * 0.6931471805599453
    turn = 0
    count = 0
    number, head, tile, q_batch, q_first, sq, sk, _ = receive(turn, lengths, mail, posted, taken, VARLEN)
    while number >= 0:
        first = tile * (GROUP_ROWS * GROUPS)
        shift = (sk - sq) * bottom_right
        _, low, blocks = tile_blocks(first, GROUP_ROWS * GROUPS, sq, sk, shift, window, BLOCK_N, False)
        own = first + GROUP * GROUP_ROWS
        left, right = full_blocks(own, GROUP_ROWS, sq, sk, shift, window, low, blocks, BLOCK_N, False)
        bounds = row_bounds(own, shift, window, sk, BLOCK_N, False)
        row_max, row_sum = softmax.begin(BLOCK_N)
        acc = gl.zeros([GROUP_ROWS, HEAD_DIM_V], gl.float32, accumulator(HEAD_DIM_V))
        mbarrier.wait(q_full.index(GROUP), turn & 1)
        zero_unseen(
            v_buffers, v_full, count, low + (blocks - 1) * BLOCK_N, low, seen_end(sq, sk, shift, window, False), sk,
            BLOCK_N, HEAD_DIM_V, STAGES, VARLEN, False,
        )  # fmt: skip
        for i in range(blocks):
            block = blocks - 1 - i
            stage = count % STAGES
            phase = (count // STAGES) & 1
            mask = mask_buffers.index(stage * GROUPS + GROUP)
            mbarrier.wait(k_full.index(stage), phase)
            if is_alive(mask, BLOCK_N) & (own < sq):
                keys = matrix(k_buffers[0].index(stage), BLOCK_N, HEAD_DIM)
                zeros = gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, layout)
                scores = warpgroup_mma(query, keys.permute([1, 0]), zeros, use_acc=False)
                bias = matrix(mask, GROUP_ROWS, BLOCK_N).load(layout)
                if ADDED:
                    scores = scores * scale + to_float(bias)
                else:
                    scores = gl.where(bias != 0, scores, float("-inf"))
                release(k_free.index(stage))
                if (block < left) | (block >= right):
                    scores = hide(scores, bounds, low + block * BLOCK_N, False)
                if ADDED:
                    weights, shrink, row_max, row_sum = softmax.step_biased(scores, row_max, row_sum)
                else:
                    weights, shrink, row_max, row_sum = softmax.step(
                        scores, row_max, row_sum, scale_log2, True
                    )
                acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
                operand = gl.convert_layout(weights.to(query.dtype), weights_layout(BLOCK_N))
                mbarrier.wait(v_full.index(stage), phase)
                acc = warpgroup_mma(operand, matrix(v_buffers[0].index(stage), BLOCK_N, HEAD_DIM_V), acc)
            else:
                release(k_free.index(stage))
                mbarrier.wait(v_full.index(stage), phase)
            mbarrier.arrive(v_free.index(stage), count=1)
            count += 1
        staged = operands(staging, GROUP, GROUP_ROWS, staged_columns(staging[0].type.shape[4], HEAD_DIM_V))
        out = (offset(out_base, out_strides, q_batch, q_first, head, 8), out_strides[1])
        lse_out = (offset(lse_base, lse_strides, q_batch, q_first, head, 1), lse_strides[1])
        results, lse = finished((acc,), row_max, row_sum, 1.0 if ADDED else scale, sinks, head)
        store(results, lse, staged, out, lse_out, own, sq, COLUMNS)
        if SHARED:
            release(q_free.index(GROUP))
        else:
            mbarrier.arrive(q_free.index(GROUP), count=1)
        turn += 1
        number, head, tile, q_batch, q_first, sq, sk, _ = receive(turn, lengths, mail, posted, taken, VARLEN)
