"""When each program of a decode plan reads which keys of which sequence, by the planner's cost model."""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from headfold.planner import Device, Plan
from headfold.planner.cost import LAUNCH, START_BLOCKS, fixup_seconds, rates_of
from headfold.planner.schedule import count_blocks, shares, tile_keys
from headfold.problem import Problem

MOST_PROGRAMS = 20_000  # more bars than that are no picture any more


@dataclass(frozen=True, slots=True)
class Program:
    """Keys low to high (half-open) of a sequence, for one head unit and one tile of its rows, read by program `number`.

    A program of a stream reads several such runs, one after the other; `split` is its range.
    """

    number: int
    sequence: int
    tile: int
    unit: int
    split: int
    low: int
    high: int

    @property
    def keys(self) -> int:
        """How many keys it reads."""
        return self.high - self.low


@dataclass(frozen=True, slots=True)
class Run:
    """A program's keys of one sequence in time: in which slot of the device, from when, when its pipeline is full, and
    until when (us)."""

    program: Program
    slot: int
    start_us: float
    full_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Schedule:
    """All runs, how many programs run at a time, and the fixup behind the last of them (no length where none is)."""

    runs: tuple[Run, ...]
    slots: int
    launch_us: float
    fixup_us: float

    @property
    def loop_end_us(self) -> float:
        """When the last program ends."""
        return max((r.end_us for r in self.runs), default=self.launch_us)

    @property
    def end_us(self) -> float:
        """When the result is there."""
        return self.loop_end_us + self.fixup_us

    @property
    def idle(self) -> float:
        """The share of slot time, from the first start to the last end, in which nothing runs."""
        whole = self.slots * (self.loop_end_us - self.launch_us)
        busy = sum(r.end_us - r.start_us for r in self.runs)
        return 1 - busy / whole if whole else 0.0


