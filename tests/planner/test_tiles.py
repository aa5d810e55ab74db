"""Tiles: powers of two, within shared memory, for every head dimension and device."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.planner import DEVICES, Device
from headfold.planner.tiles import (
    ALIKE,
    MEASURED,
    Form,
    Tile,
    decode_tile,
    next_power_of_two,
    padded,
    prefill_tile,
    shared_memory,
    split_dim,
)
from tests.planner.problems import DTYPES

devices = pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
dims = st.integers(1, 256)
FORMS: tuple[Form, ...] = get_args(Form)


def is_power_of_two(n: int) -> bool:
    """1, 2, 4, ..."""
    return n > 0 and n & (n - 1) == 0


@pytest.mark.parametrize("d", range(1, 257))
def test_split_covers_the_head_dimension_with_powers_of_two(d: int) -> None:
    """Triton's tiles are powers of two, its products at least 16 wide; the second part must have columns to do."""
    first, second = split_dim(d)
    assert is_power_of_two(first)
    assert first >= 16
    assert first + second >= d
    if second:
        assert is_power_of_two(second)
        assert first < d
        assert second >= 32  # 16 spills at d = 80


@pytest.mark.parametrize("d", range(1, 257))
def test_split_never_pays_for_more_than_rounding_up(d: int) -> None:
    """A second part is only worth its code when it saves columns."""
    assert padded(d) <= max(16, next_power_of_two(d))
    assert (padded(d) < next_power_of_two(d)) == (split_dim(d)[1] > 0)


@pytest.mark.parametrize(
    ("d", "parts"),
    [
        (8, (16, 0)),
        (40, (64, 0)),
        (64, (64, 0)),
        (72, (64, 32)),
        (80, (64, 32)),
        (96, (64, 32)),
        (100, (128, 0)),
        (160, (128, 32)),
        (192, (128, 64)),
        (256, (256, 0)),
    ],
)
def test_split_of_common_head_dimensions(d: int, parts: tuple[int, int]) -> None:
    """The head dimensions of published models, spelled out."""
    assert split_dim(d) == parts


@given(st.integers(1, 2**20))
def test_next_power_of_two(n: int) -> None:
    """The smallest one that is large enough."""
    p = next_power_of_two(n)
    assert is_power_of_two(p)
    assert p >= n > p // 2


