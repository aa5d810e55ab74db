"""A kernel that takes one block of scores through `softmax.step_lazily` and gives away the factors of older sums."""

from __future__ import annotations

import torch

from headfold.kernels.hopper import softmax
from headfold.kernels.hopper.compat import gl, gluon
from headfold.kernels.hopper.layouts import GROUP_ROWS, accumulator


@gluon.jit
def shrink_kernel(Scores, Maxima, Out, scale_log2, BLOCK_N: gl.constexpr):
    layout: gl.constexpr = accumulator(BLOCK_N)
    row = gl.arange(0, GROUP_ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    scores = gl.load(Scores + row[:, None] * BLOCK_N + column[None, :])
    row_max = gl.load(Maxima + row)
    _, row_sum = softmax.begin(BLOCK_N)
    _, shrink, _, _ = softmax.step_lazily(scores, row_max, row_sum, scale_log2, True)
    gl.store(Out + row, shrink)


def shrink_factors(scores: torch.Tensor, maxima: torch.Tensor, scale_log2: float) -> torch.Tensor:
    """What older sums of rows with `maxima` (64,) shrink by when `scores` (64, n) come; both float32 on the GPU."""
    out = torch.empty_like(maxima)
    shrink_kernel[(1,)](scores, maxima, out, scale_log2, scores.shape[1], num_warps=4)
    return out
