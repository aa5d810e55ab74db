"""Plans as values: frozen, cached, pure, and able to say why."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.planner import DEVICES, Device, Plan, device_named, make_plan
from headfold.planner.plan import bytes_to_move, flops_of
from tests.planner.problems import GPUS, problem, problems

CPU = device_named("cpu")
ALL = (*GPUS, CPU)
all_devices = pytest.mark.parametrize("device", ALL, ids=(*DEVICES, "cpu"))

GLM = problem(96, 8, 4, sk=65536)
PROMPT = problem(batch=2, sq=4096, sk=4096, window_right=0)
WINDOW = problem(sq=4, sk=32768, window_left=4095, window_right=0, kv_layout="paged", page_size=16)
RAGGED = problem(
    24,
    8,
    5,
    sq=900,
    sk=1000,
    d=192,
    head_dim_v=128,
    total_q=1000,
    total_k=2000,
    q_layout="ragged",
    kv_layout="ragged",
)
SHAPES = {"GLM decode": GLM, "prompt": PROMPT, "window": WINDOW, "ragged": RAGGED}


def numbers(pattern: str, text: str) -> list[float]:
    """The numbers in the groups of the one place where `pattern` matches."""
    found = re.findall(pattern, text)
    assert len(found) == 1, (pattern, text)
    groups = found[0] if isinstance(found[0], tuple) else (found[0],)
    return [float(n.replace(",", "")) for n in groups]


# ---- a value


def test_a_plan_is_frozen_and_a_key() -> None:
    """Callers share cached plans: nobody may change one."""
    plan = make_plan(GLM, DEVICES["h200"])
    for field in fields(Plan):
        with pytest.raises(FrozenInstanceError):
            setattr(plan, field.name, None)
    assert len({plan, replace(plan)}) == 1
    assert replace(plan, num_splits=5) != plan


@given(problems(), st.sampled_from(ALL))
def test_plans_are_pure_and_cached(p: Any, device: Device) -> None:
    """The same question gives the same object; without the cache, an equal one."""
    plan = make_plan(p, device)
    assert make_plan(replace(p), replace(device)) is plan
    assert make_plan.__wrapped__(p, device) == plan
    assert hash(plan) == hash(make_plan.__wrapped__(p, device))


@given(problems(), st.sampled_from(ALL))
def test_any_problem_gets_a_plan_of_its_backend(p: Any, device: Device) -> None:
    """With positive launch numbers, and explained without failing."""
    plan = make_plan(p, device)
    if device.is_cpu:
        assert plan.backend == "cpu"
    elif plan.backend == "hopper":
        assert device.arch == (9, 0)
        assert plan.kernel == "prefill" or plan.block_m in (64, 128)
    else:
        assert plan.backend == "triton"
    assert (plan.kernel == "none") == p.is_empty
    assert plan.explain(p, device)
    if plan.kernel == "none":
        assert plan.programs == plan.rows_paid == plan.workspace == 0
        return
    assert min(plan.fold, plan.block_m, plan.head_units, plan.tiles, plan.num_splits) >= 1
    if p.num_splits:
        assert plan.num_splits == p.num_splits
    if not device.is_cpu:
        assert plan.block_n >= 16
        assert plan.head_units * plan.fold == p.num_heads
        assert plan.programs < 2**31
        assert plan.shared_memory > 0


@pytest.mark.parametrize(
    "empty",
    [{"batch": 0}, {"sq": 0}, {"sk": 0}, {"total_q": 0}, {"total_k": 0}, {"batch": 0, "sq": 0, "sk": 0}],
    ids=str,
)
@all_devices
def test_empty_problems_run_nothing(empty: dict[str, int], device: Device) -> None:
    """No launch, no workspace, and an explanation that says so."""
    p = problem(**empty)  # type: ignore[arg-type]
    plan = make_plan(p, device)
    assert (plan.kernel, plan.programs, plan.workspace) == ("none", 0, 0)
    assert "Nothing to compute" in plan.explain(p, device)


# ---- explain


@all_devices
@pytest.mark.parametrize("name", SHAPES)
def test_explain_gives_the_bytes_the_flops_and_the_roofline(name: str, device: Device) -> None:
    """The numbers of the explanation are the Problem's and the Device's, recomputed here by hand."""
    p = SHAPES[name]
    text = make_plan(p, device).explain(p, device)
    megabytes, gflop = numbers(r"must move ([\d,.]+) MB and do ([\d,.]+) GFLOP", text)
    # (keys seen, (query, key) pairs, bytes of K and V a key) of each shape
    tokens, pairs = {
        "GLM decode": (4 * 65536, 4 * 65536),
        "prompt": (2 * 4096, 2 * 4096 * 4097 // 2),
        "window": (16 * (4095 + 4), 16 * 4 * 4096),
        "ragged": (2000, 1000 * 1000),
    }[name]
    width = p.head_dim + p.head_dim_v
    moved = 2 * width * (tokens * p.num_kv_heads + p.total_q * p.num_heads)
    assert bytes_to_move(p) == moved
    assert flops_of(p) == 2 * pairs * p.num_heads * width
    assert megabytes == pytest.approx(moved / 1e6, abs=0.05)
    assert gflop == pytest.approx(2 * pairs * p.num_heads * width / 1e9, abs=0.05)
    floor = max(moved / device.bandwidth, flops_of(p) / device.matmul_flops)
    assert numbers(r"no faster than ([\d,.]+) us", text)[0] == pytest.approx(floor * 1e6, abs=0.05)
    memory = moved / device.bandwidth >= flops_of(p) / device.matmul_flops
    assert f"bound by {'memory' if memory else 'arithmetic'}" in text
    assert device.name in text
    assert ("(rough:" in text) == device.is_cpu


@pytest.mark.parametrize("device", GPUS, ids=DEVICES)
@pytest.mark.parametrize("name", SHAPES)
def test_explain_gives_the_launch_numbers_of_the_plan(name: str, device: Device) -> None:
    """What it says is what runs: tile, rows, waves, splits and workspace."""
    p = SHAPES[name]
    plan = make_plan(p, device)
    text = plan.explain(p, device)
    rows, keys, warps, stages = numbers(
        r"tile of (\d+) rows x block of (\d+) keys, (\d+) warps, (\d+) stages", text
    )
    assert (rows, keys, warps, stages) == (plan.block_m, plan.block_n, plan.num_warps, plan.num_stages)
    used, paid = numbers(r"rows used of rows paid for: (\d+) of (\d+)", text)
    assert (used, paid) == (p.total_q * p.num_heads, plan.tiles * plan.head_units * plan.block_m)
    if plan.workers:
        tiles, workers = numbers(r"(\d+) tiles taken by (\d+) programs", text)
        assert (tiles, workers) == (plan.tiles * plan.head_units, plan.workers)
        return
    programs, sms, waves, idle = numbers(
        r"(\d+) programs on (\d+) multiprocessors(?:, 2 on each)?: (\d+) waves?, (\d+)% of the last slots idle",
        text,
    )
    assert programs == plan.programs
    assert sms == device.sms
    slots = sms * plan.resident
    assert (", 2 on each" in text) == (plan.resident == 2)
    assert (waves - 1) * slots < programs <= waves * slots
    assert idle == pytest.approx(100 * (1 - programs / (waves * slots)), abs=0.51)
    if plan.ranges:
        assert f"into {plan.ranges} ranges of equal cost, {plan.lanes} programs each" in text
        assert "fixup: states of the rows whose keys several ranges share" in text
    elif plan.num_splits > 1:
        states, megabytes = numbers(r"fixup: (\d+) states a row through ([\d,.]+) MB", text)
        assert states == plan.num_splits
        assert megabytes == pytest.approx(plan.workspace / 1e6, abs=0.006)
    else:
        assert "fixup: none" in text


def test_explain_of_a_glm_decode_on_an_h200_word_by_word() -> None:
    """One explanation in full: what a user reads, and what a change of the planner shows in a diff."""
    assert make_plan(GLM, DEVICES["h200"]).explain(GLM, DEVICES["h200"]).splitlines() == [
        "96:8 heads (group of 12), d128, bfloat16, batch 4, queries <= 1 (dense), keys <= 65536 (dense), no mask",
        "Runs on NVIDIA H200 as the triton decode kernel.",
        "  the 12 heads of a group are folded into rows: each K/V byte is read once",
        "  4 splits a tile, over 512 blocks",
        "  every tile has equal shares: the lengths are the same",
        "  tile of 16 rows x block of 128 keys, 4 warps, 3 stages, about 143 KB of shared memory",
        "  rows used of rows paid for: 384 of 512 (75%)",
        "  must move 1,073.9 MB and do 12.9 GFLOP: bound by memory, no faster than 223.7 us on this device",
        "  128 programs on 132 multiprocessors: 1 wave, 3% of the last slots idle",
        "  fixup: 4 states a row through 0.79 MB of workspace (0.1% of the bytes, written and read once at the most)",
    ]


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (problem(32, 32), "32:32 heads (group of 1)"),
        (problem(32, 32), "nothing to fold"),
        (problem(pack_gqa=False), "run apart, as pack_gqa=False asks"),
        (problem(num_splits=3), "3 splits a tile, forced by num_splits"),
        (problem(num_splits=1), "1 split a tile, forced by num_splits"),
        (WINDOW, "window (4095, 0) aligned bottom-right"),
        (problem(window_right=0, bottom_right=False), "window (open, 0) aligned top-left"),
        (WINDOW, "(paged, pages of 16)"),
        (RAGGED, "d192/128"),
        (RAGGED, "queries <= 900 (ragged)"),
        (problem(d=80), "head dimension 80 runs as 64 + 32"),
        (problem(d=72, dtype=torch.float16), "float16"),
    ],
)
def test_explain_names_what_was_asked_and_why(p: Any, words: str) -> None:
    """Every feature of a Problem that changes its plan can be read in words."""
    assert words in make_plan(p, DEVICES["h200"]).explain(p, DEVICES["h200"])


@pytest.mark.parametrize("p", [GLM, WINDOW], ids=["GLM decode", "window"])
def test_explain_on_a_cpu_gives_rows_and_splits(p: Any) -> None:
    """The CPU has no waves or shared memory to speak of."""
    plan = make_plan(p, CPU)
    text = plan.explain(p, CPU)
    heads, queries, rows = numbers(r"(\d+) heads x (\d+) queries folded into (\d+) rows", text)
    assert (heads, queries, rows) == (p.group, p.max_seqlen_q, p.group * p.max_seqlen_q)
    splits, extent = numbers(r"(\d+) splits? of (\d+) keys", text)
    assert (splits, extent) == (plan.num_splits, plan.block_n)
    assert splits * extent >= p.max_seqlen_k
    assert "wave" not in text
