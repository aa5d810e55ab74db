"""What the compiler makes of the Gluon kernels: they fit, keep their registers in their loops, and products in flight."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from headfold.planner import DEVICES
from tests.aot.conftest import ROOT

# The oldest Triton that headfold takes and the newest; `make test` installs both beside the one that PyTorch brings.
VERSIONS = ("3.6.0", "3.9.0")
STACK = {"3.6.0": 56, "3.9.0": 120}  # bytes that a thread puts aside for its tile loop
# A pair's programs keep in registers what others read from their arguments: which of two it is is known at run time.
KNOWN_STACK = {
    "3.6.0": {
        "d256/256 pages of 1": 64,
        "d256/256 pages of 1, softcap": 120,
        "pair d256/256 pages of 16": 448,
    },
    "3.9.0": {
        "d256/256 pages of 1": 168,
        "d256/256 pages of 1, softcap": 160,
        "pair d256/256 pages of 16": 464,
    },
}
# Local accesses in loops over blocks: Triton 3.9 puts numbers aside at the start that these programs read again.
KNOWN_SPILLS: dict[str, dict[str, int]] = {
    "3.6.0": {},
    "3.9.0": {
        "d128/128 pages of 1": 1,
        "d128/128 pages of 1, left window": 1,
        "d64/64 pages of 1, softcap": 1,
        "d128/128 pages of 1, softcap": 1,
        "d256/256 pages of 1": 13,
        "d256/256 pages of 1, softcap": 13,
        "d256/256 pages of 8": 3,
        "decode d128/128 few rows, pages of 1": 6,
        "decode d128/128 few rows, pages of 64": 6,
    },
}

# Boxes of 4 KB and less are copied, and all but short rows where a program has its multiprocessor to itself.
COPYING_DECODES = {
    "decode d64/64 few rows of many, pages of 16",
    "decode d128/128 few rows, pages of 1",
    "decode d128/128 few rows, pages of 64",
    "decode d128/128 few rows of many, pages of 1",
    "decode d256/256 few rows, pages of 1",
    "decode d256/256 few rows, pages of 16",
}

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module", params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def report(version: str) -> Report:
    """name -> figures of a variant, compiled by that Triton."""
    place = Path(sys.prefix) / f"triton-{version}"
    if not place.is_dir():
        pytest.skip(f"there is no Triton {version} in {place}; make test installs it")
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_hopper"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_stay_asynchronous(report: Report) -> None:
    """C75xx is ptxas giving up on products in flight: right results, a third of the speed."""
    assert {n: r["warnings"] for n, r in report.items() if r["warnings"]} == {}
    assert all(r["hgmma"] > 0 and r["hmma"] == 0 for r in report.values())


def test_blocks_come_through_the_copy_engine(report: Report) -> None:
    """But where a decode copies rows; a prefill that does fetches its queries."""
    assert {n for n, r in report.items() if not r["utmaldg"]} == COPYING_DECODES


def test_results_leave_through_the_copy_engine(report: Report) -> None:
    """But beside masks, and of blocks of 128 keys beside wide heads, whose results lie where the queries did; decodes store."""
    stored = {
        n
        for n in report
        if re.search(r" mask |^d192/(128|80) (dense|ragged|pages of \d+)$|^(decode|pair) ", n)
    }
    assert {n for n, r in report.items() if not r["utmastg"]} == stored


def test_small_pages_come_in_pieces_of_16_bytes(report: Report) -> None:
    copied = {n for n, r in report.items() if r["ldgsts"]}
    assert copied == COPYING_DECODES | {n for n in report if re.search(r"^d\d.* pages of 1(,|$)", n)}
    assert all(r["ldgsts"] == r["ldgsts128"] for r in report.values())


def test_decodes_in_rows_can_ask_for_their_first_block_early(report: Report) -> None:
    asking = {n for n, r in report.items() if r["prefetches"]}
    assert asking == {n for n in report if n.startswith("decode") and n.endswith("rows")}


def test_nothing_spills_in_the_loops_over_blocks(report: Report, version: str) -> None:
    """Some values of a thread are put aside for the whole tile loop; none is touched from block to block."""
    spills = {n: r["block_loop_spills"] for n, r in report.items()}
    assert {n: count for n, count in spills.items() if count} == KNOWN_SPILLS[version]
    stacks = {n: r["stack"] for n, r in report.items()}
    assert {n: size for n, size in stacks.items() if size > KNOWN_STACK[version].get(n, STACK[version])} == {}


def test_shared_memory_is_what_was_planned(report: Report) -> None:
    assert all(r["smem"] <= r["planned"] <= DEVICES["h200"].smem for r in report.values())


def test_programs_that_share_a_multiprocessor_fit_it(report: Report) -> None:
    """Their registers, and shared memory with what each program reserves."""
    shared = {n: r for n, r in report.items() if r["resident"] > 1}
    pairs = {n for n in report if n.startswith("pair") and "d256" not in n}
    few = {n for n in report if "few rows of many" in n}
    assert set(shared) == pairs | few | {n for n in report if n.endswith("short")}
    assert all(r["resident"] * 256 * r["registers"] <= 65536 for r in shared.values())
    assert all(r["resident"] * (r["smem"] + 1024) <= 228 << 10 for r in shared.values())


def test_short_tiles_take_nothing_aside(report: Report) -> None:
    assert {n: r["stack"] for n, r in report.items() if n.endswith("short") and r["stack"]} == {}


def test_decodes_of_every_height_are_compiled(report: Report) -> None:
    heights = {n: r["rows"] for n, r in report.items() if n.startswith("decode")}
    said = {n: re.search(r"tiles of (\d+)", n) for n in heights}
    assert heights == {n: int(one[1]) if one else 16 for n, one in said.items()}


def test_three_consumers_are_compiled_too(report: Report) -> None:
    assert {n for n, r in report.items() if r["rows"] == 192} == {n for n in report if n.endswith("long")}
