"""Short tiles of the Gluon prefill on a Hopper GPU: several programs a multiprocessor, against the reference at float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import headfold
from headfold.planner import short
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.gpu.test_hopper import attend as attend_in_tiles
from tests.gpu.test_hopper import paged_rows, rand
from tests.hopper_calls import (
    LAYOUTS,
    drawn,
    drawn_ragged,
    in_pages,
    short_tiles_up_to,
    with_features,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

DIMS = ((64, 64), (128, 128), (96, 96), (64, 128), (80, 80), (56, 120))
EVERYTHING = 1 << 20


@pytest.fixture(autouse=True)
def always_short(monkeypatch: pytest.MonkeyPatch) -> None:
    short_tiles_up_to(EVERYTHING, monkeypatch)


def attend(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Run checked inputs into poisoned results in short tiles."""
    return attend_in_tiles(x, 64)


def check(x: Inputs, repeats: int = 1) -> None:
    """Accurate, and in the same bits every time."""
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    for _ in range(repeats):
        again = attend(x)
        assert torch.equal(again[0].nan_to_num(5.0), out.nan_to_num(5.0))
        assert torch.equal(again[1].nan_to_num(5.0), lse.nan_to_num(5.0))


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize(
    "window", [(0, 0), (1, 0), (127, 0), (128, 0), (129, 0), (0, 3), (40, 90), (1000, 5), (7, -1)]
)
def test_windows(d: int, window: tuple[int, int]) -> None:
    torch.manual_seed(d)
    for sq, sk, heads in ((150, 150, 2), (700, 3333, 6), (3000, 1000, 2), (2048, 2048, 16)):
        x = Inputs(rand(2, sq, heads, d), rand(2, sk, 2, d), rand(2, sk, 2, d))
        x.window_left, x.window_right = window
        check(x)
        check(replace(x, bottom_right=False))


@pytest.mark.parametrize("seed", range(100))
def test_drawn_calls(seed: int) -> None:
    """Dense and ragged, empty sequences among them, with sinks and chunks; most without a left window get one."""
    for x in (drawn(seed, "cuda", dims=DIMS), drawn_ragged(seed, "cuda", dims=DIMS[:4])):
        lengths = any(t is not None for t in (x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k))
        open_left = x.window_left < 0 and (seed % 3 or lengths)
        x = replace(x, mask=None, window_left=(seed * 37) % 300 if open_left else x.window_left)
        check(x)
        check(with_features(x, seed, ("sink", "chunk")[seed % 2 :]))


@pytest.mark.parametrize("length", [1024, 8192])
@pytest.mark.parametrize("features", [{"window_left": 127}, {"attention_chunk": 128}], ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_many_tiles(d: int, features: dict[str, Any], length: int) -> None:
    """gpt-oss: buffers change hands thousands of times between programs that share a multiprocessor."""
    torch.manual_seed(d)
    q, k, v = rand(1, length, 16, d), rand(1, length, 2, d), rand(1, length, 2, d)
    check(Inputs(q, k, v, window_right=0, sink=2 * rand(16), **features), repeats=100)


@pytest.mark.parametrize("form", [(2, 64, 2), (2, 64, 3), (2, 128, 2), (4, 64, 2)])
def test_other_forms(monkeypatch: pytest.MonkeyPatch, form: tuple[int, int, int]) -> None:
    """(programs a multiprocessor, keys of a block, buffers)."""
    resident, keys, stages = form
    monkeypatch.setattr(short, "RESIDENT", {64: resident})
    monkeypatch.setattr(short, "KEYS", keys)
    monkeypatch.setattr(short, "STAGES", stages)
    for left, right in ((127, 0), (40, 60)):
        q, k, v = rand(2, 1500, 8, 64), rand(2, 2000, 2, 64), rand(2, 2000, 2, 64)
        check(Inputs(q, k, v, window_left=left, window_right=right, sink=rand(8)), repeats=20)


@pytest.mark.parametrize(
    "features", [{"window_left": 37}, {"window_left": 45}, {"attention_chunk": 130}], ids=str
)
@pytest.mark.parametrize("d", [64, 128])
def test_keys_that_no_query_sees_may_hold_nan(d: int, features: dict[str, int]) -> None:
    for sq, sk, bottom_right in ((200, 700, True), (70, 300, True), (130, 500, False)):
        k, v = rand(2, sk, 2, d), rand(2, sk, 2, d)
        x = Inputs(rand(2, sq, 8, d), k, v, window_right=0, bottom_right=bottom_right, **features)
        shift, chunk = sk - sq if bottom_right else 0, features.get("attention_chunk")
        first = shift // chunk * chunk if chunk else max(shift - features["window_left"], 0)
        for t in (k, v):
            t[:, :first], t[:, sq + shift :] = NAN, NAN
        check(x)
        check(replace(x, seqused_k=torch.full((2,), sk, dtype=torch.int32, device="cuda")))


@pytest.mark.parametrize("page_size", [16, 48, 64, 256])
@pytest.mark.parametrize("window", [(127, 0), (40, 0), (37, 5)])
@pytest.mark.parametrize("d", [64, 96, 128])
def test_pages_give_the_bits_of_rows(d: int, window: tuple[int, int], page_size: int) -> None:
    torch.manual_seed(page_size + d)
    for lengths, q_lens in (([700, 0, 1300, 129], 200), ([333, 900, 64], [300, 1, 150])):
        rows = paged_rows(lengths, q_lens, d, d, window)
        rows.sink = rand(8)
        want = attend(rows)
        assert_accurate(rows, *want)
        for layout in LAYOUTS:
            got = attend(in_pages(rows, lengths, page_size, layout=layout))
            assert torch.equal(got[0], want[0]), (lengths, layout)
            assert torch.equal(got[1], want[1]), (lengths, layout)


def test_a_graph_replays_beside_eager_calls() -> None:
    q, k, v = rand(1, 2048, 16, 64), rand(1, 2048, 2, 64), rand(1, 2048, 2, 64)
    window = {"causal": True, "window_size": (127, 0)}
    want = headfold.flash_attn_func(q, k, v, **window)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = headfold.flash_attn_func(q, k, v, **window)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        out.fill_(NAN)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.replay()
        assert torch.equal(headfold.flash_attn_func(q, k, v, **window), want)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(out, want)
