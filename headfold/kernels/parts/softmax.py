"""The running softmax of a tile: row maximum, row sum, and what a finished row is."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(scores, visible, row_max, row_sum, scale_log2, MASKED: tl.constexpr):
    """Take one block of raw scores into the running softmax (Milakov and Gimelshein 2018).

    Returns the block's weights (BLOCK_M, BLOCK_N) in float32, the factor that older sums shrink by, and the new
    row maximum (of raw scores) and row sum. scale_log2 >= 0, so the largest raw score is the largest scaled one.
    """
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    if MASKED:
        # A row that has seen no key yet: -inf - -inf would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    else:
        safe_max = new_max
    weights = tl.exp2(scores * scale_log2 - (safe_max * scale_log2)[:, None])
    shrink = tl.exp2((row_max - safe_max) * scale_log2)
    if MASKED:
        # With a scale of 0 a hidden score is -inf * 0 = NaN, and so is the first shrink factor.
        weights = tl.where(visible, weights, 0.0)
        shrink = tl.where(row_max == float("-inf"), 0.0, shrink)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def softmax_step_log2(scores, row_max, row_sum):
    """`softmax_step` of scores in log2 units, -inf where a key is hidden; the maximum is in log2 units too."""
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    shrink = tl.exp2(row_max - safe_max)
    return weights, shrink, new_max, row_sum * shrink + tl.sum(weights, 1)


@triton.jit
def soft_cap(scores, scale):
    """tanh(scores * scale) from one exponential, exact at both ends."""
    return 1.0 - 2.0 / (tl.exp2(scores * (scale * 2.8853900817779268)) + 1.0)


@triton.jit
def add_sink(acc0, acc1, row_max, row_sum, sink):
    """Take a logit with no value, -inf for none, into the softmax of a state whose maximum is in log2 units.

    A row without a key ends with the sink alone.
    """
    sink = sink * 1.4426950408889634
    new_max = tl.maximum(row_max, sink)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - safe_max)
    row_sum = row_sum * shrink + tl.exp2(sink - safe_max)
    return acc0 * shrink[:, None], acc1 * shrink[:, None], new_max, row_sum


@triton.jit
def softmax_finish(row_max, row_sum, scale_log2):
    """(1 / row sum, LSE in natural log); a row that saw no key gets factor 0 and LSE -inf."""
    empty = row_sum == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, row_sum)
    lse = (row_max * scale_log2 + tl.log2(tl.where(empty, 1.0, row_sum))) * 0.6931471805599453
    return tl.where(empty, 0.0, inverse), tl.where(empty, float("-inf"), lse)
