"""The plan of a shared prefix and of what follows it in one launch (`headfold/kernels/hopper/pair.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headfold.planner.device import Device
from headfold.planner.gpu import GAP, choose_fold
from headfold.planner.hopper import decode_columns, decode_refusal, decode_tile_of, page_rows
from headfold.planner.plan import Plan
from headfold.problem import Problem

# Of what a multiprocessor's tensor cores promise, the share that the loop reaches over a tile of 128 rows.
PRODUCTS = 0.57
# Bytes/s that a multiprocessor reads when half of them read, over the even share of the bandwidth of all.
READS = 1.4


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
    consumers = 2 if max(decode_columns(p)) <= 128 else 1
    tile = decode_tile_of(p, device, consumers)
    programs = max(1, device.sms - p.sm_margin)
    rows = (p.max_seqlen_q * fold, max(sizes) * p.max_seqlen_q * fold)
    tiles = [-(-n // tile.rows) for n in rows]
    lanes = [units * n for n in tiles]
    if sum(lanes) > programs:
        return None
    most = ((programs - lanes[1]) // lanes[0], (programs - lanes[0]) // lanes[1])
    width = p.head_dim + p.head_dim_v
    products = 2 * tile.rows * tile.keys * width / (PRODUCTS * device.matmul_flops / device.sms)
    read = tile.keys * width * p.dtype.itemsize / (READS * device.bandwidth / device.sms)
    weights = (read, max(read, products))
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
        early=device.starts_early,
        d_parts=(d, 0),
        dv_parts=(dv, 0),
        paged=True,
        page_rows=page_rows(p, tile.keys),
        aligned=p.aligned,
    )
    return PairPlan(whole, part(0), part(1), programs)
