"""The time that a decode plan will take, predicted from bytes, waves, tail, starts and fixup.

A pure function of Problem, Plan and Device. Its constants are shares of what the device promises, fitted to the
decode rows of one H200 (bf16, CUDA graphs over rotated buffers); of the 43 rows of
benchmarks/results/h200.json 41 come out within 20 %. `headfold bench --predict` sets them beside what a run measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from headfold.planner.device import Device
from headfold.planner.plan import Plan, bytes_to_move
from headfold.problem import Problem

# Of the bandwidth that the data sheet promises: a pure read reaches 97 %, the decode kernel's loop 1.5 % less.
READ_SHARE = 0.955
# Seconds from the launch to the first byte, and from the last byte to the end: a pure read of 33 to 4295 MB takes
# 2.7 us and its bytes at the rate above, at every size.
LAUNCH = 2.7e-6
# What a program's start costs, in the time that a multiprocessor takes for one block: its pipeline fills while nothing
# else of its multiprocessor reads. One full wave of 32:8 d128 takes 3 us more than its bytes, four take 14.
START_BLOCKS = 1.2
# The kernel that merges states: 2.5 us at 2 splits (32:4 b16), 6 us at 64 (16:2 d256 b1).
FIXUP = 2.5e-6
FIXUP_PER_SPLIT = 0.055e-6
# How much faster than its even share of the bandwidth a multiprocessor reads when few of them run: 8, 16 and 32 programs
# of 32:8 d128 over 32768 keys read 49, 48 and 46 GB/s each, 64 read 42, and the even share is 35.
LONE_RATE = 1.4
# Page look-ups beside the loop: 1 to 5 % at pages of 1, 16 and 64 keys, the least where every head has its own K.
PAGED = 1.04


class NoPrediction(ValueError):
    """A plan that this model says nothing about, with the reason."""


def predicted_seconds(problem: Problem, plan: Plan, device: Device) -> float:
    """The time of one call on the GPU, launches included, the host's part of a launch not.

    Lengths are taken at their bounds. Where the sequences' lengths sum up to less than batch x the longest, the
    difference is taken to be tail: the programs of the longest sequence run on when the others have ended.

    Raises:
        NoPrediction: a CPU, whose rates are not known, or a prefill plan, whose time is the arithmetic's.
    """
    if device.is_cpu:
        raise NoPrediction("no predicted time: a CPU's rates are not known")
    if plan.kernel == "none":
        return 0.0
    if plan.kernel != "decode":
        raise NoPrediction("no predicted time: only decode is predicted, which is bound by memory")
    rates = rates_of(plan, device)
    loop = _stream_loop if plan.ranges else _ragged_loop if _is_ragged(problem) else _even_loop
    seconds = LAUNCH + loop(problem, plan, rates) * (PAGED if problem.kv_layout == "paged" else 1.0)
    return seconds + fixup_seconds(problem, plan)


def fixup_seconds(problem: Problem, plan: Plan) -> float:
    """What the merge of a plan's states adds, with as many states a tile as it has programs."""
    if plan.ranges:
        states = plan.num_splits if plan.extent else -(-plan.ranges // problem.batch) + 1
    else:
        states = plan.num_splits
    return FIXUP + FIXUP_PER_SPLIT * states if states > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Programs that run at a time, and bytes/s: of one when all of them run, and of a multiprocessor's share."""

    slots: int
    share: float
    even: float

    @property
    def all(self) -> float:
        """Of the whole device."""
        return self.slots * self.share

    @property
    def lone(self) -> float:
        """Of one program when few are left."""
        return LONE_RATE * self.even


def rates_of(plan: Plan, device: Device) -> Rates:
    """How many of the plan's programs a device runs at a time, and how fast they read."""
    # A multiprocessor holds as many programs as its shared memory and its 64 warps do.
    a_multiprocessor = max(1, min(device.smem // max(1, plan.shared_memory), 64 // plan.num_warps))
    slots = device.sms * a_multiprocessor
    total = READ_SHARE * device.bandwidth
    return Rates(slots, total / slots, total / device.sms)


def _start(problem: Problem, plan: Plan, rates: Rates) -> float:
    block = plan.block_n * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    return START_BLOCKS * block / rates.even


def _even_loop(problem: Problem, plan: Plan, rates: Rates) -> float:
    """Full waves at full bandwidth, then the rest, no faster than lone programs read."""
    each = bytes_to_move(problem) / plan.programs
    waves, rest = divmod(plan.programs, rates.slots)
    seconds = waves * each / rates.share
    if rest:
        seconds += each * max(rest / rates.all, 1 / rates.lone)
    return seconds + (waves + (rest > 0)) * _start(problem, plan, rates)


def _ragged_loop(problem: Problem, plan: Plan, rates: Rates) -> float:
    """All bytes at full bandwidth, then the longest sequence's programs alone, by how ragged the batch is."""
    keys = -(-problem.max_seqlen_k // plan.num_splits)
    longest = keys * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    raggedness = 1 - problem.total_k / (problem.batch * problem.max_seqlen_k)
    return (
        bytes_to_move(problem) / rates.all + _start(problem, plan, rates) + raggedness * longest / rates.lone
    )


def _stream_loop(problem: Problem, plan: Plan, rates: Rates) -> float:
    """All bytes at full bandwidth, and the starts of the sequences that one range holds, one after the other."""
    block = plan.block_n * (problem.head_dim + problem.head_dim_v) * problem.dtype.itemsize
    starts = -(-problem.batch // plan.ranges) if _is_ragged(problem) else 1
    all_of = min(rates.all, plan.programs * rates.lone)
    return (
        bytes_to_move(problem) / all_of
        + _start(problem, plan, rates)
        + plan.gap * block * (starts - 1) / rates.even
    )


def _is_ragged(problem: Problem) -> bool:
    return problem.lengths_on_device and problem.total_k < problem.batch * problem.max_seqlen_k
