"""Mixed batches: when short sequences run apart, and how."""

from __future__ import annotations

from typing import Any

import pytest

from headfold.planner import DEVICES, Plan, make_plan
from headfold.planner.mixed import SKEW, beside_sms
from tests.planner.problems import problem

H200 = DEVICES["h200"]
# 8 chunks of 512 and 120 decodes over 8192 keys.
SERVED: dict[str, Any] = {
    "batch": 128,
    "sq": 512,
    "total_q": 8 * 512 + 120,
    "q_layout": "ragged",
    "kv_layout": "paged",
    "page_size": 16,
    "lengths_on_device": True,
    "window_right": 0,
}


def plan(**change: Any) -> Plan:
    return make_plan(problem(**SERVED | change), H200)


def test_decodes_beside_chunks_run_as_a_decode() -> None:
    mixed = plan()
    assert mixed.kernel == "prefill"
    assert mixed.short is not None
    assert (mixed.short.backend, mixed.short.kernel, mixed.short.block_m) == ("hopper", "decode", 16)
    assert mixed.short_queries == 4
    assert mixed.short.short is None
    text = mixed.explain(problem(**SERVED), H200)
    assert "Sequences of up to 4 queries run beside it, as the hopper decode kernel" in text


def test_both_run_at_the_same_time_where_the_gluon_kernels_take_them() -> None:
    """A program a multiprocessor on a part of them: its shared memory leaves no room for the prefill's."""
    both = plan()
    assert both.beside
    assert both.short is not None
    assert (both.workers, both.short.resident) == (H200.sms, 1)
    assert both.short.ranges * both.short.lanes <= beside_sms(H200) < H200.sms
    assert both.short.shared_memory + both.shared_memory > H200.smem
    for change in ({"featured": True, "extras": ("a sink",)}, {"sm_margin": 1}):
        one_by_one = plan(**change)
        assert one_by_one.short is not None
        assert not one_by_one.beside


@pytest.mark.parametrize(("heads", "queries"), [(8, 16), (32, 4), (96, 1), (256, 1)])
def test_short_sequences_fill_the_lowest_tile_at_most(heads: int, queries: int) -> None:
    assert plan(heads=heads).short_queries == queries


@pytest.mark.parametrize(
    "change",
    [
        {"total_q": 128 * 512 // SKEW + 1},
        {"q_layout": "dense", "total_q": 128 * 512},
        {"sk": 64, "sq": 64, "total_q": 128},
        {"sq": 1, "total_q": 128},
        {"tokens_per_split": 512},
        {"num_splits": 4},
    ],
    ids=["even lengths", "one length", "few bytes", "decodes alone", "fixed splits", "forced splits"],
)
def test_other_batches_are_not_mixed(change: dict[str, Any]) -> None:
    assert plan(**change).short is None


def test_the_chunks_of_a_mixed_batch_take_the_gluon_kernel() -> None:
    """Tiles of 128 rows hold the chunks well: that the decodes would waste them does not count."""
    assert plan().backend == "hopper"
