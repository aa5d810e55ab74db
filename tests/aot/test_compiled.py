"""What the compiler makes of every kernel variant, without a GPU: it compiles, fits, keeps its registers and
its pipeline. A kernel that loses one of these still gives right results, only slowly: nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

pytest.importorskip("triton")

from headfold.planner import DEVICES
from headfold.planner.tiles import padded
from tests.aot.variants import ARCHS, ATTENTION, DEVICE_OF, variants

Record = dict[str, Any]
by_arch = pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")


@pytest.fixture
def report(arch: int, report_of: Callable[[int], list[Record]]) -> list[Record]:
    """The compiled variants of the architecture under test."""
    return [r for r in report_of(arch) if "error" not in r]


def offenders(records: Iterable[Record], is_bad: Callable[[Record], bool], *figures: str) -> dict[str, Any]:
    """name -> figures of the records that are bad; a test asserts that there are none, and so shows all."""
    return {r["name"]: {f: r[f] for f in figures} for r in records if is_bad(r)}


def attention(report: Iterable[Record]) -> list[Record]:
    """The records of the two kernels that have a plan."""
    return [r for r in report if r["form"] in ATTENTION]


def copies_of_a_block(r: Record) -> int:
    """16-byte copies a thread issues for one block of K and V."""
    size = r["plan"]["block_n"] * (padded(r["d"]) + padded(r["dv"])) * r["itemsize"]
    return size // (16 * 32 * r["plan"]["num_warps"])


@by_arch
def test_every_variant_compiles(arch: int, report_of: Callable[[int], list[Record]]) -> None:
    """The launcher's own call reaches a cubin: no parameter is left out, no instruction is missing."""
    records = report_of(arch)
    assert {r["name"]: r["error"] for r in records if "error" in r} == {}
    assert sorted(r["name"] for r in records) == sorted(v.name for v in variants(arch))


@by_arch
def test_a_variant_runs_the_kernel_it_is_there_for(arch: int, report: list[Record]) -> None:
    """Were the planner to send every variant to one kernel, the other tests would look at nothing."""
    kernel = {
        "decode1": "decode_kernel",
        "decode64": "decode_kernel",
        "prefill": "prefill_kernel",
        "fixup": "merge_kernel",
        "blocks": "mask_blocks_kernel",
        "append": "append_kernel",
        "step": "decode_kernel",
    }
    assert offenders(report, lambda r: r["kernel"] != kernel[r["form"]], "kernel") == {}
    searching = {r["form"] for r in attention(report) if r["plan"]["search_tiles"]}
    assert searching >= {"decode64", "prefill"}


@by_arch
def test_shared_memory_fits_the_device_and_the_plan(arch: int, report: list[Record]) -> None:
    """The planner chooses tiles by its estimate: were it below what is allocated, a launch would fail."""
    device = DEVICES[DEVICE_OF[arch]]
    assert offenders(report, lambda r: r["smem"] > device.smem, "smem") == {}
    assert (
        offenders(attention(report), lambda r: r["smem"] > r["plan"]["shared_memory"], "smem", "plan") == {}
    )


# Bytes of stack a plain call may use up to head dimension 128: none on Hopper, whose tiles were chosen by it, but for
# the decodes below. What the others use was not tuned, and may not grow; none of it is used within a loop.
STACK = {80: 72, 90: 0, 100: 8, 120: 72}
# The assembler stops at 128 registers and puts one to six aside before the loop; where it takes a few more, none.
BEFORE_THE_LOOP = {
    "decode1-dense-bf16-d128": 8,
    "decode1-ragged-bf16-d128": 8,
    "decode64-paged-bf16-d128": 8,
    "decode1-dense-fp16-d128": 8,
    # What a program knows of its sequence, once for all blocks of it, and as many loads a block as IN_THE_LOOP says.
    "decode1-ragged-bf16-d64": 8,
    "decode1-ragged-bf16-d96": 24,
    "decode1-paged-fp32-d96": 32,
    "decode1-paged-fp32-d128": 8,
}
IN_THE_LOOP = {"decode1-ragged-bf16-d96": 1, "decode1-paged-fp32-d96": 1, "decode1-paged-fp32-d128": 2}
FIGURES = ("registers", "stack", "loop_spills")


def spills(records: Iterable[Record], allowed: int) -> dict[str, Any]:
    """The records that keep registers in local memory; with nothing allowed, no local load or store at all."""
    return offenders(
        records, lambda r: r["stack"] > allowed or (not allowed and r["stl"] + r["ldl"] > 0), *FIGURES
    )


def narrow(report: Iterable[Record], aligned: bool) -> list[Record]:
    """Plain calls up to head dimension 128."""
    return [r for r in report if max(r["d"], r["dv"]) <= 128 and r["aligned"] == aligned and not r["feature"]]


