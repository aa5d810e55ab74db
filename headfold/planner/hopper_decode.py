"""Tiles for the Gluon decode of Hopper GPUs: which calls it takes, and in which form."""

from __future__ import annotations

from dataclasses import replace

from headfold.extras import FAR_CACHE
from headfold.planner.device import Device
from headfold.planner.hopper import FEWEST_PAGE_ROWS, no_boxes, padded_dim, page_rows, pages_reason, refusal
from headfold.planner.plan import Plan
from headfold.planner.tiles import Tile
from headfold.problem import Problem

# Folded rows of one consumer of the decode kernel, and how many consumers share a tile at the most.
CONSUMER_ROWS = 64
CONSUMERS = 2
# Folded rows of tiles whose products have queries in columns, not in rows (`kernels/hopper/decode_few.py`).
FEW_ROWS = (16, 32)
# Folded rows up to which the Triton decode kernel keeps up with memory, where the lengths are the same.
TRITON_ROWS = 16
# Bytes of a box up to which the decode kernel copies rows of few queries instead. On an H200, us, in boxes and copied: 32:8
# d128 b16 s8192 in pages of 8 133.1 and 128.3, of 16 129.3 and 127.9; 64 ragged sequences 357.1 and 344.2, 345.1 and 344.3;
# 64:8 d64 b16 in pages of 16 73.1 and 71.1; but b2 s4096 in pages of 16 11.3 and 12.1.
SMALL_BOX = 4 << 10
# The same where a program has its multiprocessor to itself, for rows of up to 128 bytes: 64:8 d64 b16 s8192 in pages of 16,
# boxes of 2 KB, takes 67.8 us in boxes and 68.9 copied. Longer rows are copied always. In boxes and copied: 32:8 d128 b16 s8192
# in pages of 16 127.0 and 124.4, of 64 124.4 and 123.7, of 128 123.3 and 123.5; 96:8 b4 s65536 in pages of 64 248.0 and 244.3;
# 32 ragged sequences in pages of 64 151.9 and 149.7.
SMALL_BOX_OF_SHORT_ROWS = 1 << 10
SHORT_ROW = 128
# Bytes of a block of K and V of which two programs of a multiprocessor have three buffers each.
TWIN_BYTES = 32 << 10
# Sequences a range up to which few rows have one program a multiprocessor. With two each is cut in more parts, which must be
# merged, and blocks are half as long; with one nothing hides where a sequence ends. On an H200, 32:8 d128, us, with two and
# with one: 16 of 8192 keys in rows 125.5 and 121.4, in pages of 16 127.8 and 124.4, 16 of 1024 22.5 and 20.7, 32 of 8192 242.3
# and 237.8; 8 to 32 ragged ones in pages of 16 47.5 and 47.4, 77.0 and 77.4, 147.8 and 148.1; 64 ragged ones 326.4 and 330.9,
# 256 of 128 keys 56.4 and 69.8.
ALONE = 2
MOST_STAGES = 6


