"""The running softmax of a consumer's 64 rows."""

from headfold.kernels.hopper.compat import gl, gluon


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
    return weights, shrink, new_max, row_sum * shrink + gl.sum(weights, 1)


@gluon.jit
def halved(scores):
    low, high = gl.split(scores.reshape([scores.shape[0], 2, scores.shape[1] // 2]).permute([0, 2, 1]))
    return gl.maximum(low, high)


@gluon.jit
def row_maximum(scores, TREE: gl.constexpr):
    if TREE == 0:
        return gl.max(scores, 1)
    else:
        parts = halved(scores)
        if TREE > 1:
            parts = halved(parts)
        if TREE > 2:
            parts = halved(parts)
        return gl.convert_layout(gl.max(parts, 1), gl.SliceLayout(1, scores.type.layout), assert_trivial=True)


@gluon.jit
def step_deferred(scores, row_max, row_sum, scale_log2, MASKED: gl.constexpr, TREE: gl.constexpr):
    """The same with the row sums in parts, one a thread of a row."""
    new_max = gl.maximum(row_max, row_maximum(scores, TREE))
    safe = new_max
    if MASKED:
        safe = gl.where(new_max == float("-inf"), 0.0, new_max)  # no key yet: -inf - -inf would be NaN
    top = safe * scale_log2
    weights = gl.exp2(scores * scale_log2 - top[:, None])
    shrink = gl.exp2(row_max * scale_log2 - top)
    factor = gl.convert_layout(shrink, gl.SliceLayout(1, row_sum.type.layout), assert_trivial=True)
    return weights, shrink, new_max, row_sum * factor[:, None] + parts(weights)


@gluon.jit
def parts(weights):
    """Sums (rows, 4) of the weights that one thread holds of a row."""
    ROWS: gl.constexpr = weights.shape[0]
    COLUMNS: gl.constexpr = weights.shape[1]
    owned = weights.reshape([ROWS, COLUMNS // 8, 4, 2]).permute([0, 2, 1, 3]).reshape([ROWS, 4, COLUMNS // 4])
    return gl.sum(owned, 2)


@gluon.jit
def round_weights(p, dtype: gl.constexpr, PACKED: gl.constexpr):
    if PACKED == 1:
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [p], dtype=gl.bfloat16, is_pure=True, pack=2
            )
        else:
            return gl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [p], dtype=gl.float16, is_pure=True, pack=2
            )
    elif PACKED == 2:
        low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
        if dtype == gl.bfloat16:
            return gl.inline_asm_elementwise(
                "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
            )
        else:
            return gl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
            )
    else:
        return p.to(dtype)


@gluon.jit
def unpack(words, dtype: gl.constexpr, layout: gl.constexpr, PACKED: gl.constexpr):
    if PACKED == 2:
        if dtype == gl.bfloat16:
            low, high = gl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1
            )
        else:
            low, high = gl.inline_asm_elementwise(
                "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
            )
        return gl.convert_layout(
            gl.join(low, high).reshape([low.shape[0], low.shape[1] * 2]), layout, assert_trivial=True
        )
    else:
        return gl.convert_layout(words, layout)


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
    return weights, shrink, new_max, row_sum * shrink + gl.sum(weights, 1)


@gluon.jit
def finish(row_max, row_sum, scale):
    """(1 / row sum, LSE in natural log) for a maximum in units of 1 / scale; a row without a key: factor 0, LSE -inf."""
    empty = row_sum == 0.0
    total = gl.where(empty, 1.0, row_sum)
    lse = row_max * scale + gl.log2(total) * 0.6931471805599453
    return gl.where(empty, 0.0, 1.0 / total), gl.where(empty, float("-inf"), lse)
