"""The plan of a shared prefix and of what follows it in one launch (`headfold/kernels/hopper/pair.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headfold.planner.device import Device
from headfold.planner.gpu import GAP, choose_fold
from headfold.planner.hopper import page_rows
from headfold.planner.hopper_decode import (
    CONSUMER_ROWS,
    decode_columns,
    decode_memory,
    decode_refusal,
    twin_tile,
)
from headfold.planner.plan import Plan
from headfold.problem import Problem

# How programs are shared out between prefixes and what follows them: the softmax of a score counts as so many operations of the
# products, and what follows is read at so many times the even share of the bandwidth, but no block of it costs less than its
# products, which have 64 rows however few there are. On an H200, us, with 0.7, 1, 1.4, 2, 2.8 times: 64 sequences over 8192
# shared keys with 512 of their own 85.4, 66.6, 58.0, 57.8, 62.3, with 1 to 1024 84.4, 84.8, 65.1, 59.0, 59.0; 8 groups of 8
# over 2048 82.8, 70.4, 64.6, 62.2, 63.5; 16 with 2048 behind 4096 57.5, 57.3, 49.7, 48.2, 48.8 (all 32:8 d128). 32 of 64:8 d64
# over 8192, where products count, 27.8 with 1.4, 34.0 with 2.
SOFTMAX = 386
READS = 2.0


@dataclass(frozen=True, slots=True)
class Part:
    """One of the two lists: `lanes` programs a range, what a block costs (ns), rows of a state, number of the first state of a
    sequence that is not cut, and rows of all states. `tiles` counts the tiles of a head unit in the whole list."""

    tiles: int
    lanes: int
    weight: int
    state_rows: int
    uncut: int
    rows: int


@dataclass(frozen=True, slots=True)
class PairPlan:
    """How both lists run: what they share as a Plan, what each has of its own, and the programs of both."""

    whole: Plan
    own: Part
    prefix: Part
    programs: int


def plan_pair(p: Problem, device: Device, sizes: Sequence[int]) -> PairPlan | None:
    """The plan of a call whose groups of `sizes` sequences share prefixes, None where the parts run one after the other.

    Args:
        p: the Problem of the whole call.
        device: the Device.
        sizes: sequences of each group.
    """
    if device.arch != (9, 0) or p.device_type == "cpu" or p.kv_layout != "paged" or p.num_splits:
        return None
    if decode_refusal(p) or (p.window_left is not None):
        return None
    fold, _ = choose_fold(p)
    if fold != p.group:
        return None
    units = p.num_heads // fold
    tile = twin_tile(p, device, CONSUMER_ROWS, copies=False)
    programs = max(1, device.sms - p.sm_margin) * tile.resident
    rows = (p.max_seqlen_q * fold, max(sizes) * p.max_seqlen_q * fold)
    tiles = [-(-n // tile.rows) for n in rows]
    lanes = [units * n for n in tiles]
    if sum(lanes) > programs:
        return None
    most = ((programs - lanes[1]) // lanes[0], (programs - lanes[0]) // lanes[1])
    width = p.head_dim + p.head_dim_v
    scores = tile.rows * tile.keys
    products = scores * (2 * width + SOFTMAX) / (device.matmul_flops / device.sms)
    read = tile.keys * width * p.dtype.itemsize / (READS * device.bandwidth / device.sms)
    weights = (max(read, products), products)
    sequences = (p.batch, len(sizes))

    def part(i: int) -> Part:
        height, uncut = min(tile.rows, rows[i]), 2 * most[i]
        states = (uncut + sequences[i]) * lanes[i] * height
        return Part(sequences[i] * tiles[i], lanes[i], round(1e9 * weights[i]), height, uncut, states)

    d, dv = decode_columns(p)
    whole = Plan(
        backend="hopper",
        kernel="decode",
        fold=fold,
        block_m=tile.rows,
        block_n=tile.keys,
        head_units=units,
        gap=GAP,
        num_warps=tile.warps,
        num_stages=tile.stages,
        resident=tile.resident,
        early=device.starts_early,
        d_parts=(d, 0),
        dv_parts=(dv, 0),
        paged=True,
        page_rows=page_rows(p, tile.keys),
        aligned=p.aligned,
        shared_memory=decode_memory(p, tile, tile.stages),
    )
    return PairPlan(whole, part(0), part(1), programs)
