"""How pages come into shared memory: which boxes a plan's K and V are fetched in."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from headfold.backends.hopper import cache_boxes
from headfold.planner.plan import Plan

PAGES, HEADS = 4, 2


def shapes(kernel: str, page_rows: int, page_size: int, d: int) -> tuple[list[int], int]:
    """(shape of a box of K, groups of 8 rows from one page to the next)."""
    pages = torch.empty(PAGES, page_size, HEADS, d, dtype=torch.bfloat16).transpose(1, 2)
    plan = Plan(
        backend="hopper",
        kernel=kernel,
        fold=1,
        block_m=128,
        block_n=128 if d <= 128 else 64,
        d_parts=(d, 0),
        dv_parts=(d, 0),
        paged=True,
        page_rows=page_rows,
    )
    k, v, k_groups, v_groups = cache_boxes(plan, pages, pages)
    assert k is not None
    assert v is not None
    assert (list(v.block_shape), v_groups) == (list(k.block_shape), k_groups)
    return list(k.block_shape), k_groups


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("page_rows", [8, 16])
def test_small_boxes_bring_whole_rows(page_rows: int, d: int) -> None:
    for kernel in ("prefill", "decode"):
        assert shapes(kernel, page_rows, 32, d) == ([1, page_rows // 8, d // 64, 8, 64], 4)


@pytest.mark.parametrize("page_size", [64, 256])
def test_large_boxes_bring_whole_rows_to_decodes_and_to_wide_heads_alone(page_size: int) -> None:
    groups = page_size // 8
    assert shapes("prefill", 64, page_size, 128) == ([1, 1, 64, 64], 0)
    assert shapes("prefill", 64, page_size, 64) == ([1, 1, 64, 64], 0)
    assert shapes("prefill", 64, page_size, 256) == ([1, 8, 4, 8, 64], groups)
    assert shapes("decode", 64, page_size, 128) == ([1, 8, 2, 8, 64], groups)


def test_rows_of_no_pages_come_as_blocks() -> None:
    rows = torch.empty(2, 300, HEADS, 128, dtype=torch.bfloat16).transpose(1, 2)
    plan = Plan(
        backend="hopper",
        kernel="prefill",
        fold=1,
        block_m=128,
        block_n=128,
        d_parts=(128, 0),
        dv_parts=(128, 0),
    )
    k, v, *groups = cache_boxes(plan, rows, rows)
    assert k is not None
    assert v is not None
    assert list(k.block_shape) == list(v.block_shape) == [1, 1, 128, 128]
    assert groups == [0, 0]
    copied = dataclasses.replace(plan, paged=True, page_rows=1)
    assert cache_boxes(copied, rows, rows) == (None, None, 0, 0)
