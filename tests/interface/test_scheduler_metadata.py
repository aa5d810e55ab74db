"""get_scheduler_metadata: what it plans, and that it reads nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import headfold
from headfold import backends
from headfold.planner import DEVICES, make_plan
from headfold.problem import Inputs
from tests.cases import assert_accurate
from tests.conftest import Target
from tests.interface.bad import K, Q, V
from tests.interface.steps import Step, step
from tests.interface.tensors import ints


def metadata(s: Step, longest: int, **options: Any) -> Any:
    t = s.tensors
    b, sq, h, d = t["q"].shape
    return headfold.get_scheduler_metadata(
        b,
        sq,
        longest,
        h,
        t["k_cache"].shape[2],
        d,
        t["cache_seqlens"],
        t["q"].dtype,
        t["v_cache"].shape[3],
        **options,
    )


@pytest.mark.parametrize("page_size", [None, 16])
def test_scheduler_metadata_serves_every_step_within_its_bounds(
    target: Target, page_size: int | None
) -> None:
    s = step([3, 40], [1, 1], target.device, sq=1, capacity=96, page_size=page_size or 0, causal=True)
    lengths = s.tensors["cache_seqlens"]
    planned = metadata(s, 95, max_seqlen_k_new=1, page_size=page_size, causal=True)
    caches = s.caches()
    for i in range(2):
        s.tensors["cache_seqlens"] = lengths + i
        out, lse = s.run(**caches, scheduler_metadata=planned)
        assert_accurate(s.inputs(caches), out, lse)
    # Without it the call plans from its capacity. Planned from the lengths that there are, it means the same.
    exact = metadata(s, int(s.lengths.max()), page_size=page_size, causal=True)
    for plan in (None, exact):
        assert_accurate(s.inputs(caches), *s.run_after(caches, scheduler_metadata=plan))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_scheduler_metadata_plans_what_the_call_would(
    kernels: Target, paged: bool, batch: int, seen: list[Inputs]
) -> None:
    """One sequence is split evenly; the list of several is cut on the device, and nothing is fixed ahead."""
    q = torch.zeros(batch, 1, 8, 64, dtype=torch.float16)
    cache = q.new_zeros(512 * batch, 16, 2, 64) if paged else q.new_zeros(batch, 8192, 2, 64)
    table = {"page_table": torch.arange(512 * batch, dtype=torch.int32).view(batch, 512)} if paged else {}
    lengths = ints(9, 300)[:batch]
    planned = headfold.get_scheduler_metadata(
        batch, 1, 8192, 8, 2, 64, lengths, torch.float16, page_size=16 if paged else None, causal=True
    )
    headfold.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, causal=True, **table)
    plan = backends.plan_of(seen[0])[1]
    assert plan == make_plan(planned.problem, backends.device_of(q.device))
    assert bool(plan.ranges) == (batch > 1)
    assert planned.num_splits == (0 if plan.ranges else plan.num_splits)
    assert max(plan.ranges, plan.num_splits) > 1


def test_scheduler_metadata_decides_the_splits_unless_the_call_forces_them(seen: list[Inputs]) -> None:
    lengths = ints(3, 1)
    planned = headfold.get_scheduler_metadata(2, 3, 5, 4, 2, 8, lengths, torch.float32, num_splits=7)
    assert planned.num_splits == 7
    for options in ({}, {"num_splits": 3}):
        headfold.flash_attn_with_kvcache(
            Q, K, V, cache_seqlens=lengths, scheduler_metadata=planned, **options
        )
    assert [x.num_splits for x in seen] == [7, 3]


def test_scheduler_metadata_reads_nothing_from_the_device(kernels: Target) -> None:
    meta = ints(3).to("meta")
    on_meta = headfold.get_scheduler_metadata(
        1, 1, 8192, 8, 2, 64, meta, cu_seqlens_q=meta, cu_seqlens_k_new=meta, cache_leftpad=meta
    )
    real = headfold.get_scheduler_metadata(1, 1, 8192, 8, 2, 64, ints(9), cu_seqlens_q=ints(0, 1))
    assert replace(on_meta.problem, device_type=real.problem.device_type) == real.problem
    assert real.num_splits > 1


@pytest.mark.parametrize("batch", [1, 4])
def test_scheduler_metadata_leaves_the_gluon_kernel_its_calls(batch: int) -> None:
    """It takes none whose splits are asked for."""
    with backends.force(DEVICES["h200"]):
        lengths = torch.empty(batch, dtype=torch.int32, device="meta")
        assert headfold.get_scheduler_metadata(batch, 1, 8192, 32, 8, 128, lengths).num_splits == 0


def test_scheduler_metadata_follows_its_bounds(kernels: Target) -> None:
    def splits(**changes: Any) -> int:
        arguments = {
            "batch_size": 1,
            "max_seqlen_q": 1,
            "max_seqlen_k": 8192,
            "num_heads_q": 8,
            "num_heads_kv": 2,
            "headdim": 64,
            "cache_seqlens": ints(5),
        }
        return headfold.get_scheduler_metadata(**{**arguments, **changes}).num_splits

    long = splits()
    assert long > 1
    assert splits(max_seqlen_k=64) < long
    assert splits(max_seqlen_k=0, max_seqlen_k_new=8192) == long
    assert splits(window_size=(32, 0)) < long
    assert splits(window_size=torch.tensor([32, 0])) < long
    assert splits(attention_chunk=32) < long
    assert splits(batch_size=64, cache_seqlens=torch.zeros(64, dtype=torch.int32)) < long
    assert splits(sm_margin=10**6) < long
    assert splits(num_splits=5) == 5
    assert splits(max_seqlen_q=4096, causal=True) == 0  # nothing to split: left to the call
    assert splits(max_seqlen_k=0) == 0
    for same in ({"has_softcap": True}, {"headdim_v": 64}, {"pack_gqa": True}, {"qkv_dtype": torch.float16}):
        assert splits(**same) == long
