"""When each program of a decode plan reads which keys of which sequence, by the planner's cost model."""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from headfold.planner import Device, Plan
from headfold.planner.cost import FIXUP, FIXUP_PER_SPLIT, LAUNCH, START_BLOCKS, rates_of
from headfold.planner.work import key_span
from headfold.problem import Problem

MOST_PROGRAMS = 20_000  # more bars than that are no picture any more


@dataclass(frozen=True, slots=True)
class Program:
    """One program: keys low to high (half-open) of a sequence, for one head unit and one tile of its rows."""

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
    """A program in time: in which slot of the device, from when, when its pipeline is full, and until when (us)."""

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
        ValueError: a plan of another kernel than the Triton decode kernel, wrong lengths, or too many programs.
    """
    if plan.backend != "triton" or plan.kernel != "decode":
        raise ValueError(
            f"--picture draws plans of the triton decode kernel; this one is of the {plan.backend} {plan.kernel} kernel"
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
    fixup = FIXUP + FIXUP_PER_SPLIT * plan.num_splits if plan.num_splits > 1 else 0.0
    runs = _simulated(
        list(_rectangular(problem, plan, lengths)), rates.slots, rates.all, rates.lone, start, per_key
    )
    return Schedule(tuple(runs), rates.slots, LAUNCH * 1e6, fixup * 1e6)


def _rectangular(problem: Problem, plan: Plan, lengths: Sequence[int]) -> Iterator[Program]:
    """Tiles x head units x splits in launch order: every split of a tile has an equal share of its blocks."""
    per_sequence = plan.tiles_per_sequence or -(-problem.max_seqlen_q * plan.fold // plan.block_m)
    number = 0
    for split in range(plan.num_splits):
        for unit in range(plan.head_units):
            for sequence, length in enumerate(lengths):
                for tile in range(per_sequence):
                    low, high = _keys_of_tile(problem, plan, length, tile)
                    blocks = -(-max(0, high - low) // plan.block_n)
                    share = -(-blocks // plan.num_splits) * plan.block_n
                    first = low + split * share
                    if problem.tokens_per_split:
                        share, first = problem.tokens_per_split, split * problem.tokens_per_split
                    last = min(first + share, high)
                    first = min(max(first, low), last)
                    yield Program(number, sequence, tile, unit, split, first, last)
                    number += 1


def _keys_of_tile(problem: Problem, plan: Plan, length: int, tile: int) -> tuple[int, int]:
    """The keys that a tile's rows see in a sequence of that many keys."""
    first = tile * plan.block_m // plan.fold
    last = min((tile + 1) * plan.block_m - 1, problem.max_seqlen_q * plan.fold - 1) // plan.fold
    low, high = key_span(dataclasses.replace(problem, max_seqlen_k=length), first, last)
    if problem.attention_chunk:
        at = max(0, first + (length - problem.max_seqlen_q if problem.bottom_right else 0))
        low = max(low, at // problem.attention_chunk * problem.attention_chunk)
    return min(low, high), high


def _simulated(
    programs: list[Program], slots: int, bandwidth: float, most: float, start: float, per_key: int
) -> list[Run]:
    """Runs of the programs. All that run read at the same rate, so each ends when that many bytes have gone by.

    `start` is a program's start in bytes, `bandwidth` and `most` are bytes/s of all and at most of one.
    """
    waiting, free = deque(programs), list(range(slots))
    running: list[tuple[float, int, Program, float]] = []  # (end, slot, program, start), in bytes gone by
    ended: list[tuple[int, Program, float, float]] = []
    marks, now, gone = [(0.0, LAUNCH)], LAUNCH, 0.0  # bytes gone by, and when
    while waiting or running:
        while waiting and free:
            program = waiting.popleft()
            work = start + program.keys * per_key if program.keys else 0.0
            heapq.heappush(running, (gone + work, heapq.heappop(free), program, gone))
        rate = min(most, bandwidth / len(running))
        end, slot, program, began = heapq.heappop(running)
        now, gone = now + (end - gone) / rate, end
        marks.append((gone, now))
        ended.append((slot, program, began, end))
        heapq.heappush(free, slot)

    def at(mark: float) -> float:
        """Microseconds at which so many bytes had gone by."""
        i = bisect.bisect_left(marks, (mark, 0.0), 1, len(marks) - 1)
        (a, since), (b, until) = marks[i - 1], marks[i]
        return 1e6 * (since + (until - since) * ((mark - a) / (b - a) if b > a else 1.0))

    runs = [Run(p, slot, at(x), at(min(x + start, y)), at(y)) for slot, p, x, y in ended]
    return sorted(runs, key=lambda r: r.program.number)