def check_tile(tile: Tile, d: int, dv: int, dtype: torch.dtype, device: Device, paged: bool = False) -> None:
    """What any launchable tile fulfils."""
    assert is_power_of_two(tile.rows)
    assert is_power_of_two(tile.keys)
    assert is_power_of_two(tile.warps)
    assert min(tile.rows, tile.keys) >= 16  # the smallest product
    assert tile.warps <= 16
    assert tile.stages >= 1
    assert shared_memory(tile, d, dv, dtype, paged=paged) <= device.smem, (tile, d, dv, dtype, device.name)


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(dims, dims, st.integers(1, 3000), st.sampled_from(FORMS), st.booleans(), st.booleans())
def test_decode_tiles_fit_shared_memory(
    device: Device, dtype: torch.dtype, d: int, dv: int, rows: int, form: Form, aligned: bool, featured: bool
) -> None:
    """On every device of the table, at every pair of head dimensions, rows aligned or not."""
    tile = decode_tile(rows, d, dv, dtype, form, device, aligned, featured=featured)
    check_tile(tile, d, dv, dtype, device, form == "pages")
    assert not tile.tma
    assert tile.stages == (5 if form == "pages" else 3)
    assert 1 <= tile.resident <= 2
    assert tile.resident * shared_memory(tile, d, dv, dtype, paged=form == "pages") <= device.smem


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(dims, dims, st.integers(1, 3000), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_rows_of_a_cache_are_computed_and_cut_as_its_pages(
    device: Device,
    dtype: torch.dtype,
    d: int,
    dv: int,
    rows: int,
    aligned: bool,
    featured: bool,
    tensor_mask: bool,
    rotary: bool,
) -> None:
    """Both give the same bits: also where the two stages more of a page look-up leave room for fewer programs."""
    tiles = [
        decode_tile(
            *(rows, d, dv, dtype, form, device, aligned),
            featured=featured,
            tensor_mask=tensor_mask,
            rotary=rotary,
        )
        for form in ALIKE
    ]
    assert replace(tiles[0], stages=0) == replace(tiles[1], stages=0)


def test_an_a100_cuts_rows_of_a_cache_for_as_many_programs_as_its_pages() -> None:
    """256 keys of d32: two programs of rows would fit an A100's multiprocessor, of pages only one."""
    device = DEVICES["a100"]
    tiles = {form: decode_tile(4, 32, 32, torch.float16, form, device) for form in ALIKE}
    alone = {f: shared_memory(t, 32, 32, torch.float16, paged=f == "pages") for f, t in tiles.items()}
    assert [device.smem // n for n in alone.values()] == [2, 1]
    assert [t.resident for t in tiles.values()] == [1, 1]


@pytest.mark.parametrize("device", ["l4", "rtx4090", "rtx5090"])
def test_float32_decode_tiles_of_head_dimension_256_fit_small_devices(device: str) -> None:
    """Such a device must take fewer rows: blocks of 16 keys cannot be halved."""
    tile = decode_tile(32, 256, 256, torch.float32, "wave", DEVICES[device])
    check_tile(tile, 256, 256, torch.float32, DEVICES[device])


@devices
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(dims, dims, st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_prefill_tiles_fit_shared_memory(
    device: Device,
    dtype: torch.dtype,
    d: int,
    dv: int,
    tma: bool,
    paged: bool,
    aligned: bool,
    tensor_mask: bool,
) -> None:
    """The last candidate is taken whether it fits or not: it must."""
    tma = tma and aligned and not paged  # as tma_possible has it
    tile = prefill_tile(d, dv, dtype, tma, device, paged=paged, aligned=aligned, tensor_mask=tensor_mask)
    check_tile(tile, d, dv, dtype, device, paged)
    if paged and dtype != torch.float32:
        assert tile.stages >= 4  # two for the page look-up, two for K and V
    if tile.tma:
        assert tma
        assert device.arch >= (9, 0)
        assert dtype != torch.float32


@devices
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("change", [{"aligned": False}, {"tensor_mask": True}], ids=str)
def test_what_needs_registers_for_addresses_has_small_tiles(
    device: Device, d: int, change: dict[str, bool]
) -> None:
    """Masks and unaligned rows: no more scores a thread than the tiles of plain calls, and fewer keys a block."""
    plain = prefill_tile(d, d, torch.bfloat16, False, device)
    tile = prefill_tile(d, d, torch.bfloat16, False, device, **change)
    assert tile.rows * tile.keys <= min(plain.rows * plain.keys, 64 * 32)
    if "aligned" in change:
        for rows in (1, 16, 64):
            assert decode_tile(rows, d, d, torch.bfloat16, "wave", device, False).keys <= 32


@pytest.mark.parametrize("rows", range(1, 65))
def test_a_decode_tile_holds_all_rows_of_a_sequence(rows: int) -> None:
    """Up to 64 folded rows K and V are read once: a second tile would read them again. Half precision."""
    tile = decode_tile(rows, 64, 64, torch.bfloat16, "wave", DEVICES["h200"])
    assert tile.rows >= rows
    assert tile.rows <= max(16, 2 * rows - 1)


@pytest.mark.parametrize(("d", "keys"), [(64, 256), (128, 128), (256, 64)])
def test_decode_block_on_an_h200_is_64_kilobytes(d: int, keys: int) -> None:
    """The measured rule: 64 KB of K and V a block keep enough bytes in flight at every head dimension."""
    tile = decode_tile(4, d, d, torch.bfloat16, "wave", DEVICES["h200"])
    assert (tile.rows, tile.keys) == (16, keys)
    assert tile.keys * 2 * d * 2 == 64 * 1024


def test_less_shared_memory_means_smaller_blocks_not_failure() -> None:
    """A device the table does not know may have less."""
    small = replace(DEVICES["h200"], smem=64 * 1024)
    big, tile = (decode_tile(4, 128, 128, torch.bfloat16, "wave", d) for d in (DEVICES["h200"], small))
    assert tile.keys < big.keys
    assert shared_memory(tile, 128, 128, torch.bfloat16) <= small.smem


@given(
    dims,
    dims,
    st.sampled_from((16, 32, 64, 128)),
    st.sampled_from((16, 32, 64, 128)),
    st.integers(1, 5),
    st.booleans(),
)
def test_shared_memory_grows_with_all_that_is_held(
    d: int, dv: int, rows: int, keys: int, stages: int, paged: bool
) -> None:
    """More rows, keys, stages or wider elements never need less; what surely must be held is counted."""

    def of(
        rows: int = rows, keys: int = keys, stages: int = stages, dtype: torch.dtype = torch.bfloat16
    ) -> int:
        return shared_memory(Tile(rows, keys, 4, stages), d, dv, dtype, paged=paged)

    assert of(rows=2 * rows) > of()
    assert of(keys=2 * keys) > of()
    assert of(stages=stages + 1) >= of()
    assert of(dtype=torch.float32) > of()
    assert of() >= 2 * (rows * d + keys * (d + dv))


@pytest.mark.parametrize(("rows", "stages", "buffers"), [(16, 3, 2), (16, 4, 3), (64, 3, 3), (64, 4, 4)])
def test_every_stage_holds_a_block_but_those_of_the_page_look_up(
    rows: int, stages: int, buffers: int
) -> None:
    """Rows in n stages, pages in n + 2."""
    block = 64 * 256 * 2
    for paged, n in ((False, stages), (True, stages + 2)):
        held = shared_memory(Tile(rows, 64, 4, n), 128, 128, torch.bfloat16, paged=paged)
        assert (held - rows * 256 - 8192) // block == buffers


@pytest.mark.parametrize(("form", "rows"), MEASURED)
def test_a_measured_tile_is_what_an_h200_runs(form: Form, rows: int) -> None:
    """d128, which was measured: nothing that the table says is lost on the way, but keys of 64 rows, which would spill."""
    size, warps, stages, resident = MEASURED[form, rows]
    tile = decode_tile(rows, 128, 128, torch.bfloat16, form, DEVICES["h200"])
    assert tile == Tile(rows, min(size // 128, 64 if rows == 64 else 256), warps, stages, resident=resident)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 20, 64])
def test_every_form_has_a_tile_for_any_rows(form: Form, rows: int) -> None:
    """With features and without."""
    for featured in (False, True):
        tile = decode_tile(rows, 128, 128, torch.bfloat16, form, DEVICES["h200"], featured=featured)
        assert rows <= tile.rows <= 64
