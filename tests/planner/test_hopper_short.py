"""Which prefills run in short tiles, several programs a multiprocessor."""

from __future__ import annotations

from typing import Any

import pytest

from headfold.planner import DEVICES, make_plan
from headfold.planner.short import MOST_BLOCKS, keys_seen
from headfold.problem import Problem
from tests.planner.problems import problem

H200 = DEVICES["h200"]
RESERVED = 1024  # bytes of shared memory that a program takes besides its own


def prefill(d: int, **other: Any) -> Problem:
    """64:8, 8192 queries on 8192 keys, causal within a window of 128 keys."""
    given = {"device_type": "cuda", "window_left": 127, "window_right": 0, **other}
    return problem(64, 8, 1, 8192, 8192, d, **given)


@pytest.mark.parametrize(("d", "resident"), [(64, 4), (80, 2), (96, 2), (128, 2)])
def test_programs_share_a_multiprocessor(d: int, resident: int) -> None:
    p = prefill(d)
    plan = make_plan(p, H200)
    assert (plan.backend, plan.kernel, plan.block_m, plan.block_n) == ("hopper", "prefill", 64, 64)
    assert (plan.resident, plan.workers, plan.num_warps) == (resident, resident * H200.sms, 8)
    assert resident * (plan.shared_memory + RESERVED) <= H200.smem + RESERVED
    assert plan.tiles == 128
    assert f"{resident} programs share a multiprocessor" in plan.explain(p, H200)
    assert f"{plan.workers} programs, {resident} a multiprocessor" in plan.explain(p, H200)


def rows(**other: Any) -> tuple[int, int]:
    """(rows of a tile of d64, programs a multiprocessor)."""
    plan = make_plan(prefill(64, **other), H200)
    assert plan.backend == "hopper"
    return plan.block_m, plan.resident


@pytest.mark.parametrize(
    "other",
    [
        {"window_right": 100},
        {"window_left": 128 * (MOST_BLOCKS[64] - 1)},
        {"window_left": None, "attention_chunk": 200},
        {"window_left": None, "window_right": None, "attention_chunk": 100},
        {"window_left": 4000, "attention_chunk": 200},
        {"q_layout": "ragged", "kv_layout": "ragged", "lengths_on_device": True},
        {"kv_layout": "paged", "page_size": 16, "lengths_on_device": True},
        {"kv_layout": "paged", "page_size": 64, "lengths_on_device": True},
        {"extras": ("a sink",), "featured": True},
        {"max_seqlen_k": 300, "window_left": 5000},
        {"window_left": None, "max_seqlen_k": 1024},
        {"window_left": None, "window_right": None, "max_seqlen_q": 100, "max_seqlen_k": 1024},
        {"window_left": None, "q_layout": "ragged", "kv_layout": "ragged", "total_k": 2176},
    ],
)
def test_tiles_that_see_few_blocks_are_short(other: dict[str, Any]) -> None:
    assert rows(**other) == (64, 4)


@pytest.mark.parametrize(
    "other",
    [
        {"window_left": 128 * (MOST_BLOCKS[64] - 1) + 1},
        {"window_right": None},
        {"window_left": None, "max_seqlen_k": 1025},
        {"window_left": None, "max_seqlen_k": 300, "lengths_on_device": True},  # as its pages would be
        {"window_left": None, "max_seqlen_k": 300, "kv_layout": "paged", "page_size": 64},
        {
            "window_left": None,
            "q_layout": "ragged",
            "kv_layout": "ragged",
            "total_k": 2177,
        },
        {"window_left": None, "attention_chunk": 4096},
        {"softcap": True, "featured": True, "extras": ("a softcap",)},
        {"kv_layout": "paged", "page_size": 8, "lengths_on_device": True},  # copied row by row
        {
            "kv_layout": "paged",
            "page_size": 8,
            "head_dim": 96,
            "head_dim_v": 96,
        },  # K and V have a producer each
    ],
)
def test_other_tiles_have_two_consumers(other: dict[str, Any]) -> None:
    assert rows(**other) == (128, 1)


@pytest.mark.parametrize("d", [192, 256])
def test_wide_heads_have_no_room_for_several_programs(d: int) -> None:
    plan = make_plan(prefill(d), H200)
    assert (plan.block_m, plan.resident) == (128, 1)


@pytest.mark.parametrize(
    ("window", "keys"),
    [
        ({}, 127 + 128),
        ({"window_right": 5}, 127 + 128 + 5),
        ({"window_left": None}, 8192),
        ({"window_left": None, "attention_chunk": 200}, 199 + 128),
        ({"window_left": None, "window_right": None, "attention_chunk": 200}, 199 + 128 + 199),
        ({"window_left": 50, "attention_chunk": 200}, 50 + 128),
        ({"max_seqlen_q": 40}, 127 + 40),
    ],
)
def test_keys_that_a_tile_sees_at_the_most(window: dict[str, Any], keys: int) -> None:
    assert keys_seen(prefill(64, **window), 128) == keys
