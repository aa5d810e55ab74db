"""What `headfold tune` measures: cases that run in the form they stand for, tiles that run as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headfold.bench.tune_goals import BLOCK_BYTES, DIMS, candidates, goals
from headfold.planner import DEVICES, Device, make_plan
from headfold.planner.tiles import MEASURED
from headfold.planner.tuned import ALIKE, Entry

H200 = DEVICES["h200"]
devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)


@devices
def test_every_tile_of_the_built_in_table_is_a_goal(device: Device) -> None:
    """At every head dimension, once; but for tiles of more than 16 rows at d256, which are not the table's, and on Hopper
    GPUs, where the Gluon kernel has its own."""
    keys = [key for g in goals(device) for key in g.keys]
    assert len(keys) == len(set(keys))
    widest = 0 if device.arch == (9, 0) else 128
    other = ALIKE if device.arch == (9, 0) else ()
    assert set(keys) == {
        (f, n, 2 * d) for f, n in MEASURED for d in DIMS if f not in other and (d <= widest or n == 16)
    }


@devices
def test_every_case_runs_in_the_form_and_rows_that_it_stands_for(device: Device) -> None:
    """An entry for that form and those rows alone changes its plan (rows of a cache and pages have theirs together)."""
    for goal in goals(device):
        for form, case in goal.cases:
            forms = ALIKE if form in ALIKE else (form,)
            tiles = tuple(Entry(f, goal.rows, 2 * goal.d, 32, 8, 3 + 2 * (f == "pages"), 1) for f in forms)
            plan = make_plan(case.problem("cuda"), replace(device, tiles=tiles))
            assert (plan.own_tile, plan.block_m, plan.block_n) == (True, goal.rows, 32), (goal.name, form)
            assert plan.paged == (form == "pages")
            assert case.dtype == "bf16"


def test_cases_of_an_h200_at_d128_are_those_of_the_built_in_table() -> None:
    """As its comments say."""
    shapes = {
        (g.forms[0], g.rows): [(c.heads, c.kv_heads, c.batch, c.sq, c.sk) for _, c in g.cases]
        for g in goals(H200)
        if g.d == 128
    }
    assert shapes == {
        ("wave", 16): [(32, 8, 16, 1, 8192)],
        ("waves", 16): [(32, 8, 32, 1, 4096), (32, 8, 128, 1, 2048)],
        ("few", 16): [(32, 8, 1, 1, 1024)],
    }


def test_other_head_dimensions_move_as_many_bytes_by_as_many_heads() -> None:
    for goal in goals(H200):
        at = next(g for g in goals(H200) if (g.forms, g.rows, g.d) == (goal.forms, goal.rows, 128))
        for (_, case), (_, like) in zip(goal.cases, at.cases, strict=True):
            assert case.kv_bytes == pytest.approx(like.kv_bytes, rel=0.01)
            assert (case.heads, case.kv_heads, case.batch) == (like.heads, like.kv_heads, like.batch)


@devices
def test_candidates_run_as_they_are_and_no_two_alike(device: Device) -> None:
    for goal in goals(device):
        tried = candidates(goal, device)
        launches: set[Any] = set()
        for entries in ((), *tried):
            own = replace(device, tiles=entries)  # refuses rows and pages that would not give the same bits
            plans = [make_plan(case.problem("cuda"), own) for _, case in goal.cases]
            launches.add(tuple(replace(p, resident=1, own_tile=False, reasons=()) for p in plans))
            by_form = {e.form: e for e in entries}
            assert not entries or tuple(by_form) == goal.forms
            for plan, (form, _) in zip(plans, goal.cases, strict=True):
                if entries:
                    e = by_form[form]
                    assert (plan.block_m, plan.block_n, plan.num_warps) == (goal.rows, e.keys, e.warps)
                    assert (plan.num_stages, plan.resident) == (e.stages, e.resident)
                    assert e.resident * plan.shared_memory <= device.smem
        assert len(launches) == 1 + len(tried), goal.name


def test_an_h200_has_enough_to_try_of_everything() -> None:
    """Fewer keys than the built-in tile (more would not fit), other warps, stages and programs a multiprocessor."""
    wave = next(g for g in goals(H200) if g.name == "wave, 16 rows, d128")
    entries = [e for (e,) in candidates(wave, H200)]
    for name, values in (
        ("keys", {32, 64, 128}),
        ("warps", {4, 8}),
        ("stages", {3, 4}),
        ("resident", {1, 2, 3}),
    ):
        assert {getattr(e, name) for e in entries} == values
    assert ("wave", 128, 4, 3, 1) not in {(e.form, e.keys, e.warps, e.stages, e.resident) for e in entries}
    for e in entries:
        assert BLOCK_BYTES[0] <= e.keys * 256 * 2 <= BLOCK_BYTES[1]


def test_pages_get_two_stages_more_than_rows() -> None:
    for goal in goals(DEVICES["a100"], ["pages"]):
        for rows, pages in candidates(goal, DEVICES["a100"]):
            assert (rows.form, pages.form) == ALIKE
            assert pages.stages == rows.stages + 2


@pytest.mark.parametrize(
    ("only", "names"),
    [
        (["few"], {"few"}),
        (["pages"], {"stream+pages"}),
        (["stream"], {"stream+pages"}),
        (["few", "waves"], {"few", "waves"}),
    ],
)
def test_only_some_forms(only: list[str], names: set[str]) -> None:
    """Rows and pages come together, whichever is named."""
    assert {"+".join(g.forms) for g in goals(DEVICES["a100"], only)} == names


@pytest.mark.parametrize("sms", [1, 8, 300])
def test_a_device_without_calls_of_a_form_has_no_goal_for_it(sms: int) -> None:
    """A few multiprocessors are filled by any call. What is left runs in its form."""
    device = replace(H200, sms=sms)
    found = goals(device)
    assert ("few" in {g.forms[0] for g in found}) == (sms > 8)
    for goal in found:
        candidates(goal, device)  # asserts that every case runs in the goal's form


def test_little_shared_memory_leaves_fewer_candidates_and_no_failure() -> None:
    small = replace(H200, smem=48 * 1024)
    for goal in goals(small):
        for entries in candidates(goal, small):
            for e in entries:
                tile = make_plan(goal.cases[0][1].problem("cuda"), replace(small, tiles=entries))
                assert (tile.block_m, tile.block_n) == (goal.rows, e.keys)


def test_names_say_what_is_measured() -> None:
    names = [g.name for g in goals(H200)]
    assert not any(name.startswith("stream") for name in names)  # they run the Gluon kernel
    assert {f"stream+pages, {n} rows, d128" for n in (16, 64)} <= {g.name for g in goals(DEVICES["a100"])}
    assert len(set(names)) == len(names)
    cases = [c.name for g in goals(H200) for _, c in g.cases]
    assert len(set(cases)) == len(cases)