@by_arch
def test_nothing_spills_up_to_head_dimension_128(arch: int, report: list[Record]) -> None:
    """Spilled registers cost what the tile was chosen to win; a tile table that spills is wrong."""
    known = BEFORE_THE_LOOP if arch == 90 else {}
    plain = narrow(report, aligned=True)
    assert spills((r for r in plain if r["name"] not in known), STACK[arch]) == {}
    put_aside = [r for r in plain if r["name"] in known]
    assert offenders(put_aside, lambda r: r["stack"] > known[r["name"]], *FIGURES) == {}
    in_loop = IN_THE_LOOP if arch == 90 else {}
    assert offenders(plain, lambda r: r["loop_spills"] > in_loop.get(r["name"], 0), *FIGURES) == {}


@by_arch
def test_nothing_spills_where_rows_are_unaligned(arch: int, report: list[Record]) -> None:
    """Loads of 2 bytes keep an address each in registers: such rows have tiles of their own. What little is put aside
    before a loop stays out of it."""
    odd = narrow(report, aligned=False)
    assert odd
    assert spills(odd, 80) == {}
    assert offenders(odd, lambda r: r["loop_spills"] > 0, *FIGURES) == {}


@by_arch
def test_wide_heads_spill_little(arch: int, report: list[Record]) -> None:
    """d = 192 and 256 use up to 255 registers, the prefill through the copy engine 216 bytes more; no further."""
    wide = [r for r in report if max(r["d"], r["dv"]) > 128 and r["aligned"] and not r["feature"]]
    assert spills(wide, 216) == {}


@by_arch
def test_half_precision_products_run_on_tensor_cores(arch: int, report: list[Record]) -> None:
    """On Hopper tiles of 64 rows and more as wgmma, half the rate is lost otherwise."""
    half = [r for r in attention(report) if r["itemsize"] == 2]
    assert offenders(half, lambda r: r["hmma"] + r["hgmma"] + r["utchmma"] == 0) == {}
    if arch == 90:
        assert offenders(half, lambda r: r["plan"]["block_m"] >= 64 and r["hgmma"] == 0, "hmma") == {}


@by_arch
def test_planned_tma_is_compiled_to_tma(arch: int, report: list[Record]) -> None:
    """A descriptor that the compiler lowers to plain loads gives the same results, later."""
    main = attention(report)
    assert offenders(main, lambda r: r["plan"]["use_tma"] != (r["utmaldg"] > 0), "utmaldg") == {}
    # On sm_120 the tiles for it do not fit the 99 KB of shared memory, but for the small ones of masks.
    assert any(r["plan"]["use_tma"] for r in main if not r["feature"]) == (arch in (90, 100))


@by_arch
def test_loops_keep_their_pipelines_of_16_byte_copies(arch: int, report: list[Record]) -> None:
    """K and V come in 16-byte asynchronous copies, the next block under way: decode lives by bytes in flight.

    A lost pipeline leaves a third of the copies (35 instead of about 100 for d128, 1.8 times the time on an H200),
    and an alignment that the compiler no longer sees leaves none; neither is an error. In each loop (prefill has
    three) there are at least two blocks: the one that fills the pipeline and the one that is loaded ahead.
    """
    loops = {"decode1": 1, "decode64": 1, "prefill": 3}
    # Masks, and rows to be rotated, are no part of this: see test_features.py.
    piped = [
        r
        for r in attention(report)
        if r["aligned"] and not r["plan"]["use_tma"] and r["feature"] in ("", "softcap")
    ]
    assert {r["form"] for r in piped} == {"decode1", "decode64", "prefill"}

    def copies(r: Record) -> int:
        # A float32 block is small: shared among many warps, a thread copies 4 or 8 bytes of it.
        return r["ldgsts128"] if r["itemsize"] == 2 else r["ldgsts"]

    lost = offenders(
        piped,
        lambda r: copies(r) < loops[r["form"]] * 2 * max(1, copies_of_a_block(r)),
        "ldgsts128",
        "ldgsts",
        "plan",
    )
    assert lost == {}


@by_arch
def test_unaligned_rows_are_never_read_16_bytes_at_a_time(arch: int, report: list[Record]) -> None:
    """Alignment is what the caller's tensors have, not what the kernel hopes: a 16-byte copy would fault."""
    odd = [r for r in report if not r["aligned"]]
    assert odd
    wide = ("ldg128", "ldgsts128", "utmaldg")
    assert offenders(odd, lambda r: any(r[f] for f in wide), *wide) == {}


@by_arch
def test_the_assembler_warns_of_no_serialised_products(arch: int, report: list[Record]) -> None:
    """C7510 to C7514 say that wgmma runs one at a time: a third of the speed, and no error."""
    known = {
        # A head in three parts under a mask: rare, and slow anyway.
        "prefill-dense-bf16-d40/72-mask-bool",
        # Plain calls of 64 rows, which share the program of features on Hopper: those that the Gluon decode refuses.
        *(f"decode64-{layout}-bf16-d64" for layout in ("dense", "ragged", "paged") if arch == 90),
    }
    assert (
        offenders((r for r in report if r["name"] not in known), lambda r: bool(r["warnings"]), "warnings")
        == {}
    )
