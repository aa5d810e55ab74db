"""Sinks, softcap and attention chunks in the Gluon prefill kernel's own source, emulated, against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.planner import hopper as planner
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.hopper_calls import (
    PARTED_DIMS,
    SMALL,
    SMALL_RAGGED,
    drawn,
    drawn_ragged,
    in_pages,
    with_features,
)
from tests.kernels.emulated import attend
from tests.kernels.test_hopper_emulated import (
    check,
    check_pages,
    each_shuffled,
    paged_rows,
    rand,
    same,
    two_consumers,
)

__all__ = ["two_consumers"]  # a fixture that is used of itself


@pytest.mark.parametrize("seed", range(24))
def test_drawn_calls(seed: int) -> None:
    """Beside windows on dense tensors, and sinks beside masks."""
    check(with_features(drawn(seed, "cpu", SMALL), seed), programs=1 + seed % 4)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_ragged_calls(seed: int) -> None:
    """Offsets and lengths in memory."""
    check(with_features(drawn_ragged(seed, "cpu", SMALL_RAGGED), seed), programs=1 + seed % 4)


@pytest.mark.parametrize("dims", PARTED_DIMS)
def test_head_dimensions_in_two_parts(dims: tuple[int, int]) -> None:
    for seed in range(2):  # three without features
        check(with_features(drawn(seed, "cpu", SMALL, [dims]), seed))
        check(with_features(drawn_ragged(seed, "cpu", SMALL_RAGGED, [dims]), seed), programs=3)


@pytest.mark.parametrize("seed", range(4))
def test_three_consumers_have_sinks(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    torch.manual_seed(seed)
    sq, sk = ((400, 400), (193, 64))[seed % 2]
    d = (64, 96)[seed // 2]
    x = Inputs(rand(2, sq, 2, d), rand(2, sk, 1, d), rand(2, sk, 1, d), window_right=0)
    check(with_features(x, seed, ["sink"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_without_a_key_has_the_sink_alone(dtype: torch.dtype) -> None:
    """The first queries of more than there are keys; a sink of -inf is none; one far above all scores leaves nothing."""
    x = Inputs(rand(1, 200, 3, 64), rand(1, 150, 1, 64), rand(1, 150, 1, 64), window_right=0)
    x.sink = torch.tensor([1.5, -math.inf, 300.0], dtype=dtype)
    out, lse = attend(x)
    assert torch.equal(lse[0, :, :50], x.sink.float()[:, None].expand(3, 50))
    assert (out[0, :50] == 0).all()
    assert (out[0, :, 2] == 0).all()
    assert_accurate(x, out, lse)


def test_no_sink_changes_no_bit() -> None:
    """One of -inf is none."""
    x = Inputs(rand(1, 200, 2, 64), rand(1, 150, 1, 64), rand(1, 150, 1, 64), window_right=0)
    want = attend(x)
    x.sink = torch.full((2,), -math.inf)
    assert same(attend(x), want)


@pytest.mark.parametrize("scale", [0.0, 0.3, 40.0])
@pytest.mark.parametrize("cap", [1e-3, 1.0, 50.0, 1e3])
def test_caps_of_every_size(cap: float, scale: float) -> None:
    """Scores far beyond the cap and far within it, and garbage that no row sees."""
    torch.manual_seed(0)
    k, v = rand(1, 300, 1, 64), rand(1, 300, 1, 64)
    k[:, 150:], v[:, 150:] = NAN, NAN
    k[:, :10] *= 100
    x = Inputs(
        rand(1, 150, 2, 64), k, v, softcap=cap, softmax_scale=scale, window_right=0, bottom_right=False
    )
    assert_accurate(x, *attend(x))


def chunk_of(x: Inputs, sq: int, sk: int) -> tuple[int, int]:
    """Keys [first, last) that some query of a sequence sees, for a chunk alone."""
    c, shift = x.attention_chunk, sk - sq if x.bottom_right else 0
    return max(shift, 0) // c * c, min(sk, (sq - 1 + shift) // c * c + c)


@pytest.mark.parametrize("chunk", [1, 7, 64, 100, 128, 200, 500])
@pytest.mark.parametrize("bottom_right", [True, False])
def test_keys_outside_every_chunk_may_hold_nan(chunk: int, bottom_right: bool) -> None:
    """Before the first query's chunk, and behind the last one's."""
    for sq, sk in ((150, 500), (257, 300), (200, 130)):
        k, v = rand(1, sk, 1, 64), rand(1, sk, 1, 64)
        x = Inputs(rand(1, sq, 2, 64), k, v, attention_chunk=chunk, bottom_right=bottom_right)
        first, last = chunk_of(x, sq, sk)
        for t in (k, v):
            t[:, :first], t[:, last:] = NAN, NAN
        check(x, schedules=1)
        x.seqused_k = torch.tensor([sk], dtype=torch.int32)
        check(x, schedules=1)


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 24, 128])
@pytest.mark.parametrize("chunk", [100, 130, 512])
def test_pages_before_the_chunk_are_anyones(page_size: int, chunk: int) -> None:
    """200 queries at the end of 700 keys. Keys before their chunks are NaN, and the table says anything of them."""
    torch.manual_seed(page_size)
    gone = (700 - 200) // chunk * chunk
    k, v = rand(1, 700, 1, 64), rand(1, 700, 1, 64)
    k[:, :gone], v[:, :gone] = NAN, NAN
    rows = Inputs(rand(1, 200, 2, 64), k, v, attention_chunk=chunk, window_right=0)
    rows.seqused_k = torch.tensor([700], dtype=torch.int32)
    want = attend(rows)
    assert_accurate(rows, *want)
    assert same(attend(in_pages(rows, [700], page_size, garbage_before=gone)), want)


PAGED = [
    # d, dv, page size, queries (None: ragged), features
    (64, 64, 1, 150, {"softcap": 3.0}),
    (64, 64, 16, None, {"softcap": 50.0, "window_left": 40}),
    (64, 64, 64, 150, {"window_left": 127, "window_right": 0}),
    (128, 128, 1, None, {"softcap": 50.0, "attention_chunk": 100}),
    (128, 128, 24, 150, {"attention_chunk": 64}),
    (128, 128, 128, None, {"softcap": 50.0, "window_right": 0}),
    (256, 256, 1, 150, {"attention_chunk": 130, "softcap": 2.0}),
    (256, 256, 64, None, {"softcap": 50.0, "window_right": 0}),
    (192, 128, 64, 150, {"softcap": 50.0}),
    (192, 192, 16, None, {"attention_chunk": 130, "softcap": 2.0}),
    (96, 96, 8, 150, {"softcap": 5.0}),
]


@pytest.mark.parametrize(("d", "dv", "page_size", "sq", "features", "layout"), each_shuffled(PAGED))
def test_pages_give_the_bits_of_rows(
    d: int, dv: int, page_size: int, sq: int | None, features: dict[str, Any], layout: str
) -> None:
    """All with sinks; NaN past the ends."""
    rows, lengths = paged_rows(d, dv, page_size, sq, **features)
    rows.sink = rand(2)
    check_pages(rows, lengths, page_size, layout)
