"""The Gluon prefill kernel's own source, emulated on CPU tensors, against the reference at float64.

Every call runs under several schedules, which must give the same bits; the emulator raises where buffers change hands
without a barrier, whether or not a schedule makes it show.
"""

from __future__ import annotations

from itertools import starmap

import pytest
import torch

pytest.importorskip("triton")

from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.hopper_calls import SMALL, SMALL_RAGGED, drawn, drawn_ragged
from tests.kernels.emulated import attend


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def check(x: Inputs, schedules: int = 2, programs: int = 2) -> None:
    first = attend(x, 0, programs)
    assert_accurate(x, *first)
    for seed in range(1, schedules):
        again = attend(x, seed, programs)
        assert all(starmap(torch.equal, zip(bits(again), bits(first), strict=True)))


def bits(results: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [t.contiguous().view(torch.uint8) for t in results]


@pytest.mark.parametrize("seed", range(30))
def test_drawn_calls(seed: int) -> None:
    """Dense tensors, windows and masks; bfloat16 and float16; d64 to d256."""
    check(drawn(seed, "cpu", SMALL), programs=1 + seed % 4)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_ragged_calls(seed: int) -> None:
    """Offsets and lengths in memory; what lies beyond a sequence's end is NaN or another sequence."""
    check(drawn_ragged(seed, "cpu", SMALL_RAGGED), programs=1 + seed % 4)


@pytest.mark.parametrize("kind", ["plain", "causal", "added", "holes", "wide"])
def test_many_schedules(kind: str) -> None:
    """Few tiles of many blocks: every buffer changes hands often, at all relative speeds of those who share it."""
    torch.manual_seed(0)
    d = 256 if kind == "wide" else 64
    q, k, v = rand(1, 140, 2, d), rand(1, 900, 1, d), rand(1, 900, 1, d)
    x = Inputs(q, k, v, window_right=0 if kind == "causal" else -1)
    if kind in ("added", "holes"):
        x.mask = rand(1, 2, 140, 904)[..., :900]
    if kind == "holes" and x.mask is not None:
        x.mask[..., :70, 128:640] = -torch.inf
        x.mask[:, 1, 70:] = -torch.inf
    check(x, schedules=6)


def test_keys_that_no_query_sees_may_hold_nan() -> None:
    """Top-left causal with more keys than queries: the copy engine brings whole blocks of them all the same."""
    for sq, sk in ((130, 200), (130, 500), (256, 300), (200, 129)):
        q, k, v = rand(1, sq, 2, 128), rand(1, sk, 1, 128), rand(1, sk, 1, 128)
        k[:, sq:], v[:, sq:] = NAN, NAN
        check(Inputs(q, k, v, window_right=0, bottom_right=False))


def test_rows_whose_biases_are_all_the_lowest_float() -> None:
    """Such a row is a mean of the values in PyTorch: -3.4e38 * log2(e) would be -inf, and the row dead."""
    q, k, v = rand(1, 140, 1, 64), rand(1, 200, 1, 64), rand(1, 200, 1, 64)
    mask = torch.zeros(1, 1, 140, 200, dtype=torch.bfloat16)
    mask[..., 100:] = torch.finfo(torch.bfloat16).min
    mask[:, :, 7:70] = torch.finfo(torch.bfloat16).min
    out, lse = attend(Inputs(q, k, v, mask=mask))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 64**-0.5 + mask.double()
    want = torch.einsum("bhqk,bkhd->bqhd", scores.float().softmax(-1).double(), v.double())
    assert (out - want).abs().max() < 0.01
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5)
