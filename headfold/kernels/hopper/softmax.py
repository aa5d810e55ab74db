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
