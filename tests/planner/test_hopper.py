"""Which calls go to the Gluon kernel, and in what order it works them off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headfold.extras import FAR_CACHE
from headfold.planner import DEVICES, Plan, make_plan
from headfold.planner.hopper import padded_dim, plan_hopper, product_dim
from headfold.problem import Inputs, Problem, problem_of
from tests.planner.problems import problem

H200 = DEVICES["h200"]


def prefill(**other: Any) -> Problem:
    """32:8 d128, 4096 queries on 4096 keys, on a GPU."""
    return problem(32, 8, 1, 4096, 4096, 128, **{"device_type": "cuda", **other})


def reason(p: Problem, device: str = "h200") -> str:
    plan = make_plan(p, DEVICES[device])
    assert plan.backend == "triton"
    return " ".join(plan.reasons)


def test_a_dense_prefill_runs_on_hopper() -> None:
    plan = make_plan(prefill(), H200)
    assert (plan.backend, plan.kernel, plan.fold, plan.block_m, plan.block_n) == (
        "hopper",
        "prefill",
        1,
        128,
        128,
    )
    assert plan.tiles * plan.head_units == 32 * 4096 // 128
    assert plan.workers == H200.sms
    assert "the longest first" in plan.explain(prefill(), H200)


@pytest.mark.parametrize("device", ["a100", "b200", "rtx4090"])
def test_other_gpus_keep_the_triton_kernel(device: str) -> None:
    assert "Hopper" in reason(prefill(), device)


def test_the_interpreter_keeps_the_triton_kernel() -> None:
    """Gluon has none: tensors on the CPU that are planned for an H200 run interpreted Triton code."""
    assert make_plan(prefill(device_type="cpu"), H200).backend == "triton"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"head_dim": 40, "head_dim_v": 40}, "40/40"),
        (
            {"kv_layout": "paged", "page_size": 20, "head_dim": 192},
            "boxes of 8 keys or more would not lie in pages of 20",
        ),
        ({"kv_layout": "paged", "page_size": 16, "tensor_mask": True}, "no masks over pages"),
        ({"aligned": False}, "16-byte"),
        ({"pack_gqa": True}, "pack_gqa=True"),
        (
            {"extras": ("a sink", "ALiBi slopes", "cache_leftpad")},
            "which has no ALiBi slopes and no cache_leftpad",
        ),
        ({"extras": ("a softcap",), "softcap": True, "tensor_mask": True}, "no a softcap beside a mask"),
        (
            {"extras": ("attention chunks",), "attention_chunk": 64, "tensor_mask": True},
            "chunks beside a mask",
        ),
    ],
)
def test_what_it_cannot_do_goes_to_triton_and_the_plan_says_why(other: dict[str, Any], words: str) -> None:
    assert words in reason(prefill(**other))


@pytest.mark.parametrize(
    ("page_size", "d", "left", "rows"),
    [
        (64, 128, None, 64),
        (128, 128, None, 64),  # larger boxes are no faster, and a program each
        (192, 64, None, 64),
        (256, 128, None, 64),
        (32, 128, None, 16),
        (256, 256, None, 64),  # a block of d256 is 64 keys
        *((n, 128, None, n & -n) for n in (8, 16, 24, 48)),
        *((n, 128, None, 1) for n in (1, 2, 4, 12, 20, 100)),
        (8, 192, None, 8),  # rows of head dimensions in two parts are not copied
        (256, 128, 100, 16),  # under a left window blocks begin at multiples of 16 keys
        (8, 256, 100, 1),
        (4, 256, 100, 1),
    ],
)
def test_pages_come_in_boxes_that_lie_in_one_or_row_by_row(
    page_size: int, d: int, left: int | None, rows: int
) -> None:
    paged = {"kv_layout": "paged", "page_size": page_size, "lengths_on_device": True, "window_left": left}
    plan = make_plan(prefill(head_dim=d, head_dim_v=d, **paged), H200)
    assert (plan.backend, plan.paged, plan.page_rows) == ("hopper", True, rows)
    assert plan.block_n % rows == page_size % rows == 0
    words = f"boxes of {rows}, each from one page of" if rows > 1 else "row by row from pages of"
    assert f"{words} {page_size}" in plan.reasons[-1]
    assert any("through the copy engine" in reason for reason in plan.reasons) == (rows > 1)


@pytest.mark.parametrize(
    ("other", "left_edge", "softcap"),
    [
        ({"extras": ("a sink",)}, False, False),
        ({"extras": ("a sink",), "tensor_mask": True}, False, False),
        ({"extras": ("a sink",), "window_left": 127, "window_right": 0}, True, False),
        ({"extras": ("attention chunks",), "attention_chunk": 8192}, True, False),
        ({"extras": ("a softcap",), "softcap": True, "window_right": 0}, True, True),
        (
            {"extras": ("a sink", "a softcap", "attention chunks"), "softcap": True, "attention_chunk": 100},
            True,
            True,
        ),
    ],
)
def test_sinks_softcap_and_chunks_run_on_hopper(
    other: dict[str, Any], left_edge: bool, softcap: bool
) -> None:
    plan = make_plan(prefill(featured=True, **other), H200)
    assert (plan.backend, plan.left_edge, plan.softcap) == ("hopper", left_edge, softcap)


def test_rows_that_32_bits_do_not_reach() -> None:
    """Copied, they have a program of their own, but none that caps scores; boxes come from anywhere."""
    far = {"kv_layout": "paged", "lengths_on_device": True, "extras": (FAR_CACHE,)}
    assert make_plan(prefill(page_size=1, **far), H200).far
    assert not make_plan(prefill(page_size=16, **far), H200).far
    assert "more than 32 GiB" in reason(prefill(page_size=1, softcap=True, **far))
    assert make_plan(prefill(page_size=16, softcap=True, **far), H200).backend == "hopper"
    x = inputs(seqused_k=torch.zeros(1, dtype=torch.int32), page_table=torch.zeros(1, 4, dtype=torch.int32))
    for pages, words in ((2**21, ()), (2**21 + 1, (FAR_CACHE,))):
        x.k = x.v = torch.empty(pages, 16, 2, 256, dtype=torch.bfloat16, device="meta")
        assert problem_of(x).extras == words


def test_programs_with_a_left_edge_have_its_tiles() -> None:
    """What a left window asks of blocks, boxes and consumers, softcap and chunks ask too."""
    for other in ({"window_left": 100}, {"softcap": True}, {"attention_chunk": 4096}):
        assert plan_tile(small(8192, 8192, **other)) == (128, 128, 0)
        assert plan_tile(prefill(head_dim=192, **other)) == (128, 64, 0)
        assert plan_tile(prefill(kv_layout="paged", page_size=64, lengths_on_device=True, **other)) == (
            128,
            128,
            16,
        )


def plan_tile(p: Problem) -> tuple[int, int, int]:
    plan = make_plan(p, H200)
    assert plan.backend == "hopper"
    return plan.block_m, plan.block_n, plan.page_rows


def test_short_queries_of_a_group_are_folded_by_the_triton_kernel() -> None:
    """20 positions of 8 heads fill 160 rows folded, and 8 tiles of 128 rows head by head."""
    p = problem(64, 8, 32, 20, 8192, 128, device_type="cuda")
    assert "tiles of one head" in reason(p)


@pytest.mark.parametrize(
    ("d", "whole", "products"),
    [
        (40, 0, 0),
        (48, 64, 64),
        (64, 64, 64),
        (72, 0, 80),
        (80, 0, 80),
        (88, 0, 96),
        (96, 128, 96),
        (104, 128, 128),
        (128, 128, 128),
        (136, 0, 160),
        (168, 0, 192),
        (192, 256, 192),
        (256, 256, 256),
    ],
)
def test_a_quarter_of_the_columns_is_padding_at_most(d: int, whole: int, products: int) -> None:
    assert (padded_dim(d), product_dim(d)) == (whole, products)


@pytest.mark.parametrize(
    ("d", "dv", "length", "parts", "keys"),
    [
        (96, 96, 1024, ((64, 32), (128, 0)), 128),  # two consumers: padded values are faster
        (96, 96, 4096, ((64, 32), (64, 32)), 128),
        (72, 80, 4096, ((64, 16), (64, 16)), 128),
        (192, 128, 4096, ((128, 64), (128, 0)), 128),
        (192, 192, 4096, ((128, 64), (128, 64)), 64),
        (160, 96, 4096, ((128, 32), (128, 0)), 128),
        (256, 136, 4096, ((256, 0), (128, 32)), 64),
    ],
)
def test_products_are_over_the_columns_there_are(
    d: int, dv: int, length: int, parts: tuple[tuple[int, int], tuple[int, int]], keys: int
) -> None:
    p = problem(32, 32, 4, length, length, d, head_dim_v=dv, device_type="cuda")
    plan = make_plan(p, H200)
    assert (plan.backend, (plan.d_parts, plan.dv_parts), plan.block_n) == ("hopper", parts, keys)
    assert plan.shared_memory <= H200.smem
    assert f"head dimensions {d}/{dv} run in" in plan.explain(p, H200)


def test_masks_are_for_tiles_in_one_part() -> None:
    plan = make_plan(prefill(head_dim=96, head_dim_v=96, tensor_mask=True), H200)
    assert (plan.backend, plan.d_parts, plan.dv_parts) == ("hopper", (128, 0), (128, 0))
    assert "head dimensions 96/96 run in 128 and 128 columns" in plan.reasons
    assert "80/80" in reason(prefill(head_dim=80, head_dim_v=80, tensor_mask=True))


def test_a_ragged_batch_is_laid_out_at_its_bound() -> None:
    ragged = {"q_layout": "ragged", "kv_layout": "ragged", "total_q": 9000, "lengths_on_device": True}
    p = problem(32, 8, 8, 4096, 4096, 128, **{"device_type": "cuda", **ragged})
    plan = make_plan(p, H200)
    assert plan.backend == "hopper"
    assert plan.tiles == 8 * 32


def test_programs_and_sections_are_bounded_by_what_there_is() -> None:
    small = plan_hopper(problem(4, 1, 1, 130, 130, 128, device_type="cuda"), H200, triton_rows=2**31)
    assert isinstance(small, Plan)
    assert (small.workers, small.section) == (8, 4)
    long = plan_hopper(prefill(max_seqlen_k=1 << 20, sm_margin=32), H200, triton_rows=2**31)
    assert isinstance(long, Plan)
    assert (long.workers, long.section) == (100, 4)  # never less than a group: it shares K and V


def test_heads_are_in_flight_together_under_a_causal_mask_of_many_tiles() -> None:
    """Their K and V would fill the L2 cache many times; a short head, or one whose tiles are all alike, has sections."""

    def section(length: int, **options: Any) -> int:
        p = problem(16, 16, 8, length, length, 128, device_type="cuda", **options)
        plan = plan_hopper(p, H200, triton_rows=2**31)
        assert isinstance(plan, Plan)
        return plan.section

    assert section(2048, window_right=0) == section(16384, window_right=0) == 8 * 16
    fitting = int(H200.l2 / 3) // (16384 * 256 * 2)
    assert section(16384) == section(16384, window_right=0, window_left=100) == max(1, fitting)
    assert section(16384, window_right=0, lengths_on_device=True) == max(1, fitting)
    assert section(1920, window_right=0) == int(H200.l2 / 3) // (1920 * 256 * 2)


@pytest.mark.parametrize("mask", [False, True])
def test_shared_memory_fits(mask: bool) -> None:
    plan = make_plan(prefill(tensor_mask=mask), H200)
    assert plan.backend == "hopper"
    assert plan.shared_memory <= H200.smem


def inputs(**other: Any) -> Inputs:
    q = torch.empty(1, 300, 8, 128, dtype=torch.bfloat16)
    k = torch.empty(1, 300, 2, 128, dtype=torch.bfloat16)
    return Inputs(q, k, torch.empty_like(k), **other)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.empty(1, 8, 300, 304, dtype=torch.bfloat16)[..., :300], ()),
        (torch.empty(1, 1, 300, 304, dtype=torch.float16)[..., :300].expand(1, 8, 300, 300), ()),
        (torch.empty(1, 8, 300, 304, dtype=torch.bool)[..., :300], ()),
        (torch.empty(1, 8, 300, 300), ("a float32 mask",)),
        (torch.empty(1, 8, 300, 300, dtype=torch.bfloat16), ("a mask without rows of 16-byte multiples",)),
        (
            torch.empty(1, 8, 1, 304, dtype=torch.bool)[..., :300].expand(1, 8, 300, 300),
            ("a mask without rows of 16-byte multiples",),
        ),
    ],
)
def test_masks_that_the_copy_engine_can_fetch(mask: torch.Tensor, words: tuple[str, ...]) -> None:
    assert problem_of(inputs(mask=mask)).extras == words


def test_extras_name_what_a_call_asks_beyond() -> None:
    x = inputs(sink=torch.zeros(8), softcap=3.0, softmax_scale=-0.1)
    assert problem_of(x).extras == ("a sink", "a softcap", "a negative softmax scale")
    x = inputs(mask=torch.empty(1, 8, 300, 304, dtype=torch.bool)[..., :300], window_left=3)
    assert problem_of(x).extras == ("a mask within a left window",)
    x = inputs()
    x.k = x.k[:, :, :1].expand(1, 300, 2, 128)
    assert problem_of(x).extras == ("an expanded tensor",)
    x = inputs(seqused_k=torch.zeros(1, dtype=torch.int32), page_table=torch.zeros(1, 4, dtype=torch.int32))
    x.k = x.v = torch.empty(0, 16, 2, 128, dtype=torch.bfloat16)  # a descriptor needs a size of 1 at least
    assert problem_of(x).extras == ("cache without a page",)


def small(sq: int, sk: int, **other: Any) -> Problem:
    """32 heads of dimension 64."""
    return problem(32, 32, other.pop("batch", 4), sq, sk, 64, **{"device_type": "cuda", **other})


@pytest.mark.parametrize(
    ("p", "rows"),
    [
        (small(4096, 4096), 192),
        (small(2048, 2048), 192),
        (small(1280, 1280), 128),  # few blocks a tile
        (small(4096, 4096, window_right=0), 192),
        (small(2048, 2048, window_right=0), 128),
        (small(8192, 1280), 128),
        (small(2112, 2112, batch=1), 192),  # 352 tiles in 3 rounds of 132, or 544 in 5
        (small(2048, 2048, batch=1), 128),  # 352 tiles in 3 rounds, or 512 in 4 that hold fewer rows
        (small(8192, 8192, window_left=4096, window_right=0), 128),
        (small(8192, 8192, kv_layout="paged", page_size=64), 192),
        (small(8192, 8192, kv_layout="paged", page_size=8), 192),
        (small(8192, 8192, kv_layout="paged", page_size=1), 128),  # rows are copied
        (small(8192, 8192, q_layout="ragged"), 192),
        (small(8192, 8192, q_layout="ragged", total_q=4 * 4096, window_right=0), 192),
        (small(8192, 8192, q_layout="ragged", total_q=4 * 4095, window_right=0), 128),  # on average
        (small(8192, 8192, kv_layout="ragged", total_k=4 * 4095, window_right=0), 128),
        (small(8192, 8192, kv_layout="ragged", total_k=4 * 4096, window_right=0), 192),
        (small(8192, 8192, lengths_on_device=True), 192),
        (small(8192, 8192, tensor_mask=True), 128),
        (problem(24, 24, 4, 4096, 4096, 96, device_type="cuda"), 192),
        (problem(24, 24, 4, 4096, 4096, 80, device_type="cuda"), 192),
        (problem(24, 24, 4, 1024, 1024, 96, device_type="cuda"), 128),
        (problem(24, 24, 4, 2048, 2048, 96, device_type="cuda", window_right=0), 128),
        (problem(24, 24, 4, 4096, 4096, 96, device_type="cuda", window_right=0), 192),
        (problem(32, 8, 4, 8192, 8192, 128, device_type="cuda"), 128),
    ],
)
def test_three_consumers_where_tiles_see_many_blocks(p: Problem, rows: int) -> None:
    plan = plan_hopper(p, H200, triton_rows=2**31)
    assert isinstance(plan, Plan)
    assert plan.block_m == rows
    assert plan.tiles_per_sequence == -(-p.max_seqlen_q // rows)
    assert plan.num_warps == (12 if rows == 128 else 16)
