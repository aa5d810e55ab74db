"""The GPU planner: the fold, the number of splits, the tiles of ragged batches, and that what is planned is
what is launched."""

from __future__ import annotations

import functools
import inspect
import math
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headfold import backends
from headfold.backends import besides
from headfold.planner import DEVICES, make_plan
from headfold.planner.gpu import (
    DECODE_ROWS,
    FIXUP_COST,
    FIXUP_COST_PER_SPLIT,
    FULL_WAVES,
    MAX_SPLITS,
    START_COST,
    UNEVEN,
    WAVE_COST,
    choose_fold,
    choose_ranges,
    choose_splits,
    count_tiles,
    fixed_extent,
    span_blocks,
    tma_possible,
)
from headfold.problem import Inputs
from headfold.reference import visible
from tests.backends.featured import featured
from tests.cases import make, poisoned
from tests.planner.problems import GPUS, RATIOS, problem, problems

H200 = DEVICES["h200"]


# ---- fold


@pytest.mark.parametrize("group", range(1, 50))
def test_the_whole_group_is_folded_at_any_ratio(group: int) -> None:
    """Every K/V byte is read once: one head unit per KV head, whatever the ratio."""
    p = problem(8 * group, 8)
    assert choose_fold(p)[0] == group
    plan = make_plan(p, H200)
    assert (plan.fold, plan.head_units) == (group, 8)


def test_pack_gqa_false_runs_every_head_apart() -> None:
    """The caller's wish is kept, and the reason says what it costs."""
    fold, reason = choose_fold(problem(32, 8, pack_gqa=False))
    assert fold == 1
    assert "read by each" in reason
    assert make_plan(problem(32, 8, pack_gqa=False), H200).head_units == 32
    assert choose_fold(problem(32, 8, pack_gqa=True))[0] == 4


@given(st.integers(1, 3000), st.sampled_from(RATIOS), st.sampled_from((16, 32, 64, 128)))
def test_folding_never_pays_for_more_rows(sq: int, group: int, rows: int) -> None:
    """ceil(sq * G / rows) <= G * ceil(sq / rows): why the whole group is folded without a second thought."""
    p = problem(8 * group, 8, sq=sq)
    folded, _, _ = count_tiles(p, group, rows)
    apart, _, _ = count_tiles(p, 1, rows)
    assert folded <= group * apart


@given(problems())
def test_rows_paid_cover_rows_used(p: Any) -> None:
    """Every folded row of every sequence lies in a tile; for dense q with less than one tile a sequence to spare."""
    plan = make_plan(p, H200)
    if plan.kernel == "none":
        return
    used = p.total_q * p.num_heads
    assert plan.rows_paid >= used
    if p.q_layout == "dense":
        assert plan.rows_paid - used < p.batch * plan.head_units * plan.block_m


@pytest.mark.parametrize(
    ("device", "group", "rows"),
    [*(("h200", g, 16) for g in (1, 3, 5, 7, 12)), ("b200", 17, 32), ("h200", 17, 64), ("h200", 48, 64)],
)
def test_decode_pays_for_the_rows_of_the_group_rounded_up(device: str, group: int, rows: int) -> None:
    """One query: the group lies in one tile of 16, 32 or 64 rows of the Triton kernel. On Hopper those of 32 have a kernel
    of their own, and what is left of them shares a program with 64."""
    plan = make_plan(problem(8 * group, 8, batch=2, device_type="cpu"), DEVICES[device])
    assert plan.kernel == "decode"
    assert plan.block_m == rows
    assert plan.rows_paid == 2 * 8 * rows


# ---- splits