def schedule_of(problem: Problem, plan: Plan, device: Device, lengths: Sequence[int]) -> Schedule:
    """When every program runs, for these lengths.

    Programs start in launch order wherever one has ended; those that run share the bandwidth, and one
    gets no more than lone programs do. A program's start costs what the cost model says.

    Args:
        problem, plan, device: what was planned.
        lengths: keys of every sequence, none above the problem's bound.

    Raises:
        ValueError: a plan of another kernel than a GPU's decode kernels, wrong lengths, or too many programs.
    """
    if plan.backend == "cpu" or plan.kernel != "decode":
        raise ValueError(
            f"--picture draws plans of the decode kernels of GPUs; this one is of the {plan.backend} {plan.kernel} kernel"
        )
    if len(lengths) != problem.batch or not all(0 <= n <= problem.max_seqlen_k for n in lengths):
        raise ValueError(
            f"--lengths has {len(lengths)} entries up to {max(lengths, default=0)}; it must hold {problem.batch} "
            f"numbers of keys from 0 to {problem.max_seqlen_k}"
        )
    if plan.programs > MOST_PROGRAMS:
        raise ValueError(f"--picture would draw {plan.programs} programs; {MOST_PROGRAMS} are the most")
    rates = rates_of(plan, device)
    per_key = (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    start = START_BLOCKS * plan.block_n * per_key
    order = _stream if plan.ranges else _rectangular
    programs = [list(group) for _, group in groupby(order(problem, plan, lengths), lambda p: p.number)]
    runs = _simulated(programs, rates.slots, rates.all, rates.lone, start, per_key)
    fixup = fixup_seconds(problem, plan)
    return Schedule(tuple(runs), rates.slots, LAUNCH * 1e6, fixup * 1e6)


def _rectangular(problem: Problem, plan: Plan, lengths: Sequence[int]) -> Iterator[Program]:
    """Sequences x splits x tiles x head units in launch order: every split of a tile has an equal share of its blocks."""
    per_sequence = plan.tiles_per_sequence or -(-problem.max_seqlen_q * plan.fold // plan.block_m)
    number = 0
    for sequence, length in enumerate(lengths):
        for split in range(plan.num_splits):
            for tile in range(per_sequence):
                low, high = tile_keys(problem, plan.fold, plan.block_m, length, tile)
                if plan.extent:
                    extent = low // plan.extent + split
                    first, last = extent * plan.extent, (extent + 1) * plan.extent
                else:
                    share, longer = divmod(-(-max(0, high - low) // plan.block_n), plan.num_splits)
                    begin = split * share + min(split, longer)
                    first = low + begin * plan.block_n
                    last = first + (share + (split < longer)) * plan.block_n
                last = max(low, min(last, high))
                first = min(max(first, low), last)
                for unit in range(plan.head_units):
                    yield Program(number, sequence, tile, unit, split, first, last)
                    number += 1


def _stream(problem: Problem, plan: Plan, lengths: Sequence[int]) -> Iterator[Program]:
    """Ranges x tiles x head units in launch order: what each range owns of the list of sequences."""
    extent_blocks = -(-plan.extent // plan.block_n)
    owned: list[tuple[list[tuple[int, int]], list[list[int]], list[list[int]]]] = []
    for tile in range(plan.tiles_per_sequence):
        spans = [tile_keys(problem, plan.fold, plan.block_m, length, tile) for length in lengths]
        lows, highs = torch.tensor(spans).T
        blocks = count_blocks(lows, highs, plan.block_n, plan.extent)
        used = plan.even_ranges if bool((blocks == blocks[0]).all()) else plan.ranges
        begin, end = shares(blocks, used, plan.gap, extent_blocks)
        empty = [[0] * len(lengths)] * (plan.ranges - used)
        owned.append((spans, begin.tolist() + empty, end.tolist() + empty))
    number = 0
    for r in range(plan.ranges):
        for tile, (spans, begins, ends) in enumerate(owned):
            mine = []
            for sequence, (low, high) in enumerate(spans):
                first, last = (
                    _key_of(plan, low, block) for block in (begins[r][sequence], ends[r][sequence])
                )
                if begins[r][sequence] < ends[r][sequence]:
                    mine.append((sequence, max(low, first), min(last, high)))
            for unit in range(plan.head_units):
                for sequence, first, last in mine or [(0, 0, 0)]:
                    yield Program(number, sequence, tile, unit, r, first, last)
                number += 1


def _key_of(plan: Plan, low: int, block: int) -> int:
    """Where a block of a tile begins that sees keys from `low` on."""
    if not plan.extent:
        return low + block * plan.block_n
    extents, rest = divmod(block, -(-plan.extent // plan.block_n))
    return (low // plan.extent + extents) * plan.extent + rest * plan.block_n


def _simulated(
    programs: list[list[Program]], slots: int, bandwidth: float, most: float, start: float, per_key: int
) -> list[Run]:
    """Runs of the programs. All that run read at the same rate, so each ends when that many bytes have gone by.

    Each program is the list of its runs. `start` is a run's start in bytes, `bandwidth` and `most` are bytes/s of all
    and at most of one.
    """
    waiting, free = deque(programs), list(range(slots))
    # (end, slot, run number, program, start), in bytes gone by
    running: list[tuple[float, int, int, list[Program], float]] = []
    ended: list[tuple[int, Program, float, float]] = []
    marks, now, gone = [(0.0, LAUNCH)], LAUNCH, 0.0  # bytes gone by, and when

    def begin(program: list[Program], i: int, slot: int) -> None:
        work = start + program[i].keys * per_key if program[i].keys else 0.0
        heapq.heappush(running, (gone + work, slot, i, program, gone))

    while waiting or running:
        while waiting and free:
            begin(waiting.popleft(), 0, heapq.heappop(free))
        rate = min(most, bandwidth / len(running))
        end, slot, i, program, began = heapq.heappop(running)
        now, gone = now + (end - gone) / rate, end
        marks.append((gone, now))
        ended.append((slot, program[i], began, end))
        if i + 1 < len(program):
            begin(program, i + 1, slot)
        else:
            heapq.heappush(free, slot)

    def at(mark: float) -> float:
        """Microseconds at which so many bytes had gone by."""
        i = bisect.bisect_left(marks, (mark, 0.0), 1, len(marks) - 1)
        (a, since), (b, until) = marks[i - 1], marks[i]
        return 1e6 * (since + (until - since) * ((mark - a) / (b - a) if b > a else 1.0))

    runs = [Run(p, slot, at(x), at(min(x + start, y)), at(y)) for slot, p, x, y in ended]
    return sorted(runs, key=lambda r: (r.program.number, r.start_us))
