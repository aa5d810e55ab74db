"""When folding the sequences of a group over the pages they share pays: bytes saved against launches and states."""

from __future__ import annotations

from collections.abc import Sequence

from headfold.planner.cost import FIXUP, LAUNCH, READ_SHARE
from headfold.planner.device import Device
from headfold.problem import Problem


def sharing_pays(p: Problem, device: Device, lengths: Sequence[int], sizes: Sequence[int]) -> bool:
    """True when reading shared keys once a group saves more time than the second attention and the merge cost.

    Args:
        p: the Problem of the whole call.
        device: the Device.
        lengths: shared keys of each group.
        sizes: sequences of each group.
    """
    return seconds_saved(p, device, lengths, sizes) > seconds_spent(p, device)


def seconds_saved(p: Problem, device: Device, lengths: Sequence[int], sizes: Sequence[int]) -> float:
    """What the shared keys take if every sequence reads them, less what they take if every group does.

    Each is the longer of reading and arithmetic: many queries are bound by their products, which stay. Bytes that
    the sequences of a group would find in the cache, left there by one another, count as read from memory.
    """
    each = sum(n * s for n, s in zip(lengths, sizes, strict=True))
    queries = p.total_q / max(1, p.batch)
    compute = 2 * queries * each * p.num_heads * (p.head_dim + p.head_dim_v) / device.matmul_flops
    apart, once = (n * _bytes_of_a_key(p) / _rate(device) for n in (each, sum(lengths)))
    return max(apart, compute) - max(once, compute)


def seconds_spent(p: Problem, device: Device) -> float:
    """One attention more with the merge of its splits, the merge of both parts, and two states a row through memory.

    A CPU launches nothing, but its calls cost no less.
    """
    state = p.head_dim_v * p.dtype.itemsize + 4
    return LAUNCH + 2 * FIXUP + 4 * p.total_q * p.num_heads * state / _rate(device)


def _bytes_of_a_key(p: Problem) -> int:
    return p.num_kv_heads * (p.head_dim + p.head_dim_v) * p.dtype.itemsize


def _rate(device: Device) -> float:
    return READ_SHARE * device.bandwidth