def model_time(tiles: int, blocks: int, sms: int, splits: int) -> float:
    """The model that choose_splits states, written once more."""
    waves, share = -(-tiles * splits // sms), -(-blocks // splits)
    fixup = FIXUP_COST + FIXUP_COST_PER_SPLIT * splits if splits > 1 else 0.0
    return (waves * (share + START_COST) + fixup) * (WAVE_COST if waves > 1 else 1.0)


@given(st.integers(1, 1000), st.integers(1, 2000), st.integers(1, 200))
def test_splits_are_optimal_under_the_stated_model(tiles: int, blocks: int, sms: int) -> None:
    """By brute force over every number of splits that leaves each a block; ties go to fewer."""
    best = choose_splits(tiles, blocks, sms)
    if tiles >= FULL_WAVES * sms:
        assert best == 1
        return
    times = {s: model_time(tiles, blocks, sms, s) for s in range(1, min(blocks, MAX_SPLITS) + 1)}
    assert best in times, "more splits than blocks: some programs would have nothing to do"
    assert times[best] == min(times.values())
    assert best == min(s for s, t in times.items() if t == times[best])


@pytest.mark.parametrize(
    ("shape", "splits"),
    [
        ((96, 8, 4, 65536), 4),  # GLM-4.7
        ((32, 8, 16, 8192), 1),
        ((32, 8, 1, 131072), 16),
        ((32, 32, 4, 65536), 1),
        ((32, 8, 64, 8192), 1),
    ],
)
def test_classic_decode_shapes_run_in_one_wave_on_an_h200(shape: tuple[int, ...], splits: int) -> None:
    """floor(132 / (batch * kv_heads)) splits, at least 1: measured best; more waves cost 5 to 12 %."""
    heads, kv_heads, batch, sk = shape
    plan = make_plan(problem(heads, kv_heads, batch, sk=sk), H200)
    assert plan.kernel == "decode"
    assert plan.num_splits == splits
    assert plan.programs == batch * kv_heads * splits
    if batch * kv_heads <= H200.sms:
        assert plan.programs <= H200.sms


@given(st.integers(1, 132), st.integers(1, 16), st.sampled_from(GPUS))
def test_a_long_decode_never_idles_half_a_device(batch: int, kv_heads: int, device: Any) -> None:
    """Over the whole of its waves: that is what splits are for."""
    plan = make_plan(problem(kv_heads * 4, kv_heads, batch, sk=131072), device)
    slots = device.sms * plan.resident
    waves = -(-plan.programs // slots)
    assert plan.programs >= waves * slots / 2


@pytest.mark.parametrize(("kv_heads", "splits"), [(5, 26), (10, 13), (15, 8), (31, 4)])
def test_a_long_decode_of_few_heads_runs_in_one_wave(kv_heads: int, splits: int) -> None:
    """floor(132 / kv_heads) splits, as for the classic shapes; waves alone would find two of them 3 % shorter for 15."""
    plan = make_plan(problem(kv_heads * 4, kv_heads, 1, sk=131072), H200)
    assert plan.num_splits == splits


@pytest.mark.parametrize("forced", [1, 2, 7, 256])
@pytest.mark.parametrize("sk", [1, 100, 8192])
def test_num_splits_is_kept_even_beyond_the_blocks(forced: int, sk: int) -> None:
    """A sequence's bits depend on it, so it must not depend on the length."""
    plan = make_plan(problem(num_splits=forced, sk=sk), H200)
    assert plan.num_splits == forced
    assert any("forced by num_splits" in r for r in plan.reasons)


def test_num_splits_above_one_splits_a_prefill_too() -> None:
    """The prefill kernel cannot split, so the decode kernel takes over."""
    p = problem(sq=2048, sk=2048)
    assert make_plan(p, H200).kernel == "prefill"
    plan = make_plan(replace(p, num_splits=3), H200)
    assert (plan.kernel, plan.num_splits) == ("decode", 3)
    assert make_plan(replace(p, num_splits=1), H200).kernel == "prefill"


@pytest.mark.parametrize(
    ("margin", "splits"), [(0, 16), (4, 16), (5, 15), (68, 8), (131, 1), (132, 1), (999, 1)]
)
def test_sm_margin_leaves_multiprocessors_free(margin: int, splits: int) -> None:
    """One sequence of 8 KV heads: 8 * splits programs must fit what is left, and at least one is used."""
    assert make_plan(problem(batch=1, sk=131072, sm_margin=margin), H200).num_splits == splits


@given(problems())
def test_workspace_holds_every_state(p: Any) -> None:
    """Output and LSE of each row at float32, output rows on 16 bytes: of every split of every tile, or of two tiles a
    range and lane. None where a program finishes every tile."""
    plan = make_plan(p, H200)
    assert (plan.workspace > 0) == (plan.num_splits > 1 or plan.ranges > 0)
    if not plan.workspace:
        return
    assert plan.kernel == "decode"
    states = 2 * plan.ranges * plan.lanes if plan.ranges else plan.tiles * plan.head_units * plan.num_splits
    rows = states * min(plan.block_m, p.max_seqlen_q * plan.fold)
    assert rows * (p.head_dim_v + 1) * 4 <= plan.workspace <= rows * (p.head_dim_v + 8) * 4
    assert 1 <= plan.num_splits <= 256


# ---- streams


@pytest.mark.parametrize("batch", [2, 3, 16, 64, 300])
def test_sequences_whose_lengths_the_device_knows_are_streamed(batch: int) -> None:
    """One wave of programs for the whole list, two on a multiprocessor where sequences are many."""
    plan = make_plan(problem(batch=batch, lengths_on_device=True), H200)
    assert (plan.stream, plan.ranges, plan.num_splits) == (True, 33 if batch > 32 else 16, 1)
    assert plan.programs == plan.ranges * 8 <= plan.resident * H200.sms
    assert any("cut on the device" in r for r in plan.reasons)


@given(problems())
def test_rows_of_a_cache_are_computed_as_its_pages_are(p: Any) -> None:
    """The same bits: the same blocks, warps, cuts and merges. (A prefill has kernels of its own for rows.)"""
    changes = {"lengths_on_device": True, "num_splits": p.num_splits or 2}
    for change in (changes, {**changes, "num_splits": 0, "max_seqlen_q": 1, "total_q": p.batch}):
        rows = make_plan(replace(p, **change, kv_layout="dense", page_size=0), H200)
        pages = make_plan(replace(p, **change, kv_layout="paged", page_size=16), H200)
        if rows.kernel == pages.kernel == "decode":
            names = (
                "block_m",
                "block_n",
                "num_warps",
                "fold",
                "num_splits",
                "ranges",
                "even_ranges",
                "gap",
                "extent",
            )
            assert [getattr(rows, n) for n in names] == [getattr(pages, n) for n in names]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"lengths_on_device": False}, "the same"),
        ({"num_splits": 3}, "num_splits asks"),
        ({"batch": 1, "total_q": 1, "total_k": 8192}, "one sequence"),
        ({"featured": True, "tensor_mask": True}, "programs that know nothing else"),
        ({"featured": True, "rotary": True}, "programs that know nothing else"),
        ({"aligned": False}, "programs that know nothing else"),
        ({"batch": 4096, "max_seqlen_k": 2**24}, "32 bits"),
        ({"q_layout": "ragged", "max_seqlen_q": 200, "total_q": 230, "num_splits": 2}, "num_splits asks"),
    ],
)
def test_what_is_not_streamed_says_why(change: dict[str, Any], reason: str) -> None:
    p = replace(problem(batch=16, lengths_on_device=True), **change)
    plan = make_plan(p, H200)
    assert plan.ranges == 0
    assert any("equal shares" in r and reason in r for r in plan.reasons)


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("on_device", [False, True])
def test_fixed_splits_have_one_tile_whatever_the_batch(batch: int, kv_layout: str, on_device: bool) -> None:
    """A sequence's bits depend on the block, the warps and the program that computes them."""
    more = {"kv_layout": kv_layout, "page_size": 16 if kv_layout == "paged" else 0}
    plan = make_plan(problem(batch=batch, tokens_per_split=512, lengths_on_device=on_device, **more), H200)
    one = make_plan(
        problem(batch=7, sq=3, sk=300, tokens_per_split=512, lengths_on_device=True, **more), H200
    )
    for name in ("stream", "block_m", "block_n", "num_warps", "num_stages", "extent"):
        assert getattr(plan, name) == getattr(one, name), name
    assert plan.stream


