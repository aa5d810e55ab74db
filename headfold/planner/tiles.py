"""Tile shapes: how many rows, keys, warps and stages, and the shared memory they take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from headfold.planner.device import Device
from headfold.planner.tuned import ALIKE, Form, entries_for

# Tokens of a sequence that a decode program writes into the cache at the most: one load and one store, without a loop.
MOST_NEW = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """A launchable tile: `rows` folded rows, `keys` per block, warps, pipeline stages, TMA or pointer loads.

    `resident` programs of it share a multiprocessor, or as many as its shared memory allows. `own` tiles come from the
    machine's own table.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    tma: bool = False
    resident: int = 1
    own: bool = False


def split_dim(d: int) -> tuple[int, int]:
    """Cut a head dimension into powers of two, (first, second), second 0 where the first covers it.

    The first is the largest power of two in d and the second covers the rest, at least 32 wide (16 makes the
    layouts of the second part spill at d = 80), unless that pays for as much as rounding d up would.
    """
    if d <= 16:
        return 16, 0
    first = 1 << (d.bit_length() - 1)
    if first == d:
        return d, 0
    second = max(32, next_power_of_two(d - first))
    return (2 * first, 0) if first + second >= 2 * first else (first, second)


def next_power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(0, n - 1).bit_length()


def padded(d: int) -> int:
    """Columns a head dimension takes up in a tile."""
    return sum(split_dim(d))


def shared_memory(tile: Tile, d: int, dv: int, dtype: torch.dtype, *, paged: bool = False) -> int:
    """Bytes of shared memory a tile needs: the queries, K and V in every buffer of the pipeline, and scratch.

    An upper bound of what Triton 3.6 to 3.9 allocates; tests compare it with what the compiler reports.
    """
    block = tile.keys * (padded(d) + padded(dv)) * dtype.itemsize
    queries = tile.rows * padded(d) * dtype.itemsize
    stages = tile.stages
    if paged:  # a page look-up takes two of more than three stages, which hold indices only
        stages = min(stages, max(3, stages - 2))
    # Asynchronous products of 64 rows and more (wgmma) hold a buffer until they are waited for.
    buffers = stages if tile.rows >= 64 else max(1, stages - 1)
    indices = tile.stages * tile.keys * 8
    return queries + buffers * block + indices + 8192


# (form, rows) -> (keys x head dimension of a block, warps, stages, programs a multiprocessor). On one H200, bf16, by
# CUDA graphs; "x read" is the time of a pure read of the same bytes.
MEASURED: dict[tuple[Form, int], tuple[int, int, int, int]] = {
    # 64 KB of K and V a block, double-buffered: 32:8 d128 b16 s8192 1.023 x read (64 keys, 2 programs: 1.06), 64:8
    # d64 1.04 with 256 keys (128: 1.13), 16:2 d256 b16 1.04 with 64 keys (32: 1.09).
    ("wave", 16): (128 * 128, 4, 3, 1),
    # 32:1 b16 s16384 in 8 splits: 1.15, with 64 keys 1.29.
    ("wave", 32): (128 * 128, 4, 3, 1),
    # As wgmma: 32:1 in such tiles 1.33, as with 64 keys in 4 stages; with 128 keys 1.5.
    ("wave", 64): (32 * 128, 4, 4, 2),
    # 32:8 b128 s2048 1.045 x read, with 128 keys 1.076, 1.063 in 8 warps; 64 keys in 5 stages 1.13.
    ("waves", 16): (64 * 128, 4, 4, 1),
    # 32:8 b1 s1024 in 16 splits 5.3 us, in 3 stages 5.4, 8 splits of 128 keys 5.4.
    ("few", 16): (64 * 128, 4, 4, 1),
    # Caches with their lengths on the device: one arithmetic for rows and pages, so that both have the same bits. 64
    # sequences of 32:8 d128 in rows 1.05, with 128 keys and 8 warps 1.042; in pages of 16, 64, 1: 1.067, 1.070, 1.088, with
    # 128 keys 1.16 to 1.21, and with 3 programs 1.29. The look-up of pages takes two stages of the pipeline for itself.
    ("stream", 16): (64 * 128, 4, 3, 2),
    ("pages", 16): (64 * 128, 4, 5, 2),
    # 8 queries of 32:8 b16 s8192 in rows 1.18 x read, in pages of 16 1.55; 64 keys and one program in 4 warps 1.34 and
    # 2.36, in 8 warps 1.77 and 2.03; 32 rows of 64 keys 1.18 and 1.43, but 16 queries would read twice: 2.0 and 2.7.
    ("stream", 64): (32 * 128, 4, 4, 2),
    ("pages", 64): (32 * 128, 4, 6, 2),
}


