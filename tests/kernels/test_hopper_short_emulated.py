"""Short tiles in the Gluon prefill kernel's own source, emulated on CPU tensors, against the reference at float64.

As in test_hopper_emulated.py; here whatever can be is in tiles of 64 rows, and the others are left to that file.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.kernels.hopper.pages import apart
from headfold.planner import DEVICES, Plan, short
from headfold.planner import hopper as planner
from headfold.planner.hopper import plan_hopper
from headfold.problem import Inputs, problem_of
from tests.cases import NAN
from tests.hopper_calls import (
    SMALL,
    SMALL_RAGGED,
    drawn,
    drawn_ragged,
    in_pages,
    short_tiles_up_to,
    with_features,
)
from tests.kernels.emulated import attend
from tests.kernels.test_hopper_emulated import check, check_pages, each_shuffled, paged_rows, rand, same

DIMS = ((64, 64), (128, 128), (96, 96), (64, 128), (80, 80), (56, 120))
EVERYTHING = 1 << 20


@pytest.fixture(autouse=True)
def always_short(monkeypatch: pytest.MonkeyPatch) -> None:
    short_tiles_up_to(EVERYTHING, monkeypatch)


def plan_of(x: Inputs) -> Plan:
    plan = plan_hopper(replace(problem_of(x), device_type="cuda"), DEVICES["h200"], 2**31)
    assert isinstance(plan, Plan), plan
    return plan


def check_short(x: Inputs, schedules: int = 2, programs: int = 1) -> None:
    """`programs` for each multiprocessor's first; each has two or four."""
    assert plan_of(x).block_m == 64
    check(x, schedules, programs)


@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize(
    "window", [(0, 0), (1, 0), (127, 0), (128, 0), (129, 0), (0, 3), (40, 90), (300, 5), (7, -1)]
)
def test_windows(d: int, window: tuple[int, int]) -> None:
    """As many queries as keys, fewer and more; rows without a key, and groups of one head and of three."""
    torch.manual_seed(d)
    for sq, sk, heads, programs in ((150, 150, 2, 1), (70, 333, 3, 2), (300, 100, 1, 3)):
        x = Inputs(rand(1, sq, heads, d), rand(1, sk, 1, d), rand(1, sk, 1, d))
        x.window_left, x.window_right = window
        check_short(x, programs=programs)
        check_short(replace(x, bottom_right=False), schedules=1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 64, 100, 128, 200, 500])
@pytest.mark.parametrize("right", [-1, 0])
def test_chunks(chunk: int, right: int) -> None:
    torch.manual_seed(chunk)
    for sq, sk, left in ((200, 333, -1), (130, 130, 70)):
        q, k, v = rand(1, sq, 2, 64), rand(1, sk, 1, 64), rand(1, sk, 1, 64)
        x = Inputs(q, k, v, attention_chunk=chunk, window_left=left, window_right=right)
        check_short(x)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_calls(seed: int) -> None:
    """Dense and ragged, empty sequences among them, with sinks and chunks; most without a left window get one."""
    for x in (drawn(seed, "cpu", SMALL, DIMS), drawn_ragged(seed, "cpu", SMALL_RAGGED, DIMS[:4])):
        lengths = any(t is not None for t in (x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k))
        open_left = x.window_left < 0 and (seed % 3 or lengths)
        x = replace(x, mask=None, window_left=(seed * 37) % 300 if open_left else x.window_left)
        check_short(x, programs=1 + seed % 3)
        check_short(with_features(x, seed, ("sink", "chunk")[seed % 2 :]), schedules=1)


@pytest.mark.parametrize("d", [64, 96])
@pytest.mark.parametrize("right", [-1, 0, 50])
def test_sequences_without_a_left_edge(d: int, right: int) -> None:
    """Dense, and as a ragged batch, a sequence of which is empty."""
    torch.manual_seed(d)
    for sq, sk in ((200, 200), (70, 333), (150, 100)):
        q, k, v = rand(2, sq, 2, d), rand(2, sk, 1, d), rand(2, sk, 1, d)
        check_short(Inputs(q, k, v, window_right=right))
        rows, keys = (torch.tensor([0, n - 30, n - 30, 2 * n], dtype=torch.int32) for n in (sq, sk))
        x = Inputs(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), window_right=right)
        check_short(
            replace(x, cu_seqlens_q=rows, cu_seqlens_k=keys, max_seqlen_q=sq + 30, max_seqlen_k=sk + 30),
            programs=2,
        )


@pytest.mark.parametrize("d", [64, 128])
def test_programs_of_one_tile(d: int) -> None:
    """More programs than tiles would fill: each has one, or none."""
    q, k, v = rand(1, 130, 2, d), rand(1, 130, 1, d), rand(1, 130, 1, d)
    check_short(Inputs(q, k, v, window_left=127, window_right=0), schedules=4, programs=8)


def test_many_schedules() -> None:
    """Tiles of three blocks and of ten: buffers change hands at all relative speeds of those who share them."""
    for left in (127, 500):
        q, k, v = rand(1, 200, 2, 64), rand(1, 900, 1, 64), rand(1, 900, 1, 64)
        check_short(Inputs(q, k, v, window_left=left, window_right=0), schedules=6)