@given(st.integers(1, 300), st.integers(1, 200), st.integers(1, 50), st.integers(1, 264))
def test_ranges_fill_one_wave_and_none_is_without_a_block(
    batch: int, lanes: int, blocks: int, slots: int
) -> None:
    ranges, even = choose_ranges(batch, lanes, blocks, slots)
    assert 1 <= even <= ranges <= batch * blocks
    assert ranges == 1 or ranges * lanes <= slots
    assert even > ranges * (1 - UNEVEN) - 1


def test_many_rows_on_an_idle_device_are_split() -> None:
    """128 queries of one sequence make few tiles: over a long context the decode kernel splits the keys."""
    plan = make_plan(problem(8, 1, batch=1, sq=128, sk=131072), H200)
    assert plan.kernel == "decode"
    assert plan.num_splits > 1
    assert any("idle" in r for r in plan.reasons)


@given(problems(), st.sampled_from(GPUS))
@example(problem(batch=4, sq=8192, sk=8192, d=256, window_right=0), H200)
@example(problem(16, 2, 1, sq=512, sk=512, d=256, window_right=0), H200)
def test_the_decode_kernel_takes_many_rows_only_to_split_them(p: Any, device: Any) -> None:
    """Unsplit, the prefill kernel runs the same work on a larger tile and without a mask inside."""
    plan = make_plan(p, device)
    if p.max_seqlen_q * plan.fold > DECODE_ROWS and plan.num_splits == 1 and not plan.ranges:
        assert plan.kernel in ("prefill", "none"), plan.reasons


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("sq", [2048, 4096, 16384])
def test_a_long_prompt_is_a_prefill(d: int, batch: int, sq: int) -> None:
    """Causal self-attention of a prompt fills the device many times over: splitting it costs a merge for nothing."""
    plan = make_plan(problem(batch=batch, sq=sq, sk=sq, d=d, window_right=0), H200)
    assert (plan.kernel, plan.num_splits) == ("prefill", 1)


