"""Shared prefixes in one launch: the Gluon kernel's own source, emulated, and its merge, interpreted, against the reference.

As in test_hopper_decode_emulated: several schedules, which must give the same bits, and races raise.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.problem import check
from tests.cases import assert_accurate
from tests.kernels.emulated_pair import attend
from tests.kernels.test_hopper_emulated import same
from tests.sharing import shared_call


def checked(
    groups: list[tuple[int, int]],
    q_lens: list[int],
    own: list[int],
    sms: int = 8,
    schedules: int = 1,
    **more: Any,
) -> None:
    """`groups` are (sequences, pages of the prefix); `own` are keys past it."""
    values = {"page_size": 16, "heads": 8, "kv_heads": 2, "d": 64, "dv": 64, "dtype": torch.bfloat16}
    values |= {"causal": True} | more
    call = shared_call(groups, q_lens, own, **values)
    x = call.inputs(**call.caches())
    check(x)
    lengths = tuple(pages * values["page_size"] if n > 1 else 0 for n, pages in groups)
    sizes = tuple(n for n, _ in groups)
    first = attend(x, lengths, sizes, 0, sms)
    assert_accurate(x, *first)
    for seed in range(1, schedules):
        assert same(attend(x, lengths, sizes, seed, sms), first)


def test_one_group() -> None:
    checked([(5, 20)], [1] * 5, [3, 40, 300, 1, 170])


@pytest.mark.parametrize(
    ("groups", "own"),
    [
        ([(3, 9), (2, 9)], [3, 90, 16, 1, 150]),
        ([(2, 20), (1, 0), (2, 3)], [40, 333, 5, 1, 17]),
        ([(1, 4), (2, 8)], [64, 1, 200]),
    ],
    ids=["equal groups", "a group of one", "one length is not shared"],
)
def test_groups(groups: list[tuple[int, int]], own: list[int]) -> None:
    checked(groups, [1] * len(own), own)


@pytest.mark.parametrize("own", [[32, 32, 32, 32], [700, 1, 1, 1], [1, 1, 1, 900]], ids=str)
def test_lists_that_are_cut_anywhere(own: list[int]) -> None:
    checked([(4, 24)], [1] * 4, own, sms=13, schedules=2, heads=2, kv_heads=1)


@pytest.mark.parametrize(("queries", "heads"), [(3, 4), (3, 16), (5, 16)])
def test_several_queries(queries: int, heads: int) -> None:
    """Of which each sees what it should: a tile's rows in one consumer's hands, in two, and more tiles than one."""
    checked([(2, 10)], [queries] * 2, [queries, queries + 140], heads=heads, kv_heads=1)


def test_ragged_queries() -> None:
    checked([(3, 10), (2, 4)], [1, 0, 3, 2, 1], [9, 20, 3, 150, 1], ragged_q=True, spare_rows=3)


@pytest.mark.parametrize(
    "more",
    [
        {"d": 128, "dv": 128},
        {"d": 256, "dv": 256, "heads": 4},
        {"page_size": 8},
        {"page_size": 64},
        {"causal": False, "right": None},
        {"causal": False, "right": 2},
        {"scale": 0.0},
        {"heads": 6, "kv_heads": 2},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_each(more: dict[str, Any]) -> None:
    checked([(3, 6)], [1] * 3, [40, 5, 190], **more)