@pytest.mark.parametrize("resident", [2, 4])
@pytest.mark.parametrize(("keys", "stages"), [(64, 2), (64, 3), (128, 2)])
def test_other_forms(monkeypatch: pytest.MonkeyPatch, resident: int, keys: int, stages: int) -> None:
    """Blocks of 128 keys, three buffers, and one of queries beside products in turn, whatever fits a multiprocessor."""
    monkeypatch.setattr(short, "RESIDENT", {64: resident})
    monkeypatch.setattr(short, "KEYS", keys)
    monkeypatch.setattr(short, "STAGES", stages)
    q, k, v = rand(2, 150, 3, 64), rand(2, 300, 1, 64), rand(2, 300, 1, 64)
    for left, right in ((127, 0), (40, 60)):
        x = Inputs(q, k, v, window_left=left, window_right=right, sink=rand(3))
        assert (plan_of(x).resident, plan_of(x).block_n, plan_of(x).num_stages) == (resident, keys, stages)
        check_short(x, schedules=3)


@pytest.mark.parametrize("d", [64, 96])
def test_few_keys_with_nan_on_both_sides(d: int) -> None:
    for left, sk in ((5, 164), (2, 150), (0, 146)):
        k, v = rand(1, 200, 1, d), rand(1, 200, 1, d)
        first = sk - 6 - left
        for t in (k, v):
            t[:, :first], t[:, sk:] = NAN, NAN
        x = Inputs(rand(1, 130, 2, d), k, v, window_left=left, window_right=0)
        x.seqused_q, x.seqused_k = (torch.tensor([n], dtype=torch.int32) for n in (6, sk))
        check_short(x, schedules=4)


@pytest.mark.parametrize(
    "features", [{"window_left": 37}, {"window_left": 45}, {"attention_chunk": 130}], ids=str
)
def test_keys_that_no_query_sees_may_hold_nan(features: dict[str, int]) -> None:
    """Before the first query's first key, wherever in a block that is, and behind the last one's."""
    for sq, sk, bottom_right in ((200, 700, True), (70, 300, True), (130, 500, False)):
        k, v = rand(1, sk, 1, 64), rand(1, sk, 1, 64)
        x = Inputs(rand(1, sq, 2, 64), k, v, window_right=0, bottom_right=bottom_right, **features)
        shift, chunk = sk - sq if bottom_right else 0, features.get("attention_chunk")
        first = shift // chunk * chunk if chunk else max(shift - features["window_left"], 0)
        for t in (k, v):
            t[:, :first], t[:, sq + shift :] = NAN, NAN
        check_short(x)
        check_short(replace(x, seqused_k=torch.tensor([sk], dtype=torch.int32)))


PAGED = [
    # d, dv, page size, queries (None: ragged), features
    (64, 64, 16, 150, {"window_left": 127, "window_right": 0}),
    (64, 64, 64, None, {"window_left": 40, "window_right": 0}),
    (128, 128, 16, None, {"window_left": 37, "window_right": 5}),
    (128, 128, 48, 150, {"attention_chunk": 64}),
    (96, 96, 16, None, {"window_left": 129, "window_right": 0}),
    (64, 128, 256, 150, {"window_left": 0, "window_right": 0}),
    (80, 80, 32, 150, {"attention_chunk": 100, "window_right": 0}),
]


@pytest.mark.parametrize(("d", "dv", "page_size", "sq", "features", "layout"), each_shuffled(PAGED))
def test_pages_give_the_bits_of_rows(
    d: int, dv: int, page_size: int, sq: int | None, features: dict[str, Any], layout: str
) -> None:
    """All with sinks; NaN past the ends."""
    rows, lengths = paged_rows(d, dv, page_size, sq, **features)
    rows.sink = rand(2)
    assert plan_of(in_pages(rows, lengths, page_size)).block_m == 64
    check_pages(rows, lengths, page_size, layout)


@pytest.mark.parametrize("page_size", [16, 48, 128])
@pytest.mark.parametrize("left", [37, 45])
def test_pages_that_left_the_window_are_anyones(page_size: int, left: int) -> None:
    """200 queries at the end of 700 keys."""
    torch.manual_seed(page_size)
    gone = 700 - 200 - left
    k, v = rand(1, 700, 1, 64), rand(1, 700, 1, 64)
    k[:, :gone], v[:, :gone] = NAN, NAN
    rows = Inputs(rand(1, 200, 2, 64), k, v, window_left=left, window_right=0)
    rows.seqused_k = torch.tensor([700], dtype=torch.int32)
    check_short(rows)
    assert same(attend(in_pages(rows, [700], page_size, garbage_before=gone)), attend(rows))


def test_planner_and_kernel_agree_which_blocks_one_warp_fetches() -> None:
    for rows in (8, 16, 64):
        assert apart.fn(short.KEYS, rows) == (planner.MOST_BOXES * rows < short.KEYS)


def test_no_sink_changes_no_bit() -> None:
    x = Inputs(rand(1, 200, 2, 64), rand(1, 150, 1, 64), rand(1, 150, 1, 64), window_left=50, window_right=0)
    want = attend(x)
    assert same(attend(replace(x, sink=torch.full((2,), -torch.inf))), want)
