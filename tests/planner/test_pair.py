"""Plans of a prefix and what follows it in one launch: what has one, and how its programs are shared out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from headfold.planner import DEVICES
from headfold.planner.pair import PairPlan, plan_pair
from headfold.problem import Problem
from tests.planner.problems import problem

H200 = DEVICES["h200"]


def paged(**more: object) -> Problem:
    values = {"device_type": "cuda", "batch": 64, "sk": 8704, "kv_layout": "paged", "page_size": 16}
    return problem(**{**values, "lengths_on_device": True, **more})


def plan(p: Problem, sizes: tuple[int, ...] = (64,), sms: int = 132) -> PairPlan | None:
    return plan_pair(p, dataclasses.replace(H200, sms=sms), sizes)


def test_a_plain_step_has_one() -> None:
    found = plan(paged())
    assert found is not None
    assert (found.programs, found.whole.resident, found.own.lanes, found.prefix.lanes) == (264, 2, 8, 32)
    assert (found.own.state_rows, found.prefix.state_rows) == (4, 64)


@pytest.mark.parametrize(
    "more",
    [
        {"device_type": "cpu"},
        {"dtype": torch.float32},
        {"page_size": 4},
        {"num_splits": 2},
        {"pack_gqa": False},
        {"tokens_per_split": 64},
        {"extras": ("a sink",)},
        {"aligned": False},
        {"kv_layout": "dense", "page_size": 0},
    ],
    ids=str,
)
def test_what_has_none(more: dict[str, object]) -> None:
    assert plan(paged(**more)) is None


def test_other_gpus_have_none() -> None:
    assert plan_pair(paged(), DEVICES["a100"], (64,)) is None


def test_each_list_needs_a_range() -> None:
    """Of as many programs as it has lanes."""
    assert plan(paged(), sms=20) is not None
    assert plan(paged(), sms=19) is None


@given(st.integers(1, 70), st.integers(1, 8), st.integers(1, 3), st.sampled_from([64, 96, 128, 256]))
def test_any_plan_fits_the_device(batch: int, queries: int, groups: int, d: int) -> None:
    """What a multiprocessor holds, and states for every way in which the lists may be cut."""
    sizes = (batch, *range(1, groups))
    p = paged(batch=sum(sizes), sq=queries, d=d)
    found = plan(p, sizes)
    if found is None:
        return
    whole = found.whole
    assert whole.resident * (whole.shared_memory + 1024) <= 228 << 10
    assert whole.num_stages >= 2
    for part, other, count in (
        (found.own, found.prefix, p.batch),
        (found.prefix, found.own, len(sizes)),
    ):
        assert part.weight >= 1
        assert part.tiles == count * part.lanes // whole.head_units
        most = (found.programs - other.lanes) // part.lanes
        assert part.uncut == 2 * most
        assert part.rows == (2 * most + count) * part.lanes * part.state_rows
