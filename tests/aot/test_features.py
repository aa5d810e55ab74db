"""What a feature costs the compiler, each alone on Hopper: and that a call without any pays for none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import triton

from headfold.planner.tiles import padded
from tests.aot.variants import ARCHS, ATTENTION, FEATURES, MASKS, TENSORS

Record = dict[str, Any]
# Features whose loads and products are those of the plain call, in its tile.
SAME_LOOP = [("softcap", form) for form in ("decode1", "decode64", "prefill")] + [("rotary-pairs", "decode1")]

# Bytes of stack, and local loads and stores within a loop, that a variant may use; every other one uses none. float32
# products leave no registers for the elements of a mask.
SPILLS = {
    "decode1-dense-bf16-d64-mask-bool": (144, 16),
    "decode1-dense-bf16-d256-mask-bool": (24, 0),
    "decode1-dense-bf16-d40/72-mask-bool": (8, 0),
    "step-dense-bf16-d64-rotary-halves": (32, 0),
    "step-dense-fp32-d128-rotary-halves": (24, 2),
    "decode64-dense-bf16-d128-tree": (64, 0),
    "decode64-paged-bf16-d128-tree": (120, 0),
    "decode1-dense-bf16-d192/128-softcap": (8, 0),
    "prefill-dense-bf16-d256-softcap": (288, 63),
    "prefill-dense-bf16-d128-rotary-pairs": (8, 0),
    "decode1-dense-fp32-d128-mask-bool": (480, 241),
    "prefill-dense-fp32-d128-mask-bool": (632, 345),
}

# Instructions by opcode, registers and shared memory of plain calls (d128, bfloat16, sm_90), as Triton 3.7.1 compiles
# them. Products, copies, exponentials and arithmetic are those of the kernels before they had any feature; loads are
# eight more, of lengths and offsets, all but those of the layout at hand predicated off; a decode of one split has
# stores for a split one beside its own. A change of the kernels or of their tiles changes this table: compare what the
# test prints, and write it down when it is meant.
RECORDED_WITH = "3.7.1"
COLUMNS = ("hgmma", "hmma", "ldgsts", "utmaldg", "mufu", "ffma", "fmul", "ldg", "stg", "registers", "smem")
PLAIN = {
    "decode1-dense-bf16-d128": (0, 64, 96, 0, 24, 44, 68, 10, 8, 128, 139264),
    "decode1-paged-bf16-d128": (0, 32, 53, 0, 21, 36, 68, 28, 8, 218, 72192),
    "prefill-dense-bf16-d128": (36, 0, 0, 18, 108, 128, 348, 16, 9, 220, 114752),
    "prefill-paged-bf16-d128": (36, 0, 87, 0, 108, 128, 348, 16, 9, 232, 131584),
}


@pytest.fixture
def records(report_of: Callable[[int], list[Record]]) -> dict[str, Record]:
    """name -> record of what was compiled for Hopper."""
    return {r["name"]: r for r in report_of(90) if "error" not in r}


def plain_of(r: Record, records: dict[str, Record]) -> Record:
    """The same call without its feature."""
    return records[r["name"].removesuffix(f"-{r['feature']}")]


def test_no_feature_slows_a_call_that_does_not_use_it(records: dict[str, Record]) -> None:
    """The program of a plain call is the recorded one: nothing of a feature is left in it."""
    if triton.__version__ != RECORDED_WITH:
        pytest.skip(f"recorded with Triton {RECORDED_WITH}, this is {triton.__version__}")
    found = {name: tuple(records[name][c] for c in COLUMNS) for name in PLAIN}
    assert found == PLAIN, COLUMNS


def test_features_share_programs_of_their_own(records: dict[str, Record]) -> None:
    """None is equal to the plain one: that would be a program without the feature. But for 64 rows, whose plain calls have
    no program of their own on Hopper."""
    featured = [r for r in records.values() if r["feature"] and r["form"] in ATTENTION]
    assert {(r["kernel"], r["feature"]) for r in featured} == {
        (kernel, feature) for kernel in ("decode_kernel", "prefill_kernel") for feature in FEATURES
    }
    counted = ("mufu", "ffma", "fmul", "ldg", "registers", "smem", "sass")
    same = [r["name"] for r in featured if all(r[c] == plain_of(r, records)[c] for c in counted)]
    assert sorted(same) == ["decode64-dense-bf16-d128-softcap", "decode64-paged-bf16-d128-softcap"]


def test_features_spill_no_more_than_they_are_known_to(records: dict[str, Record]) -> None:
    """Most not at all; the limits are what Triton 3.7.1 makes of them."""
    over = {
        r["name"]: (r["registers"], r["stack"], r["loop_spills"])
        for r in records.values()
        if (r["feature"] or r["form"] == "append")
        and any(
            n > most
            for n, most in zip((r["stack"], r["loop_spills"]), SPILLS.get(r["name"], (0, 0)), strict=True)
        )
    }
    assert over == {}
    assert set(records) >= set(SPILLS)


@pytest.mark.parametrize(("feature", "form"), SAME_LOOP)
def test_a_feature_keeps_the_tile_the_loads_and_the_products(
    records: dict[str, Record], feature: str, form: str
) -> None:
    """Softcap, sinks, chunks, ALiBi and cache rows add arithmetic: K and V still come as they did.

    In a decode, where one program does for all of them, rotation of q and masks too, with one loop more.
    """
    kept = ("hgmma", "hmma", "ldgsts", "ldgsts128", "utmaldg", "smem")
    if form == "decode64":
        # Whether Triton peels the last block of such a stream varies: 12 or 20 products in the text, with their scratch.
        kept = ("hmma", "ldgsts", "ldgsts128", "utmaldg")
    found = [r for r in records.values() if r["feature"] == feature and r["form"] == form and r["d"] == 128]
    assert {r["layout"] for r in found} == {"dense", "paged"}
    for r in found:
        plain = plain_of(r, records)
        loops = 2 if r["plan"]["tensor_mask"] else 1  # before a tree, and the rest
        in_text = {k: plain[k] * (1 if k == "smem" else loops) for k in kept}
        assert {k: r[k] for k in kept} == in_text, r["name"]
        assert (r["hgmma"] > 0) == (plain["hgmma"] > 0)
        tile = ("block_m", "block_n", "num_warps", "num_stages", "use_tma")
        assert {k: r["plan"][k] for k in tile} == {k: plain["plan"][k] for k in tile}, r["name"]


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")
def test_calls_with_a_mask_keep_asynchronous_copies(
    arch: int, report_of: Callable[[int], list[Record]]
) -> None:
    """Two blocks of K and V under way in 16-byte copies, or the copy engine: see test_compiled.py.

    The list of live blocks costs the loop no stage. A program has a second loop where a call may have no mask, for the
    blocks before a tree: those that read one in wide loads have one loop alone.
    """
    masked = [
        r
        for r in report_of(arch)
        if r["feature"] in MASKS and r["form"] in ATTENTION and r["itemsize"] == 2 and "error" not in r
    ]
    assert {r["feature"] for r in masked if r["form"] == "prefill"} == set(MASKS)
    lost = {}
    for r in masked:
        loops = 1 if r["plan"]["wide_mask"] else 2
        block = r["plan"]["block_n"] * (padded(r["d"]) + padded(r["dv"])) * r["itemsize"]
        copies = max(1, block // (16 * 32 * r["plan"]["num_warps"]))
        # By the copy engine K and V, each in its own copies of 64 columns, for three blocks: two before the loop.
        enough = r["utmaldg"] >= loops * 6 if r["plan"]["use_tma"] else r["ldgsts128"] >= loops * 2 * copies
        if r["form"] == "prefill" and (r["plan"]["d_parts"][1] or r["plan"]["dv_parts"][1]):
            enough = r["ldgsts128"] > 0  # the second part of a head comes in narrower copies
        if not enough:
            lost[r["name"]] = {f: r[f] for f in ("ldgsts", "ldgsts128", "utmaldg", "plan")}
    assert lost == {}


@pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")
def test_lists_of_live_blocks_read_masks_16_bytes_at_a_time(
    arch: int, report_of: Callable[[int], list[Record]]
) -> None:
    """Where rows allow it: elements one by one would cost as many loads as there are queries and keys. Nothing spills."""
    records = {r["feature"]: r for r in report_of(arch) if r["form"] == "blocks" and "error" not in r}
    assert set(records) == set(TENSORS)
    assert {m: r["ldg128"] for m, r in records.items() if r["ldg128"] < 2} == {}
    assert {m: r["stack"] for m, r in records.items() if r["stack"] or r["stl"] + r["ldl"]} == {}


def test_an_append_copies_16_bytes_at_a_time(records: dict[str, Record]) -> None:
    """K and V, rotated or not; also the other half of a pair and the angles."""
    appends = [r for r in records.values() if r["form"] == "append"]
    assert {r["feature"] for r in appends} == {"", "rotary-pairs", "rotary-halves"}
    assert {r["name"]: (r["ldg"], r["ldg128"]) for r in appends if r["ldg128"] < 4} == {}
