"""The running softmax of a consumer's 64 rows."""

from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.layouts import GROUP_ROWS, accumulator, weights_layout

# Row maxima rise when weights would exceed 2 to this power, which 16-bit weights hold as precisely as those up to 1.
LAZY = gl.constexpr(8.0)


@gluon.jit
def begin(BLOCK_N: gl.constexpr):
    """(row maximum, row sum) before the first key."""
    layout: gl.constexpr = accumulator(BLOCK_N)
    row_max = gl.full([GROUP_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, layout))
    return row_max, row_parts(gl.zeros([GROUP_ROWS, BLOCK_N], gl.float32, layout))


@gluon.jit
def row_parts(weights):
    """The sum of each row in 4 parts, one for each thread that holds some of it.

    The threads add them up once a tile, in `finish`: every block would exchange them twice.
    """
    ROWS: gl.constexpr = weights.shape[0]
    COLUMNS: gl.constexpr = weights.shape[1]
    owned = weights.reshape([ROWS, COLUMNS // 8, 4, 2]).permute([0, 2, 1, 3])
    return gl.sum(owned.reshape([ROWS, 4, COLUMNS // 4]), 2)


@gluon.jit
def add(row_sum, shrink, weights):
    """The row sum in parts, with the weights of another block."""
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, row_sum.type.layout))
    return row_sum * factor[:, None] + row_parts(weights)


@gluon.jit
def step(scores, row_max, row_sum, scale_log2, MASKED: gl.constexpr):
    """Take one block of raw scores into the running softmax (Milakov and Gimelshein 2018).

    Hidden scores are -inf; scale_log2 > 0. Returns the weights, the factor that older sums shrink by, and the new row
    maximum (of raw scores) and row sum.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    safe = new_max
    if MASKED:
        safe = gl.where(new_max == float("-inf"), 0.0, new_max)  # no key yet: -inf - -inf would be NaN
    top = safe * scale_log2
    weights = gl.exp2(scores * scale_log2 - top[:, None])
    shrink = gl.exp2(row_max * scale_log2 - top)
    return weights, shrink, new_max, add(row_sum, shrink, weights)


@gluon.jit
def step_lazily(scores, row_max, row_sum, scale_log2, MASKED: gl.constexpr):
    """`step`, but the row maximum stays what it was unless weights would exceed 2**LAZY: most factors are 1.

    As in FlashAttention-4: what a row is subtracted does not matter, as long as it is near its maximum.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    new_max = gl.where((new_max - row_max) * scale_log2 > LAZY, new_max, row_max)
    safe = new_max
    if MASKED:
        safe = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores * scale_log2 - (safe * scale_log2)[:, None])
    # From the difference: row_max * scale_log2 - top is not 0 for a maximum that stays, but what rounding took from top.
    shrink = gl.exp2((row_max - safe) * scale_log2)
    return weights, shrink, new_max, add(row_sum, shrink, weights)


@gluon.constexpr_function
def _product_unless_ones(count):
    """PTX for `count` numbers of a thread times their factors, and its constraints.

    The numbers are of two rows, the first two of one and the next two of the other. A warp whose factors are all 1
    leaves out the products.
    """
    factors = [f"${2 * count + i}" for i in range(count)]
    lines = [
        ".reg .pred p, q;",
        f"setp.neu.f32 p, {factors[0]}, 0f3F800000;",
        f"setp.neu.f32 q, {factors[2]}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra.uni done;",
        *(f"mul.f32 ${i}, ${i}, {factors[i]};" for i in range(count)),
        "done:",
    ]
    constraints = ["=f"] * count + [str(i) for i in range(count)] + ["f"] * count
    return "{ " + " ".join(lines) + " }", ",".join(constraints)


@gluon.jit
def shrunk(acc, shrink):
    """Accumulators, a part or two, times the factors of their rows, most of which `step_lazily` leaves at 1."""
    first = shrunk_part(acc[0], shrink)
    if len(acc) == 1:
        return (first,)
    else:
        return first, shrunk_part(acc[1], shrink)


@gluon.jit
def shrunk_part(acc, shrink):
    COUNT: gl.constexpr = acc.shape[1] // 2  # numbers of a thread: 64 rows over 128 threads
    code: gl.constexpr = _product_unless_ones(COUNT)
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(
        code[0], code[1], [acc, factor], dtype=gl.float32, is_pure=True, pack=COUNT
    )


@gluon.jit
def step_biased(scores, row_max, row_sum):
    """The same for scores that are scaled and biased already; the row maximum is one of those.

    A row whose biases are all the lowest float is a softmax of its own, though that float times log2(e) is -inf: scores
    that large are equal or worlds apart, so that without the factor the weights are the same 1 and 0.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    safe = gl.where(new_max == float("-inf"), 0.0, new_max)
    factor = gl.where(safe < -1e38, 1.0, 1.4426950408889634)
    top = safe * factor
    weights = gl.exp2(scores * factor[:, None] - top[:, None])
    shrink = gl.exp2(row_max * factor - top)
    return weights, shrink, new_max, add(row_sum, shrink, weights)


@gluon.jit
def capped(scores, factor):
    """tanh(y) / 2 - 1 / 2 for y = scores * factor / (2 log2 e), as -1 / (e^2y + 1).

    A number less to add to each than tanh(y), and a softmax does not see it; `uncapped` gives it back to the maximum. As
    precise as float32: tanh.approx is off by 2**-11, a score of 30 then by more than bfloat16 weights are.
    """
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [-1.0 - gl.exp2(scores * factor)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def uncapped(row_max):
    """The maximum of `capped` scores as that of tanh(y) / 2."""
    return row_max + 0.5


@gluon.jit
def finish(row_max, row_sum, scale):
    """(1 / row sum, LSE in natural log) for a maximum in units of 1 / scale; a row without a key: factor 0, LSE -inf."""
    return finish_total(row_max, gl.convert_layout(gl.sum(row_sum, 1), row_max.type.layout), scale)


@gluon.jit
def finish_total(row_max, total, scale):
    """`finish` of a row sum that is not in parts."""
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    lse = row_max * scale + gl.log2(total) * 0.6931471805599453
    return gl.where(empty, 0.0, 1.0 / total), gl.where(empty, float("-inf"), lse)


@gluon.jit
def with_sink(inverse, lse, sink):
    """What `finish` gives, with one more logit that has no value; a row without a key then has the sink alone. -inf: none."""
    LOG2_E: gl.constexpr = 1.4426950408889634
    top = gl.maximum(lse, sink)
    keys = gl.exp2((lse - top) * LOG2_E)
    total = keys + gl.exp2((sink - top) * LOG2_E)
    none = sink == float("-inf")
    return (
        gl.where(none, inverse, inverse * (keys / total)),
        gl.where(none, lse, top + gl.log2(total) * 0.6931471805599453),
    )


@gluon.jit
def pack(weights, dtype: gl.constexpr):
    """The weights rounded to `dtype`, two neighbours in 32 bits.

    Carried from block to block as 16-bit numbers they cost two more instructions a word, which swap its halves.
    """
    low, high = weights.reshape([weights.shape[0], weights.shape[1] // 2, 2]).split()
    if dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )


@gluon.jit
def unpack(words, dtype: gl.constexpr):
    """Packed weights as the left operand of a product, which lies in registers just so: no instruction at all."""
    COLUMNS: gl.constexpr = words.shape[1] * 2
    if dtype == gl.bfloat16:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;",
            "=h,=h,r",
            [words],
            dtype=(gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
        )
    weights = gl.join(low, high).reshape([words.shape[0], COLUMNS])
    return gl.convert_layout(weights, weights_layout(COLUMNS), assert_trivial=True)
