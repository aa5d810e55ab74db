"""Which decodes go to the Gluon kernel, and in which tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headfold.extras import FAR_CACHE
from headfold.kernels.hopper import spans
from headfold.kernels.hopper.layouts import GROUP_ROWS
from headfold.planner import DEVICES, hopper, hopper_decode, make_plan
from headfold.problem import Problem
from tests.planner.problems import problem

H200 = DEVICES["h200"]


def decode(sq: int = 8, **other: Any) -> Problem:
    """32:8 d128, 8 queries on 8192 keys of 16 sequences, on a GPU: 32 folded rows."""
    return problem(32, 8, 16, sq, 8192, 128, **{"device_type": "cuda", **other})


@pytest.mark.parametrize(("sq", "rows"), [(1, 0), (4, 0), (5, 32), (8, 32), (9, 64), (16, 64)])
def test_more_than_16_folded_rows_go_to_the_gluon_kernel(sq: int, rows: int) -> None:
    """Up to 32 are columns of its products."""
    plan = make_plan(decode(sq), H200)
    assert (plan.backend, plan.kernel) == ("hopper" if rows else "triton", "decode")
    if rows:
        assert (plan.block_m, plan.block_n, plan.num_warps, plan.num_stages) == (rows, 128, 8, 3)


@pytest.mark.parametrize("device", ["a100", "b200", "rtx4090"])
def test_other_gpus_keep_the_triton_kernel(device: str) -> None:
    plan = make_plan(decode(), DEVICES[device])
    assert plan.backend == "triton"
    assert "Gluon" not in " ".join(plan.reasons)


def test_the_interpreter_keeps_the_triton_kernel() -> None:
    assert make_plan(decode(device_type="cpu"), H200).backend == "triton"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"head_dim": 80, "head_dim_v": 80}, "80/80"),
        (
            {"kv_layout": "paged", "page_size": 20, "extras": (FAR_CACHE,)},
            "copies no rows from more than 32 GiB",
        ),
        ({"tensor_mask": True, "featured": True}, "whose decode has no masks"),
        ({"aligned": False}, "16-byte"),
        ({"extras": ("a sink", "cache_leftpad")}, "no a sink and no cache_leftpad"),
    ],
)
def test_what_it_cannot_do_goes_to_triton_and_the_plan_says_why(other: dict[str, Any], words: str) -> None:
    plan = make_plan(decode(**other), H200)
    assert (plan.backend, plan.kernel) == ("triton", "decode")
    assert words in " ".join(plan.reasons)


def test_two_consumers_copy_no_rows() -> None:
    p = problem(
        32, 8, 1, 64, 8192, 128, device_type="cuda", q_layout="ragged", kv_layout="paged", page_size=20,
        lengths_on_device=True,
    )  # fmt: skip
    plan = make_plan(p, H200)
    assert plan.backend == "triton"
    assert "boxes of 8 keys or more would not lie in pages of 20" in " ".join(plan.reasons)


@pytest.mark.parametrize(
    ("d", "page_size", "box"),
    [
        (128, 0, 0),
        (128, 1, 1),
        (128, 12, 1),
        (128, 16, 1),
        (128, 32, 32),
        (128, 256, 64),
        (64, 32, 1),
        (64, 64, 64),
    ],
)
def test_many_sequences_of_few_rows_run_two_programs_a_multiprocessor(
    d: int, page_size: int, box: int
) -> None:
    """In blocks of 32 KB of K and V, and rows as pages: the same bits. Small boxes are copied row by row."""
    p = replace(few_rows(d, page_size), batch=33, total_q=33, total_k=33 * 8192)
    plan = make_plan(p, H200)
    assert (plan.backend, plan.kernel, plan.block_m, plan.resident) == ("hopper", "decode", 16, 2)
    assert (plan.block_n, plan.num_stages, plan.ranges) == (128 * 64 // d, 3, 33)
    assert plan.page_rows == box
    assert plan.shared_memory <= H200.smem // 2
    assert make_plan(replace(p, featured=True, extras=("a sink",)), H200).backend == "triton"
    assert make_plan(replace(p, num_splits=2), H200).backend == "triton"


@pytest.mark.parametrize(
    ("d", "page_size", "box"),
    [
        (128, 0, 0),
        (128, 1, 1),
        (128, 16, 1),
        (128, 32, 1),
        (128, 256, 1),
        (256, 16, 1),
        (64, 8, 1),
        (64, 16, 16),
        (64, 32, 32),
    ],
)
def test_up_to_two_sequences_a_range_have_one_program_a_multiprocessor(
    d: int, page_size: int, box: int
) -> None:
    """Pages are copied row by row, but boxes of short rows."""
    p = few_rows(d, page_size)
    plan = make_plan(p, H200)
    keys, stages = {64: (128, 6), 128: (128, 3), 256: (64, 3)}[d]
    assert (plan.backend, plan.block_m, plan.block_n, plan.resident) == ("hopper", 16, keys, 1)
    assert (plan.num_stages, plan.ranges, plan.even_ranges) == (stages, 16, 16)
    assert plan.page_rows == box
    assert make_plan(replace(p, batch=32, total_q=32), H200).resident == 1
    assert make_plan(replace(p, sm_margin=12), H200).ranges == 15
    assert make_plan(replace(p, num_kv_heads=1), H200).resident == 1


@pytest.mark.parametrize("page_size", [0, 1, 16, 64])
def test_one_sequence_whose_length_the_device_knows_is_cut_into_equal_splits(page_size: int) -> None:
    p = replace(few_rows(128, page_size), batch=1, total_q=1, total_k=8192)
    plan = make_plan(p, H200)
    assert (plan.backend, plan.block_m, plan.resident) == ("hopper", 16, 1)
    assert (plan.ranges, plan.num_splits) == (0, 16)
    assert "there is one sequence" in " ".join(plan.reasons)


def few_rows(d: int, page_size: int) -> Problem:
    """16 sequences of 4 folded rows, whose lengths the device knows."""
    pages: dict[str, Any] = {"kv_layout": "paged", "page_size": page_size} if page_size else {}
    return decode(1, head_dim=d, head_dim_v=d, lengths_on_device=True, **pages)


def test_fixed_splits_keep_their_kernel() -> None:
    """Their bits must not depend on how many queries there are."""
    plan = make_plan(problem(32, 1, 4, 8, 8192, 128, device_type="cuda", tokens_per_split=4096), H200)
    assert plan.backend == "triton"
    assert "no fixed splits" in " ".join(plan.reasons)


def test_rows_and_pages_are_cut_alike() -> None:
    """Same tiles, ranges and states: a paged cache has the bits of one in rows."""
    rows = make_plan(decode(lengths_on_device=True), H200)
    for size in (8, 16, 64, 256):
        pages = make_plan(decode(lengths_on_device=True, kv_layout="paged", page_size=size), H200)
        assert pages.page_rows == min(size, 128)
        one, other = (replace(p, paged=False, page_rows=0, reasons=()) for p in (rows, pages))
        assert one == other


def test_boxes_under_a_left_window_begin_at_multiples_of_16_keys() -> None:
    p = decode(kv_layout="paged", page_size=64, window_left=100, window_right=0)
    assert make_plan(p, H200).page_rows == hopper.EDGE == spans.EDGE.value


def test_a_shared_prefix_is_taken_by_two_consumers() -> None:
    """One sequence of 64 queries on 8192 keys: 256 folded rows, in tiles too few to leave its keys whole."""
    p = problem(
        32, 8, 1, 64, 8192, 128, device_type="cuda", q_layout="ragged", kv_layout="paged", page_size=16,
        lengths_on_device=True,
    )  # fmt: skip
    plan = make_plan(p, H200)
    assert (plan.backend, plan.block_m, plan.num_warps, plan.num_splits) == ("hopper", 128, 12, 8)
    assert "2 warpgroups compute" in plan.explain(p, H200)


@pytest.mark.parametrize(
    ("d", "dv", "keys", "stages"),
    [(64, 64, 128, 6), (128, 128, 128, 3), (192, 128, 64, 4), (256, 256, 64, 3)],
)
def test_as_many_stages_as_shared_memory_holds(d: int, dv: int, keys: int, stages: int) -> None:
    plan = make_plan(decode(head_dim=d, head_dim_v=dv), H200)
    assert (plan.block_n, plan.num_stages) == (keys, stages)
    assert plan.shared_memory <= H200.smem
    one = problem(32, 8, 1, 64, 8192, d, head_dim_v=dv, device_type="cuda")
    wide = make_plan(one, H200)
    assert (wide.block_m, wide.backend) == (128 if keys == 128 else 64, "hopper")
    assert wide.shared_memory <= H200.smem


def test_planner_and_kernel_agree_on_a_consumers_rows() -> None:
    assert GROUP_ROWS.value == hopper_decode.CONSUMER_ROWS
