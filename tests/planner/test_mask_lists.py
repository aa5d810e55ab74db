"""Lists of the blocks that a mask leaves alive: which calls have them, how many, and their room."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from headfold.planner import DEVICES, make_plan
from headfold.problem import problem_of
from tests.cases import make
from tests.planner.problems import GPUS, problem

H200 = DEVICES["h200"]


def masked(sizes: tuple[int, int, int, int], sq: int = 4096, **other: Any) -> Any:
    """A prefill of 2 sequences of 32:8 heads and 5000 keys, under a mask of those sizes, left to the Triton kernel."""
    features = {"featured": True, "tensor_mask": True, "mask_sizes": sizes, "extras": ("an extra",)}
    return problem(batch=2, sq=sq, sk=5000, **{**features, **other})


@pytest.mark.parametrize("device", GPUS, ids=list(DEVICES))
@pytest.mark.parametrize(
    ("sizes", "other", "lists"),
    [
        ((2, 32, 4096, 5000), {}, (2, 8, 256)),
        ((1, 32, 4096, 5000), {}, (1, 8, 256)),
        ((2, 1, 4096, 5000), {}, (2, 1, 256)),
        ((1, 1, 4096, 5000), {}, (1, 1, 256)),
        ((2, 1, 1, 5000), {}, (2, 1, 1)),
        ((2, 32, 1, 5000), {}, (2, 8, 1)),
        ((2, 1, 1, 5000), {"window_right": 0}, (2, 1, 256)),
        ((2, 1, 1, 5000), {"attention_chunk": 300}, (2, 1, 256)),
        ((2, 32, 4096, 5000), {"pack_gqa": False}, (2, 32, 64)),
    ],
)
def test_lists_are_as_many_as_differ(sizes: Any, other: Any, lists: Any, device: Any) -> None:
    """4096 queries of 4 heads are 256 tiles of 64 rows. Each list has room for all blocks of the mask."""
    p = masked(sizes, **other)
    plan = make_plan(p, device)
    assert (plan.kernel, plan.block_m, plan.fold) == (
        "prefill",
        64,
        1 if other.get("pack_gqa") is False else 4,
    )
    assert plan.mask_lists == lists
    assert (plan.mask_list_blocks - 1) * plan.block_n < 5000 <= plan.mask_list_blocks * plan.block_n
    assert plan.mask_list_bytes == 4 * math.prod(lists) * (plan.mask_list_blocks + 1)
    count = math.prod(lists)
    words = f"{count} list{'s' if count > 1 else ''} of up to {plan.mask_list_blocks} in"
    assert words in plan.explain(p, device)


def test_groups_larger_than_a_tile_share_no_list_of_their_heads() -> None:
    """The tiles of 256 heads hold some of them each; a mask that all heads share serves all tiles."""
    for heads, lists in ((256, (1, 1, 256 // 64 * 10)), (1, (1, 1, 1))):
        p = masked((1, heads, 1, 5000), sq=10, heads=256, kv_heads=1, num_splits=1)
        assert make_plan(p, H200).mask_lists == lists


@pytest.mark.parametrize("device", GPUS, ids=list(DEVICES))
def test_nothing_else_has_lists(device: Any) -> None:
    """Decodes, trees, calls without a mask, and the Gluon kernel, which looks at the blocks itself."""
    for p in (
        masked((2, 32, 1, 5000), sq=1),
        masked((2, 32, 4096, 5000), sq=8, num_splits=3),
        masked((0, 0, 0, 0)),
        problem(batch=2, sq=4096, sk=5000),
    ):
        plan = make_plan(p, device)
        assert (plan.mask_lists, plan.mask_list_blocks, plan.mask_list_bytes) == ((0, 0, 0), 0, 0)
        assert "blocks that the mask hides" not in plan.explain(p, device)
    plan = make_plan(masked((2, 32, 4096, 5000), extras=()), H200)
    assert (plan.backend, plan.mask_list_bytes) == ("hopper", 0)


def test_sizes_of_a_mask_are_those_that_differ() -> None:
    """Expanded dimensions count once, but sequences of different lengths always."""
    x = make([70] * 2, [90] * 2, heads=6, slack=0)
    assert problem_of(x).mask_sizes == (0, 0, 0, 0)
    for shape in ((2, 6, 70, 90), (1, 6, 70, 90), (2, 1, 1, 90), (1, 1, 70, 90)):
        mask = torch.ones(shape, dtype=torch.bool).expand(2, 6, 70, 90)
        assert problem_of(replace(x, mask=mask)).mask_sizes == shape
        used = torch.tensor([70, 60], dtype=torch.int32)
        for name in ("seqused_q", "seqused_k", "cache_leftpad"):
            sizes = problem_of(replace(x, mask=mask, **{name: used})).mask_sizes
            assert sizes == (2, *shape[1:])
