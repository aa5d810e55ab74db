"""The Gluon decode kernel's own source, emulated on CPU tensors, against the reference at float64.

As in test_hopper_emulated: several schedules, which must give the same bits, and races raise.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.problem import Inputs, check
from tests.cases import assert_accurate, make
from tests.hopper_calls import in_pages
from tests.kernels.emulated_decode import attend, plan_of
from tests.kernels.test_hopper_emulated import same


def checked(x: Inputs, schedules: int = 2, sms: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    check(x)
    first = attend(x, 0, sms)
    assert_accurate(x, *first)
    for seed in range(1, schedules):
        assert same(attend(x, seed, sms), first)
    return first


def call(q_lens: list[int], k_lens: list[int], **more: Any) -> Inputs:
    """32 to 64 folded rows of two KV heads."""
    values = {"heads": 8, "kv_heads": 2, "d": 64, "dtype": torch.bfloat16}
    return make(q_lens, k_lens, **{**values, **more})


LENGTHS = {
    "ragged": [300, 0, 1, 700, 64],
    "huge ratio": [1, 2000, 3],
    "equal": [130, 130, 130],
    "many": [5, 0, 40, 33, 1, 64, 65, 2, 90, 17, 0, 3, 128, 7],
    "whole blocks": [128, 256, 384],
}


@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("name", LENGTHS)
def test_streams_of_every_kind_of_lengths(name: str, kv_layout: str) -> None:
    """Eight queries a sequence, of which each sees what it should, in lists that are cut anywhere."""
    x = call([8] * len(LENGTHS[name]), LENGTHS[name], kv_layout=kv_layout, causal=True)
    plan = plan_of(x, sms=8)
    assert plan.ranges > 0
    checked(x, sms=8)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_calls(seed: int) -> None:
    """Layouts, head dimensions, groups, windows, dtypes, forced splits and few or many multiprocessors."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    group = r.choice((1, 2, 3, 4, 8))
    most = r.choice((-(-17 // group), 64 // group))
    most = max(most, -(-17 // group))
    batch = r.randint(1, 4)
    q_layout = r.choice(("dense", "ragged"))
    if q_layout == "ragged":
        most = min(most, 64 // group - 3)  # `make` leaves up to 3 rows between sequences
    q_lens = [most] * batch
    if r.random() < 0.4:
        q_lens = [most, *(r.randint(0, most) for _ in range(batch - 1))]
    k_lens = [r.choice((0, 1, 128, r.randint(1, 900))) for _ in range(batch)]
    k_lens[0] = max(k_lens[0], 1)
    kv_layout = r.choice(("dense", "ragged", "paged"))
    d, dv = r.choice(((64, 64), (128, 128), (128, 64), (96, 96), (256, 256)))
    window = r.choice(
        ((-1, -1), (-1, 0), (r.randint(0, 200), 0), (r.randint(0, 200), r.randint(0, 100)), (50, -1))
    )
    x = call(
        q_lens,
        k_lens,
        heads=2 * group,
        d=d,
        dv=dv,
        dtype=r.choice((torch.bfloat16, torch.float16)),
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=r.choice((1, 8, 16, 24, 64, 256)),
        window=window,
        bottom_right=r.random() < 0.7,
        scale=r.choice((None, 0.0, 0.3)),
        slack=r.choice((0, 3)),
        num_splits=r.choice((0, 0, 1, 3)),
        seed=seed,
    )
    checked(x, sms=r.choice((2, 4, 16)))


@pytest.mark.parametrize("page_size", [1, 4, 8, 48, 128])
@pytest.mark.parametrize("window", [(-1, 0), (37, 0), (45, 5)])
def test_pages_give_the_bits_of_rows(page_size: int, window: tuple[int, int]) -> None:
    lengths = [130, 0, 333]
    rows = call([8] * 3, lengths, window=window, d=128)
    assert rows.seqused_k is not None
    want = checked(rows)
    for shuffled in (False, True):
        assert same(attend(in_pages(rows, lengths, page_size, shuffled=shuffled), 7), want)


@pytest.mark.parametrize("layout", ["apart", "halves", "heads first"])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(
    ("page_size", "d"), [(1, 128), (2, 64), (3, 256), (4, 96), (8, 128), (16, 64), (48, 128), (64, 256)]
)
def test_few_rows_in_pages_and_in_rows(page_size: int, d: int, alone: bool, layout: str) -> None:
    """One query of a group of 4: rows are copied where boxes would be small, to a program alone all but short rows."""
    lengths = [130, 0, 333, 64]
    sms = 16 if alone else 2
    rows = call([1] * 4, lengths, d=d, causal=True)
    want = checked(rows, sms=sms)
    assert plan_of(rows, sms=sms).resident == (1 if alone or d == 256 else 2)
    pages = in_pages(rows, lengths, page_size, layout=layout)
    box = page_size & -page_size
    boxed = d == 64 and box > 8 if alone else box * d * 2 > 4096
    assert plan_of(pages, sms=sms).page_rows == (box if boxed else 1)
    assert same(checked(pages, schedules=3, sms=sms), want)


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
@pytest.mark.parametrize("rows", [17, 33, 64])
def test_two_consumers(rows: int, kv_layout: str) -> None:
    """More than 64 folded rows whose keys are split: what a shared prefix is, in tiles of 128 rows."""
    x = call([rows], [600], kv_layout=kv_layout, q_layout="ragged", slack=0, causal=rows == 33)
    assert plan_of(x, sms=16).block_m == (128 if rows * 4 > 64 else 64)
    checked(x, sms=16)


@pytest.mark.parametrize("causal", [False, True])
def test_many_schedules(causal: bool) -> None:
    """One tile of many blocks: every buffer changes hands often, at all relative speeds of those who share it."""
    x = call([8], [1500], kv_heads=1, heads=4, d=128, causal=causal)
    checked(x, schedules=6, sms=1)
