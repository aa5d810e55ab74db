"""How the programs of a pair are shared out, by the kernel's own code, interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")
import triton
import triton.language as tl

from headfold.kernels.parts.pair import cut_pair
from headfold.kernels.parts.spans import find_row
from tests.conftest import KERNELS


@triton.jit
def cut_kernel(found, programs, own_total, own_lanes, own_weight, total, lanes, weight):  # type: ignore[no-untyped-def]
    ranges, own_ranges = cut_pair(programs, (own_total, own_lanes, own_weight), (total, lanes, weight))
    tl.store(found, ranges)
    tl.store(found + 1, own_ranges)


@triton.jit
def group_kernel(found, bounds, query, groups):  # type: ignore[no-untyped-def]
    group, first = find_row(query, bounds, groups)
    tl.store(found, group)
    tl.store(found + 1, first)


def cut(programs: int, own: tuple[int, int, int], prefix: tuple[int, int, int]) -> tuple[int, int]:
    found = torch.zeros(2, dtype=torch.int32, device=KERNELS.device)
    cut_kernel[(1,)](found, programs, *own, *prefix)
    first, second = found.tolist()
    return first, second


LANES = st.integers(1, 100)
TOTAL, WEIGHT = st.integers(2, 2**29), st.integers(2, 5000)


@settings(max_examples=60)
@given(LANES, LANES, st.integers(0, 200), TOTAL, TOTAL, WEIGHT, WEIGHT)
def test_both_lists_end_together(
    own_lanes: int, lanes: int, more: int, own_total: int, total: int, own_weight: int, weight: int
) -> None:
    """Each has a range at least, both find room, and no other number of ranges would end earlier."""
    programs = own_lanes + lanes + more
    ranges, own_ranges = cut(programs, (own_total, own_lanes, own_weight), (total, lanes, weight))
    assert ranges >= 1
    assert own_ranges >= 1
    assert own_ranges == (programs - ranges * lanes) // own_lanes

    def end(ranges: int) -> float:
        return max(
            total * weight / ranges, own_total * own_weight / ((programs - ranges * lanes) // own_lanes)
        )

    best = min(end(n) for n in range(1, (programs - own_lanes) // lanes + 1))
    assert end(ranges) <= best * (1 + 1e-5)


@pytest.mark.parametrize("bounds", [[0, 5], [0, 1, 4, 4, 9], [0, 3, 3, 3, 10]], ids=str)
def test_a_query_belongs_to_the_group_that_holds_it(bounds: list[int]) -> None:
    table = torch.tensor(bounds, dtype=torch.int32, device=KERNELS.device)
    found = torch.zeros(2, dtype=torch.int32, device=KERNELS.device)
    for query in range(bounds[-1]):
        group_kernel[(1,)](found, table, query, len(bounds) - 1)
        group, first = found.tolist()
        assert first == bounds[group]
        assert bounds[group] <= query < bounds[group + 1]
