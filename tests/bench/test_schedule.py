"""The schedule of a decode plan: every key has one owner, no slot runs two programs, and time is the cost model's."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.bench.catalogue import RAGGED_64, catalogue
from headfold.bench.schedule import MOST_PROGRAMS, Schedule, schedule_of
from headfold.planner import DEVICES, Plan, make_plan
from headfold.planner.cost import LAUNCH, predicted_seconds
from headfold.problem import Problem

H200 = DEVICES["h200"]


def decode(
    batch: int = 4, sk: int = 4096, sq: int = 1, splits: int = 3, block_m: int = 16
) -> tuple[Problem, Plan]:
    """32:8 heads, d128; the plan's numbers as given."""
    problem = Problem(
        *("cuda", torch.bfloat16, batch, 32, 8, 128, 128, sq, sk, batch * sq, batch * sk),
        lengths_on_device=True,
    )
    tiles = -(-sq * 4 // block_m)
    plan = Plan(
        *("triton", "decode", 4, block_m, 128, 8, batch * tiles, tiles, splits),
        num_stages=3,
        shared_memory=143 * 1024,
    )
    return problem, plan


def owned(schedule: Schedule) -> dict[tuple[int, int, int], list[tuple[int, int]]]:
    """The key ranges of every (sequence, tile, head unit), empty ones left out, in order."""
    found = defaultdict(list)
    for run in schedule.runs:
        p = run.program
        if p.keys:
            found[p.sequence, p.tile, p.unit].append((p.low, p.high))
    return {key: sorted(ranges) for key, ranges in found.items()}


@given(
    lengths=st.lists(st.integers(0, 4096), min_size=1, max_size=6),
    splits=st.integers(1, 12),
    fixed=st.sampled_from([0, 0, 128, 1000]),
)
def test_every_key_of_every_head_is_read_once(lengths: list[int], splits: int, fixed: int) -> None:
    problem, plan = decode(len(lengths), splits=-(-4096 // fixed) if fixed else splits)
    problem = dataclasses.replace(problem, tokens_per_split=fixed)
    ranges = owned(schedule_of(problem, plan, H200, lengths))
    assert set(ranges) == {(i, 0, u) for i, n in enumerate(lengths) if n for u in range(8)}
    for (i, _, _), parts in ranges.items():
        assert parts[0][0] == 0
        assert parts[-1][1] == lengths[i]
        assert all(a[1] == b[0] for a, b in pairwise(parts))


def test_tiles_and_windows_read_what_their_rows_see() -> None:
    problem, plan = decode(1, sk=1000, sq=8, splits=2, block_m=16)  # two tiles of four queries
    causal = dataclasses.replace(problem, window_right=0)
    ranges = owned(schedule_of(causal, plan, H200, [1000]))
    assert ranges[0, 0, 0][-1][1] == 996
    assert ranges[0, 1, 0][-1][1] == 1000
    window = dataclasses.replace(problem, window_left=99, window_right=0)
    ranges = owned(schedule_of(window, plan, H200, [600]))
    assert (ranges[0, 0, 0][0][0], ranges[0, 0, 0][-1][1]) == (493, 596)
    assert (ranges[0, 1, 0][0][0], ranges[0, 1, 0][-1][1]) == (497, 600)
    chunks = dataclasses.replace(causal, attention_chunk=100)
    assert owned(schedule_of(chunks, plan, H200, [950]))[0, 1, 0][0][0] == 900


@given(st.lists(st.integers(1, 32768), min_size=1, max_size=40))
def test_no_slot_runs_two_programs_and_programs_start_in_launch_order(lengths: list[int]) -> None:
    schedule = schedule_of(*decode(len(lengths), sk=32768, splits=4), H200, lengths)
    assert schedule.slots == H200.sms
    slots = defaultdict(list)
    for run in schedule.runs:
        assert LAUNCH * 1e6 <= run.start_us <= run.full_us <= run.end_us
        slots[run.slot].append(run)
    for runs in slots.values():
        runs.sort(key=lambda r: r.start_us)
        assert all(a.end_us <= b.start_us + 1e-6 for a, b in pairwise(runs))
    starts = [r.start_us for r in schedule.runs]
    assert starts == sorted(starts)
    assert 0 <= schedule.idle < 1
    assert schedule.end_us == pytest.approx(schedule.loop_end_us + schedule.fixup_us)


@pytest.mark.parametrize("shape", [(16, 8192, 1), (1, 131072, 16), (64, 8192, 1), (4, 65536, 4)], ids=str)
def test_equal_lengths_take_the_predicted_time(shape: tuple[int, int, int]) -> None:
    batch, sk, splits = shape
    problem, plan = decode(batch, sk, splits=splits)
    us = schedule_of(problem, plan, H200, [sk] * batch).end_us
    assert us == pytest.approx(predicted_seconds(problem, plan, H200) * 1e6, rel=0.03)


@given(
    lengths=st.lists(st.integers(0, 4096), min_size=2, max_size=6),
    fixed=st.sampled_from([0, 0, 128, 1000]),
    sq=st.sampled_from([1, 3]),
)
def test_a_stream_reads_every_key_of_every_head_once(lengths: list[int], fixed: int, sq: int) -> None:
    """As the planner cuts it; a program's runs follow one another in one slot."""
    problem, _ = decode(len(lengths), sq=sq)
    problem = dataclasses.replace(problem, tokens_per_split=fixed)
    plan = make_plan(problem, H200)
    assert plan.ranges > 0
    schedule = schedule_of(problem, plan, H200, lengths)
    ranges = owned(schedule)
    assert set(ranges) == {(i, 0, u) for i, n in enumerate(lengths) if n for u in range(8)}
    for (i, _, _), parts in ranges.items():
        assert (parts[0][0], parts[-1][1]) == (0, lengths[i])
        assert all(a[1] == b[0] for a, b in pairwise(parts))
    runs = defaultdict(list)
    for run in schedule.runs:
        runs[run.program.number].append(run)
    assert sorted(runs) == list(range(plan.programs))
    for mine in runs.values():
        assert len({run.slot for run in mine}) == 1
        assert all(a.end_us == pytest.approx(b.start_us) for a, b in pairwise(mine))


def test_a_streamed_ragged_batch_idles_little() -> None:
    """343 us on one H200, 1.05 times a read of its bytes, where equal shares of each sequence took 553."""
    problem, _ = decode(64, 32529)
    problem = dataclasses.replace(problem, total_k=sum(RAGGED_64))
    plan = make_plan(problem, H200)
    schedule = schedule_of(problem, plan, H200, RAGGED_64)
    assert schedule.end_us == pytest.approx(343, rel=0.2)
    assert schedule.idle < 0.1
    assert predicted_seconds(problem, plan, H200) * 1e6 == pytest.approx(343, rel=0.2)


def test_a_ragged_batch_takes_what_was_measured() -> None:
    """553 us on one H200: most of the slots idle behind the longest sequences of a rectangular grid."""
    problem, plan = decode(64, 32529, splits=1)
    schedule = schedule_of(problem, plan, H200, RAGGED_64)
    assert schedule.end_us == pytest.approx(553, rel=0.2)
    assert schedule.idle > 0.3
    assert schedule.fixup_us == 0


def test_a_split_has_a_fixup_and_a_program_without_keys_no_time() -> None:
    schedule = schedule_of(*decode(2, splits=4), H200, [4096, 100])
    assert schedule.fixup_us > 0
    empty = [r for r in schedule.runs if not r.program.keys]
    assert len(empty) == 3 * 8, "100 keys are one block: three splits of each head have none"
    assert all(r.start_us == r.end_us for r in empty)


def test_nothing_to_read_is_a_schedule_too() -> None:
    schedule = schedule_of(*decode(2), H200, [0, 0])
    assert schedule.loop_end_us == LAUNCH * 1e6
    assert schedule.idle == 0


def test_what_cannot_be_drawn_says_why() -> None:
    problem, plan = decode()
    with pytest.raises(ValueError, match="this one is of the cpu decode kernel"):
        schedule_of(problem, dataclasses.replace(plan, backend="cpu"), H200, [1] * 4)
    with pytest.raises(ValueError, match="this one is of the triton prefill kernel"):
        schedule_of(problem, dataclasses.replace(plan, kernel="prefill"), H200, [1] * 4)
    for lengths in ([1] * 3, [1, 1, 1, 4097], [1, 1, 1, -1]):
        with pytest.raises(ValueError, match="--lengths has"):
            schedule_of(problem, plan, H200, lengths)
    many = dataclasses.replace(plan, num_splits=MOST_PROGRAMS)
    with pytest.raises(ValueError, match="would draw"):
        schedule_of(problem, many, H200, [1] * 4)


def test_every_decode_case_of_the_catalogue_has_a_schedule() -> None:
    for case in catalogue("cuda", "decode"):
        problem = case.problem("cuda")
        plan = make_plan(problem, H200)
        if plan.kernel == "decode":
            schedule = schedule_of(problem, plan, H200, case.all_lengths)
            keys = sum(r.program.keys for r in schedule.runs)
            assert keys >= sum(case.all_lengths) * case.kv_heads
