"""The Gluon decode kernel on a Hopper GPU against the reference at float64, with the merge of its states."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import headfold
from headfold import backends
from headfold.problem import Inputs, check
from tests.cases import NAN, assert_accurate, make, poisoned
from tests.hopper_calls import in_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


def call(q_lens: list[int], k_lens: list[int], **more: Any) -> Inputs:
    values = {"heads": 8, "kv_heads": 2, "d": 128, "dtype": torch.bfloat16, "device": "cuda"}
    return make(q_lens, k_lens, **{**values, **more})


def attend(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a call that is this kernel's by plan into poisoned results."""
    check(x)
    out, lse = poisoned(x)
    plan = backends.plan_of(x, out)[1]
    assert (plan.backend, plan.kernel) == ("hopper", "decode"), plan.reasons
    backends.run(x, out, lse)
    return out, lse


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return all(torch.equal(s.nan_to_num(7.0), t.nan_to_num(7.0)) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(60))
def test_drawn_calls(seed: int) -> None:
    """Layouts, head dimensions, groups, windows, dtypes and forced splits; the same bits in 20 runs."""
    r = random.Random(seed)
    group = r.choice((1, 2, 3, 4, 8))
    q_layout = r.choice(("dense", "ragged"))
    most = max(-(-17 // group), 64 // group if r.random() < 0.5 else 0)
    if q_layout == "ragged":
        most = min(most, 64 // group - 3)  # `make` leaves up to 3 rows between sequences
    batch = r.randint(1, 12)
    q_lens = [most, *(r.choice((most, r.randint(0, most))) for _ in range(batch - 1))]
    k_lens = [r.choice((0, 1, 128, r.randint(1, 4000))) for _ in range(batch)]
    k_lens[0] = max(k_lens[0], 1)
    d, dv = r.choice(((64, 64), (128, 128), (128, 64), (96, 96), (192, 128), (256, 256)))
    window = r.choice(((-1, -1), (-1, 0), (r.randint(0, 500), 0), (r.randint(0, 500), r.randint(0, 100))))
    x = call(
        q_lens,
        k_lens,
        heads=2 * group,
        d=d,
        dv=dv,
        dtype=r.choice((torch.bfloat16, torch.float16)),
        q_layout=q_layout,
        kv_layout=r.choice(("dense", "ragged", "paged")),
        page_size=r.choice((1, 4, 8, 16, 24, 64, 256)),
        window=window,
        bottom_right=r.random() < 0.7,
        scale=r.choice((None, 0.0, 0.3)),
        slack=r.choice((0, 3)),
        num_splits=r.choice((0, 0, 1, 3)),
        seed=seed,
    )
    first = attend(x)
    assert_accurate(x, *first)
    assert all(same(attend(x), first) for _ in range(20))


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (37, 0), (45, 5)])
@pytest.mark.parametrize("page_size", [8, 16, 48, 64, 256])
def test_pages_give_the_bits_of_rows(page_size: int, window: tuple[int, int]) -> None:
    lengths = [3000, 0, 333, 129]
    rows = call([8] * 4, lengths, window=window)
    want = attend(rows)
    assert_accurate(rows, *want)
    for shuffled in (False, True):
        assert same(attend(in_pages(rows, lengths, page_size, shuffled=shuffled)), want)


@pytest.mark.parametrize("layout", ["apart", "halves", "heads first"])
@pytest.mark.parametrize("d", [64, 96, 128, 256])
@pytest.mark.parametrize("page_size", [1, 2, 8, 16, 24, 48, 64, 256])
def test_few_rows_in_pages_and_in_rows(page_size: int, d: int, layout: str) -> None:
    """One query of a group of 4, two programs a multiprocessor: rows are copied or come in boxes, and the bits are the same."""
    lengths = [3000, 0, 333, 129, 1, 64, 2048]
    rows = call([1] * 7, lengths, d=d, causal=True)
    want = attend(rows)
    assert_accurate(rows, *want)
    pages = in_pages(rows, lengths, page_size, layout=layout)
    assert all(same(attend(pages), want) for _ in range(20))


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
@pytest.mark.parametrize("queries", [17, 40, 64, 100])
def test_two_consumers(queries: int, kv_layout: str) -> None:
    """More than 64 folded rows whose keys are split, as of a shared prefix."""
    x = call([queries], [9000], kv_layout=kv_layout, q_layout="ragged", slack=0, causal=queries == 40)
    assert backends.plan_of(x)[1].block_m == 128
    first = attend(x)
    assert_accurate(x, *first)
    assert all(same(attend(x), first) for _ in range(50))


def test_steps_that_follow_one_another_in_a_graph() -> None:
    """Launched while the kernel before ends: each step reads what that one wrote, its queries and its lengths."""
    batch, steps = 16, 20
    k, v = (torch.randn(batch, 2048, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    first = torch.randn(batch, 8, 8, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.randint(8, 1000, (batch,), device="cuda", dtype=torch.int32)

    def chain(synchronize: bool) -> torch.Tensor:
        q, used = first, lengths.clone()
        for _ in range(steps):
            q = headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True)
            used += 8
            if synchronize:
                torch.cuda.synchronize()
        return q

    want = chain(synchronize=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain(synchronize=False)
    for _ in range(20):
        got.fill_(NAN)
        graph.replay()
        assert torch.equal(got, want)