def decode_tile(p: Problem, device: Device, rows: int, units: int, streamed: bool = False) -> Tile | str:
    """The decode kernel's tile for `rows` folded rows of each of `units` head units, or why the Triton kernel takes them.

    Empty where there is nothing to say: few rows that are not `streamed`, cut by lengths that the device knows, and other GPUs.
    """
    if device.arch != (9, 0) or p.device_type == "cpu":
        return ""
    few = rows <= TRITON_ROWS
    if few and not streamed:
        return ""
    keys = decode_keys(p)
    # Two consumers of wide heads spill, and shared memory holds two stages for them.
    consumers = 1 if keys < 128 else min(CONSUMERS, -(-rows // CONSUMER_ROWS))
    reason = decode_refusal(p, copies=consumers == 1)
    if few and (reason or p.featured):
        return ""
    if reason:
        return f"the Triton kernel, not the Gluon one, {reason}"
    if not few:
        return decode_tile_of(p, device, rows, consumers, keys)
    ranges = max(1, device.sms - p.sm_margin) // units
    if p.batch <= ALONE * ranges:
        return decode_tile_of(p, device, rows, 1, keys, boxes=not copies_rows(p, keys, alone=True))
    return twin_tile(p, device, rows)


def beside_tile(p: Problem, device: Device, rows: int) -> Tile | None:
    """The tile of a decode of few `rows` that has its multiprocessors to itself, beside a prefill on the others.

    None where this kernel does not take it.
    """
    if p.featured or decode_refusal(p, copies=True):
        return None
    return decode_tile_of(p, device, rows, 1, decode_keys(p))


def decode_refusal(p: Problem, copies: bool = False) -> str:
    """Why the decode kernel cannot run `p`, as the end of a sentence; empty when it can.

    `copies`: one consumer can take keys that are copied row by row.
    """
    reason = refusal(p, decode_columns(p), tuple(word for word in p.extras if word != FAR_CACHE))
    if not reason and p.tensor_mask:
        reason = "whose decode has no masks"
    if not reason and p.kv_layout == "paged" and page_rows(p, decode_keys(p)) < FEWEST_PAGE_ROWS:
        if not copies:
            reason = no_boxes(p)
        elif FAR_CACHE in p.extras:
            reason = "which copies no rows from more than 32 GiB"
    if not reason and p.tokens_per_split:
        reason = "which has no fixed splits"
    return reason


def twin_tile(p: Problem, device: Device, rows: int, copies: bool = True) -> Tile:
    """One consumer's tile for `rows` in blocks small enough for two programs a multiprocessor, where heads are not too wide.

    What waits in one program, for its queries or for the ends of a tile, the other one fills. Without `copies` all pages
    come in boxes.
    """
    d, dv = decode_columns(p)
    fitting = [n for n in (128, 64) if n * (d + dv) * p.dtype.itemsize <= TWIN_BYTES]
    keys, resident = (fitting[0], 2) if fitting else (decode_keys(p), 1)
    return decode_tile_of(p, device, rows, 1, keys, resident, boxes=not (copies and copies_rows(p, keys)))


def copies_rows(p: Problem, keys: int, alone: bool = False) -> bool:
    """Whether rows of few queries' pages are copied though boxes could bring them, to a program that is `alone` or is not."""
    if p.kv_layout != "paged" or FAR_CACHE in p.extras:
        return False
    row = p.head_dim * p.dtype.itemsize
    if alone and row > SHORT_ROW:
        return True
    return page_rows(p, keys) * row <= (SMALL_BOX_OF_SHORT_ROWS if alone else SMALL_BOX)


def decode_tile_of(
    p: Problem, device: Device, rows: int, consumers: int, keys: int, resident: int = 1, boxes: bool = True
) -> Tile:
    """A tile of the decode kernel for `rows`, with as many stages as shared memory has room for beside its other programs.

    Rows are copied where they do not come in `boxes`, and where pages are too small for them.
    """
    height = next((n for n in FEW_ROWS if rows <= n), CONSUMER_ROWS * consumers)
    tile = Tile(height, keys, 4 * (consumers + 1), 1, tma=boxes, resident=resident)
    stages = MOST_STAGES
    while decode_memory(p, tile, stages) > device.smem // resident:
        stages -= 1
    return replace(tile, stages=stages)


def decode_memory(p: Problem, tile: Tile, stages: int) -> int:
    """Bytes of shared memory that the decode kernel needs, an upper bound."""
    d, dv = decode_columns(p)
    places = 8 * tile.keys if decode_box(p, tile) == 1 else 0  # where rows of K and of V begin
    weights = 2 * tile.rows * tile.keys if tile.rows < CONSUMER_ROWS else 0
    return (tile.rows * d + weights + stages * tile.keys * (d + dv)) * p.dtype.itemsize + places + 1024


def decode_box(p: Problem, tile: Tile) -> int:
    """Keys of a box of a paged cache; 1 where rows are copied, 0 without pages."""
    if p.kv_layout != "paged":
        return 0
    rows = page_rows(p, tile.keys)
    return rows if tile.tma and rows >= FEWEST_PAGE_ROWS else 1


def on_hopper(plan: Plan, p: Problem, tile: Tile) -> Plan:
    """A decode's plan for the Triton kernel, as the Gluon one runs it in `tile`."""
    d, dv = decode_columns(p)
    box = decode_box(p, tile)
    consumers = max(1, tile.rows // CONSUMER_ROWS)
    what = "a warpgroup computes" if consumers == 1 else f"{consumers} warpgroups compute"
    fetches = "four warps copy" if box == 1 else "a warp fetches through the copy engine"
    reasons = [*plan.reasons, f"{what} while {fetches} (Gluon, docs/hopper.md)", *pages_reason(p, box)]
    return replace(
        plan,
        backend="hopper",
        d_parts=(d, 0),
        dv_parts=(dv, 0),
        page_rows=box,
        shared_memory=decode_memory(p, tile, tile.stages),
        reasons=tuple(reasons),
    )


def decode_columns(p: Problem) -> tuple[int, int]:
    """Columns of the decode kernel's tiles, of queries and keys and of values; 0 where it has none for them."""
    return padded_dim(p.head_dim), padded_dim(p.head_dim_v)


def decode_keys(p: Problem) -> int:
    """Keys of a block of the decode kernel."""
    return 128 if max(decode_columns(p)) <= 128 else 64