@given(problems())
def test_up_to_64_folded_rows_go_to_the_decode_kernel(p: Any) -> None:
    """Its tile holds them all (float32 and rows to be rotated excepted), so K and V are read once."""
    plan = make_plan(p, H200)
    rows = p.max_seqlen_q * plan.fold
    if plan.kernel == "none" or rows > DECODE_ROWS:
        return
    assert plan.kernel == "decode"
    if p.dtype != torch.float32 and not p.rotary:
        assert plan.block_m >= rows
        assert plan.tiles_per_sequence == 1


# ---- keys that a tile spans


@given(
    st.integers(1, 60),
    st.integers(1, 120),
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 60),
    st.booleans(),
    st.sampled_from((1, 4, 16)),
)
def test_span_blocks_covers_what_any_query_sees(
    sq: int, sk: int, left: int | None, right: int | None, bottom_right: bool, block_n: int
) -> None:
    """Splits are shares of these blocks; too few and choose_splits would think a long row short."""
    p = problem(sq=sq, sk=sk, window_left=left, window_right=right, bottom_right=bottom_right)
    seen = visible(sq, sk, -1 if left is None else left, -1 if right is None else right, bottom_right)
    widest = int(seen.any(0).sum())
    blocks = span_blocks(p, block_n)
    assert blocks >= max(1, -(-widest // block_n))
    assert blocks <= max(1, -(-sk // block_n))


def test_a_window_decode_is_not_split_for_keys_it_never_sees() -> None:
    """A window of 1024 keys in a context of a million is 9 blocks of 128, not 8192."""
    p = problem(sk=2**20, window_left=1023, window_right=0)
    assert span_blocks(p, 128) == 9
    assert make_plan(replace(p, batch=1, total_q=1, total_k=2**20), H200).num_splits <= 9


# ---- TMA


def test_tma_needs_aligned_whole_half_precision_rows_without_pages() -> None:
    """What the Triton kernel's copy engine can address: each condition alone forbids it."""
    p = problem(sq=4096, sk=4096, device_type="cpu")  # on a Hopper GPU the Gluon kernel has rules of its own
    assert tma_possible(p)
    assert make_plan(p, H200).use_tma
    for change in (
        {"aligned": False},
        {"tma_strides": False},
        {"aligned": False, "tensor_mask": True},
        {"tma_strides": False, "tensor_mask": True},
        {"kv_layout": "paged", "page_size": 16},
        {"head_dim": 96},
        {"head_dim_v": 72},
        {"dtype": torch.float32},
    ):
        other = replace(p, **change)
        assert not tma_possible(other), change
        assert not make_plan(other, H200).use_tma, change
    assert not make_plan(p, DEVICES["a100"]).use_tma


@given(problems(), st.sampled_from(GPUS))
def test_no_plan_uses_tma_where_it_is_impossible(p: Any, device: Any) -> None:
    """Whatever the features: a mask's tiles go through the copy engine too, on the same terms."""
    plan = make_plan(p, device)
    if plan.use_tma:
        assert tma_possible(p) or plan.backend == "hopper"
        assert p.aligned
        assert p.tma_strides
        # A box lies in one page, or keys are copied row by row; the Triton kernel's copy engine fetches no pages.
        alone = plan.kernel == "prefill" and plan.page_rows == 1
        assert p.kv_layout != "paged" or alone or (plan.page_rows >= 8 and p.page_size % plan.page_rows == 0)


def strided(*shape: int, stride: int) -> torch.Tensor:
    """(b, sk, hk, d) bfloat16 with that token stride, in elements."""
    b, sk, hk, d = shape
    row = -(-max(stride * sk, hk * d) // 64) * 64  # sequences start on 16 bytes
    store = torch.zeros(b * row + hk * d, dtype=torch.bfloat16)
    return store.as_strided(shape, (row, stride, d, 1))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "keys", "stride", "aligned", "tma"),
    [
        ("contiguous", 64, 128, True, True),
        ("padded rows", 64, 136, True, True),
        ("expanded tokens", 64, 0, True, False),
        ("odd rows", 64, 129, False, False),
        ("rows on 8 bytes", 64, 132, False, False),
        ("one token with an odd stride", 1, 129, True, False),
        ("one expanded token", 1, 0, True, False),
    ],
)
def test_the_copy_engine_gets_strides_it_can_walk(
    name: str, keys: int, stride: int, aligned: bool, tma: bool, masked: bool
) -> None:
    """A token stride of 0 or one that is no multiple of 16 bytes makes a descriptor that faults, or reads elsewhere."""
    for tensors in ("k", "v", "kv"):
        good = torch.zeros(2, keys, 2, 64, dtype=torch.bfloat16)
        bad = strided(2, keys, 2, 64, stride=stride)
        x = Inputs(
            torch.zeros(2, 4096, 2, 64, dtype=torch.bfloat16),
            bad if "k" in tensors else good,
            bad if "v" in tensors else good,
            mask=torch.zeros(1, 1, 1, keys).expand(2, 2, 4096, keys) if masked else None,
        )
        with backends.force(H200):
            p, plan = backends.plan_of(x)
        assert plan.kernel == "prefill"
        assert (p.aligned, p.tma_strides) == (aligned, tma)
        assert plan.use_tma == tma, (name, tensors)
        # Ragged keys have their tokens first.
        flat = replace(x, k=x.k[0], v=x.v[0], q=x.q[0], cu_seqlens_q=None, mask=None)
        flat = replace(flat, cu_seqlens_q=torch.tensor([0, 4096], dtype=torch.int32))
        flat = replace(flat, cu_seqlens_k=torch.tensor([0, keys], dtype=torch.int32))
        flat = replace(flat, max_seqlen_q=4096, max_seqlen_k=keys)
        with backends.force(H200):
            assert backends.plan_of(flat)[1].use_tma == tma, (name, tensors)


# ---- fixed splits


@given(
    problems(),
    st.integers(1, 3000),
    st.integers(1, 100),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.sampled_from(GPUS),
)
def test_fixed_splits_depend_on_the_sequence_alone(
    p: Any, size: int, batch: int, sq: int, sk: int, device: Any
) -> None:
    """The splits cover the capacity, the decode kernel runs them, and its tile is one whatever else is in the batch."""
    p = replace(p, tokens_per_split=size)
    plan = make_plan(p, device)
    if plan.kernel == "none":
        return
    assert plan.kernel == "decode"
    assert plan.extent <= size
    assert size % plan.extent == 0, "splits end at multiples of what was asked for too"
    assert (plan.num_splits - 1) * plan.extent < p.max_seqlen_k <= plan.num_splits * plan.extent
    assert any(f"as tokens_per_split={size} asks" in r for r in plan.reasons)
    # Another batch, with other lengths, and another caller's wish for splits.
    total = batch * sq if p.q_layout == "dense" else batch + sq
    change = {"batch": batch, "max_seqlen_q": sq, "max_seqlen_k": sk, "total_q": total, "total_k": batch * sk}
    other = make_plan(replace(p, **change, num_splits=3, sm_margin=0), device)
    for tile in ("kernel", "extent", "fold", "block_m", "block_n", "num_warps", "num_stages", "use_tma"):
        assert getattr(other, tile) == getattr(plan, tile), tile


@pytest.mark.parametrize(
    ("asked", "extent"),
    [(1, 1), (2048, 2048), (4096, 2048), (8192, 2048), (5000, 5000), (2**30, 2048), (3 * 1024, 1536)],
)
def test_long_fixed_extents_are_halved_while_they_stay_whole_blocks(asked: int, extent: int) -> None:
    assert fixed_extent(asked) == extent


# ---- ragged batches

lengths = st.lists(st.one_of(st.just(0), st.integers(0, 4), st.integers(0, 700)), min_size=1, max_size=12)


def find_sequence(tile: int, cu: list[int], fold: int, block_m: int) -> tuple[int, int]:
    """kernels/parts/spans.py::find_sequence, in Python, line by line."""
    low, high = 0, len(cu) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if cu[middle] * fold // block_m + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (cu[low] * fold // block_m + low)


def offsets(lens: list[int]) -> list[int]:
    """0 and the running sums."""
    cu = [0]
    for n in lens:
        cu.append(cu[-1] + n)
    return cu


@given(lengths, st.integers(0, 50), st.sampled_from(RATIOS), st.sampled_from((16, 32, 64, 128)))
def test_packed_search_assigns_every_tile_of_every_sequence_once(
    lens: list[int], slack: int, fold: int, block_m: int
) -> None:
    """Over total_q * fold // block_m + batch programs; rows behind the last sequence belong to nobody."""
    cu = offsets(lens)
    total = cu[-1] + slack
    found = Counter(find_sequence(t, cu, fold, block_m) for t in range(total * fold // block_m + len(lens)))
    needed = {(i, t) for i, n in enumerate(lens) for t in range(-(-n * fold // block_m))}
    assert all(found[place] == 1 for place in needed)
    # What else there is finds no row: the kernel leaves at once.
    assert all(t >= -(-lens[i] * fold // block_m) for i, t in found if (i, t) not in needed)
    assert all(t >= 0 for _, t in found)
    # Bisection finds the last sequence that starts at or before the tile.
    starts = [cu[i] * fold // block_m + i for i in range(len(lens))]
    assert all(i == bisect_right(starts, starts[i] + t) - 1 for i, t in found)


@given(lengths, st.sampled_from(RATIOS), st.sampled_from((16, 32, 64, 128)), st.integers(0, 300))
def test_tiles_counted_for_a_ragged_batch_suffice(
    lens: list[int], fold: int, block_m: int, loose: int
) -> None:
    """The host knows totals and bounds, never lengths: every sequence's tiles must be launched all the same."""
    longest = max(lens) + loose
    if longest == 0:
        return
    p = problem(8 * fold, 8, len(lens), sq=longest, total_q=sum(lens), q_layout="ragged", kv_layout="ragged")
    tiles, per_sequence, search = count_tiles(p, fold, block_m)
    needed = [-(-n * fold // block_m) for n in lens]
    if search:
        cu = offsets(lens)
        found = {find_sequence(t, cu, fold, block_m) for t in range(tiles)}
        assert found >= {(i, t) for i, n in enumerate(needed) for t in range(n)}
        assert per_sequence == 0
        assert tiles < len(lens) * -(-longest * fold // block_m)
    else:
        assert tiles == per_sequence * len(lens)
        assert per_sequence >= max(needed)


def test_the_search_mirrored_here_is_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own find_sequence, run as plain Python on lists, agrees with the mirror."""
    spans = pytest.importorskip("headfold.kernels.parts.spans")

    class Number(int):
        """An int that can be cast as a Triton scalar."""

        def to(self, _: Any) -> Number:
            return self

    class Pointer(list):  # type: ignore[type-arg]
        """A list that adds as a pointer."""

        def __add__(self, i: Any) -> tuple[Pointer, int]:  # type: ignore[override]
            return self, int(i)

    def pointer(address: Pointer, *_: Any) -> Pointer:
        return address

    class Language:
        """As much of triton.language as find_sequence uses."""

        int64 = int32 = None

        @staticmethod
        def load(place: tuple[list[int], int]) -> Number:
            return Number(place[0][place[1]])

    monkeypatch.setitem(spans.find_sequence.fn.__globals__, "tl", Language)
    monkeypatch.setitem(spans.find_sequence.fn.__globals__, "pointer", pointer)
    lens = [0, 5, 0, 0, 130, 1, 64, 0]
    cu = offsets(lens)
    for tile in range(cu[-1] * 3 // 16 + len(lens)):
        # Number(start) floors and multiplies as int; only the last cast needs a method.
        low, rest = _run_find(spans.find_sequence.fn, Number, Pointer(cu), tile, len(lens), 3, 16)
        assert (low, rest) == find_sequence(tile, cu, 3, 16)


def _run_find(
    fn: Any, number: Any, cu: Any, tile: int, batch: int, fold: int, block_m: int
) -> tuple[int, int]:
    class Tile(number):  # type: ignore[misc]
        """tile - start keeps the cast."""

        def __sub__(self, other: int) -> Any:
            return number(int(self) - int(other))

    low, rest = fn(Tile(tile), cu, batch, fold, block_m)
    return int(low), int(rest)


# ---- what is planned is what is launched


class Recorder:
    """Stands in for a kernel: remembers the grid and arguments of its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """headfold.backends.triton with recorders for kernels."""
    pytest.importorskip("triton")
    from headfold.backends import triton as launcher

    for kernel in ("decode_kernel", "prefill_kernel", "merge_kernel", "mask_blocks_kernel"):
        monkeypatch.setattr(launcher, kernel, Recorder())
    return launcher


@functools.cache
def launch_cases() -> dict[str, Inputs]:
    """A decode, a split one, a prefill, a ragged and a paged one. Nobody writes to them: all twelve take half a second."""
    one = make([1] * 3, [700] * 3, heads=12, kv_heads=2, d=64, dtype=torch.bfloat16)
    return {
        "decode": replace(one, num_splits=1),
        "split decode": replace(one, num_splits=5),
        "odd head dimensions": make([2], [300], heads=6, d=80, dv=40, dtype=torch.float16, num_splits=2),
        "float32": make([3, 1], [50, 60], heads=6),
        "prefill": make([300] * 2, [300] * 2, heads=80, kv_heads=20, d=128, dtype=torch.bfloat16, slack=0),
        "ragged": make(
            [400, 3, 1, 2] * 8, [9] * 32, heads=40, kv_heads=10, q_layout="ragged", kv_layout="ragged"
        ),
        "paged": make([1, 1], [100, 33], kv_layout="paged", page_size=24, dtype=torch.float16),
        "mask, slopes, sink": featured(("bool_mask", "slopes", "sink"), [2, 2], [90, 90], slack=0),
        "added mask, softcap": featured(("added_mask", "softcap"), [70] * 2, [70] * 2, slack=0, num_splits=1),
        "mask in a prefill": featured(("bool_mask",), [170] * 2, [70] * 2, slack=0, num_splits=1, heads=6),
        "tree, rows, chunk": featured(("tree", "batch_idx", "leftpad", "chunk"), [3, 3], [90, 60]),
        "rotary, paged": featured(("rotary", "batch_idx"), [2, 1], [90, 60], kv_layout="paged", seed=1),
    }


@pytest.mark.parametrize("name", launch_cases())
@pytest.mark.parametrize("device", GPUS, ids=list(DEVICES))
def test_the_planned_blocks_are_the_launched_ones(launcher: Any, name: str, device: Any) -> None:
    """A heuristic that assumes one block size while the kernel runs another is the classic bug of this field."""
    x = launch_cases()[name]
    with backends.force(device):
        _, plan = backends.plan_of(x)
        backends.run(x, *poisoned(x))
    kernel = launcher.decode_kernel if plan.kernel == "decode" else launcher.prefill_kernel
    other = launcher.prefill_kernel if plan.kernel == "decode" else launcher.decode_kernel
    assert not other.launches
    [(grid, args, keywords)] = kernel.launches
    if plan.kernel == "decode":
        assert grid == (plan.programs,)
        assert keywords["STREAM"] == plan.stream
    else:
        assert grid == (plan.tiles, plan.head_units)
    assert (keywords["BLOCK_M"], keywords["BLOCK_N"]) == (plan.block_m, plan.block_n)
    assert (keywords["D0"], keywords["D1"]) == plan.d_parts
    assert (keywords["DV0"], keywords["DV1"]) == plan.dv_parts
    assert (keywords["num_warps"], keywords["num_stages"]) == (plan.num_warps, plan.num_stages)
    assert (keywords["HEAD_DIM"], keywords["HEAD_DIM_V"]) == (x.q.shape[-1], x.v.shape[-1])
    assert (keywords["FEATURED"], keywords["TENSORS"]) == (plan.featured, plan.tensor_mask)
    assert (keywords["ROTARY"], keywords["PAGED"]) == (plan.rotary, x.page_table is not None)
    assert keywords.get("TMA", False) == plan.use_tma
    assert any(value is plan.fold for value in args)
    assert len(launcher.mask_blocks_kernel.launches) == (plan.mask_list_bytes > 0)
    if plan.mask_list_bytes:
        [(grid, blocks, keywords)] = launcher.mask_blocks_kernel.launches
        assert grid == (math.prod(plan.mask_lists),)
        assert (keywords["BLOCK_M"], keywords["BLOCK_N"]) == (plan.block_m, plan.block_n)
        names = inspect.signature(launcher_kernel("prefill").fn).parameters
        told = dict(zip(names, args, strict=False))
        names = inspect.signature(launcher_kernel("mask_blocks").fn).parameters
        # Where the mask does not broadcast, both kernels are told the same of it, of the lengths and of the lists.
        for name, value in zip(names, blocks, strict=False):
            if name in told and not name.startswith("mask_stride"):
                assert value == told[name], name
    assert len(launcher.merge_kernel.launches) == (plan.workspace > 0)
    if plan.workspace:
        [(grid, merged, keywords)] = launcher.merge_kernel.launches
        assert (keywords["BLOCK_M"], keywords["BLOCK_N"]) == (plan.block_m, plan.block_n)
        rows = min(plan.block_m, x.q.shape[-3] * plan.fold)
        parts = 1 if plan.ranges or plan.extent else -(-x.v.shape[-1] // 32)
        assert grid == (plan.tiles * plan.head_units, rows * parts)
        # Both kernels are told the same of the schedule, the workspace and the tiles.
        names = inspect.signature(launcher_kernel("decode").fn).parameters
        told = dict(zip(names, args, strict=False))
        names = inspect.signature(launcher_kernel("merge").fn).parameters
        for name, value in zip(names, merged, strict=False):
            assert value == told[name], name


def launcher_kernel(name: str) -> Any:
    """The kernel itself, where the launcher has a recorder."""
    from headfold.kernels import decode, mask_blocks, merge, prefill

    return {
        "decode": decode.decode_kernel,
        "merge": merge.merge_kernel,
        "prefill": prefill.prefill_kernel,
        "mask_blocks": mask_blocks.mask_blocks_kernel,
    }[name]


def test_launch_cases_reach_every_kernel_and_the_search() -> None:
    """The cases above are worth something only if they differ."""
    plans = {}
    for name, x in launch_cases().items():
        with backends.force(H200):
            plans[name] = backends.plan_of(x)[1]
    assert plans["prefill"].kernel == "prefill"
    assert plans["prefill"].use_tma
    assert plans["decode"].num_splits == 1
    assert plans["split decode"].num_splits == 5
    assert plans["ragged"].search_tiles
    assert plans["odd head dimensions"].d_parts[1] > 0


@pytest.mark.parametrize("name", launch_cases())
def test_a_launch_gives_every_kernel_parameter_once(launcher: Any, name: str) -> None:
    """Arguments are positional: one too few or in the wrong place would shift all that follow."""
    from headfold.backends.besides import KINDS, address

    names = ("decode", "prefill", "merge", "mask_blocks")
    kernels = {f"{name}_kernel": launcher_kernel(name) for name in names}
    x = launch_cases()[name]
    with backends.force(H200):
        backends.run(x, *poisoned(x))
        searches = backends.plan_of(x)[1].search_tiles
    for kernel, jit in kernels.items():
        for _, args, keywords in getattr(launcher, kernel).launches:
            options = ("num_warps", "num_stages", "launch_pdl")
            constants = {k: v for k, v in keywords.items() if k not in options}
            bound = inspect.signature(jit.fn).bind(*args, **constants).arguments
            assert set(bound) == set(inspect.signature(jit.fn).parameters)
            strides = {k: v for k, v in bound.items() if "stride" in k}
            assert all(isinstance(v, int) for v in strides.values())
            if kernel == "mask_blocks_kernel":
                assert x.mask is not None
                assert (bound["mask"], bound["mask_kind"]) == (address(x.mask), KINDS[x.mask.dtype])
                assert bound["mask_stride_k"] == x.mask.stride(3)
            elif kernel != "merge_kernel":
                assert bound["Q"] == x.q.data_ptr()
                assert bound["page_table"] == address(x.page_table)
                # Packed tiles search their sequence.
                assert (bound["tiles_per_sequence"] == 0) == searches
                assert bound["k_stride_h"] == x.k.stride(-2)
                assert bound["v_stride_h"] == x.v.stride(-2)
                assert bound["q_stride_s"] == x.q.stride(-3)
                same = ("rotary_cos", "rotary_sin", "rotary_positions", "cache_leftpad", "cache_batch_idx")
                tensors = {n: getattr(x, n) for n in same}
                tensors |= {"sink": x.sink, "slopes": x.alibi_slopes, "mask": x.mask, "tree": x.tree_mask}
                assert {n: bound[n] for n in tensors} == {n: address(t) for n, t in tensors.items()}
                for n, t in (("mask_kind", x.mask), ("sink_kind", x.sink), ("rotary_kind", x.rotary_cos)):
                    assert bound[n] == (0 if t is None else KINDS[t.dtype])
                assert [bound[f"mask_stride_{i}"] for i in "bhqk"] == list(
                    x.mask.stride() if x.mask is not None else (0,) * 4
                )
                assert (bound["fold"], bound["batch"]) == (x.q.shape[-2] // x.k.shape[-2], x.batch)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=500)
def test_division_by_a_page_size_is_exact(d: int, n: int) -> None:
    """Any page size, any key: the kernel divides by a multiplication and a shift."""
    magic, shift = besides.division(d)
    assert 0 <= magic < 2**32
    for k in (n, n // d * d, max(0, n // d * d - 1), 2**31 - 1):
        assert ((2 * k * magic) >> 32) >> shift == k // d