def decode_tile(
    rows: int,
    d: int,
    dv: int,
    dtype: torch.dtype,
    form: Form,
    device: Device,
    aligned: bool = True,
    *,
    featured: bool = False,
    tensor_mask: bool = False,
    rotary: bool = False,
) -> Tile:
    """The tile of the decode kernel for `rows` folded rows of a sequence.

    Rows that are not 16-byte aligned are loaded element by element through registers: larger blocks would spill. Rows
    that are to be rotated run 16 at a time (at 64 they spill 1,400 bytes). Compiled programs are a budget: features,
    unaligned rows, streams and pages know no tile of 32 rows.

    The machine's own table (`device.tiles`) comes before MEASURED, for whole heads and for programs of the kind that
    it was measured with: masks and rotation take registers that those do not.
    """
    wide = max(padded(d), padded(dv))
    block_m = 16 if rotary else min(max(16, next_power_of_two(rows)), 64)
    if block_m == 32 and (featured or tensor_mask or not aligned or form in ALIKE):
        block_m = 64
    if form in ("waves", "few") and block_m > 16:
        form = "wave"
    alike: tuple[Form, ...] = ALIKE if form in ALIKE else (form,)
    stages_of: dict[Form, int] = {f: 5 if f == "pages" else 3 for f in alike}
    stages = stages_of[form]
    parts = split_dim(d)[1] or split_dim(dv)[1]
    own = {}
    if not (parts or tensor_mask or rotary):
        own = entries_for(device.tiles, alike, block_m, padded(d) + padded(dv))
    if dtype == torch.float32:
        # Full float32 products run on the FMA units with their operands in registers: larger tiles spill.
        if wide > 64 and aligned:
            # Heads in two parts in pages: with 32 keys two registers spill (d96). Rows of a cache are computed alike.
            small = Tile(16, 16 if form in ALIKE and parts else 32, 8, stages)
        else:
            small = Tile(16, 16, 8 if wide > 64 else 4, stages)
        tile = small if rows <= 16 or rotary else Tile(32, 16, 16, stages)
    elif not aligned:
        tile = Tile(block_m, 32, 8, stages)
    elif block_m >= 32 and wide > 128:
        tile = Tile(64, 64, 8, stages) if block_m == 64 else Tile(32, 32, 4, stages)
    elif own:
        entry, stages_of = own[form], {f: e.stages for f, e in own.items()}
        tile = Tile(block_m, entry.keys, entry.warps, entry.stages, resident=entry.resident, own=True)
    else:
        size, warps, stages, resident = MEASURED[form, block_m]
        stages_of = {f: MEASURED[f, block_m][2] for f in alike}
        # The largest power of two of keys that is not above the measured size of a block.
        keys = min(256, next_power_of_two(2 * size // (padded(d) + padded(dv)) + 1) // 2)
        keys = min(keys, 64) if block_m == 64 else keys
        tile = Tile(block_m, keys, warps, stages, resident=resident)

    def needed(tile: Tile) -> int:
        """Rows of a cache give way where its pages do, which hold more: the same keys and the same cuts."""
        return max(
            shared_memory(replace(tile, stages=n), d, dv, dtype, paged=f == "pages")
            for f, n in stages_of.items()
        )

    if tile.own and needed(tile) > device.smem:
        # It runs as it was measured or not at all; rows and pages alike.
        return decode_tile(rows, d, dv, dtype, form, replace(device, tiles=()), aligned, featured=featured)
    while needed(tile) > device.smem and tile.keys > 16:
        tile = replace(tile, keys=tile.keys // 2)
    while needed(tile) > device.smem and tile.rows > 16:
        tile = replace(tile, rows=tile.rows // 2, warps=max(4, tile.warps // 2))
    return replace(tile, resident=max(1, min(tile.resident, device.smem // needed(tile))))


def prefill_tile(
    d: int,
    dv: int,
    dtype: torch.dtype,
    tma_possible: bool,
    device: Device,
    *,
    paged: bool = False,
    aligned: bool = True,
    tensor_mask: bool = False,
) -> Tile:
    """The tile of the prefill kernel: the first of a measured order that fits the shared memory.

    On an H200 (bf16, 4096 queries and keys, no mask, TFLOP/s): d128 through the copy engine 64 x 64 with 4 warps
    474 (two programs share a multiprocessor, one's softmax runs beside the other's products), 128 x 128 with 8
    warps 364; through pointers 128 x 64 with 8 warps 428, 64 x 64 with 4 warps 402. d64 64 x 128 406, 64 x 64
    350. d256 128 x 32 389, 128 x 64 359. Masks given as tensors and unaligned rows need registers for addresses
    and elements, and larger tiles spill: an additive mask per head (32:8, d128) runs at 138 TFLOP/s in 64 x 32 with
    4 warps, at 93 in 64 x 64.
    """
    wide = max(padded(d), padded(dv))
    extra = 2 if paged else 0  # the page look-up's own stages, as in decode_tile
    if dtype == torch.float32:
        return Tile(64, 16, 16, 2) if 64 < wide <= 128 else Tile(32, 16, 16, 2)
    tma = tma_possible and device.arch >= (9, 0)
    if tensor_mask and tma and wide <= 128:
        candidates = [Tile(64, 32, 4, 3, True)]
    elif not aligned or tensor_mask:
        candidates = [Tile(64, 32, 8, 2 + extra), Tile(64, 16, 8, 2 + extra)]
    elif wide <= 64:
        candidates = [Tile(64, 128, 4, 3, True)] if tma else []
        candidates += [Tile(128, 64, 8, n + extra) for n in (3, 2)] + [Tile(128, 32, 8, 2 + extra)]
    elif wide <= 128:
        candidates = [Tile(64, 64, 4, 3, True)] if tma else []
        candidates += [Tile(128, 64, 8, n + extra) for n in (3, 2)]
        candidates += [Tile(128, 32, 8, 2 + extra), Tile(64, 32, 4, 2 + extra)]
    else:
        candidates = [Tile(128, 32, 8, 3, True)] if tma else []
        candidates += [Tile(64, keys, 8, 2 + extra) for keys in (64, 32, 16)]
    fitting = (t for t in candidates if shared_memory(t, d, dv, dtype, paged=paged) <= device.smem)
    return next(fitting, candidates[-1])
