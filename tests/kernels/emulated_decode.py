"""Run checked inputs through the Gluon decode kernel's own source, emulated, and merge its states in PyTorch.

Interpreted, the merge kernel would take minutes a test. What stands for it here knows where states lie from
`planner/schedule.py` and the definition of what a row sees.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any
from unittest.mock import patch

import torch

from headfold import reference
from headfold.backends import descriptors
from headfold.backends import triton as backend
from headfold.backends.launch import Launcher
from headfold.kernels.hopper.decode import hopper_decode_kernel
from headfold.planner import DEVICES, Plan, make_plan, schedule
from headfold.problem import Inputs, problem_of
from tests.cases import NAN, poisoned
from tests.gluon_emulator import launch


def plan_of(x: Inputs, out: torch.Tensor | None = None, sms: int = 4) -> Plan:
    """The plan of a GPU of `sms` multiprocessors, which must be one for this kernel."""
    problem = dataclasses.replace(problem_of(x, out), device_type="cuda")
    plan = make_plan(problem, dataclasses.replace(DEVICES["h200"], sms=sms))
    assert (plan.backend, plan.kernel) == ("hopper", "decode"), plan.reasons
    return plan


def attend(x: Inputs, seed: int = 0, sms: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, from the schedule that `seed` draws."""
    out, lse = poisoned(x)
    plan = plan_of(x, out, sms)
    given = (getattr(x, f.name) for f in dataclasses.fields(x))
    tensors = [t for t in (*given, out, lse) if isinstance(t, torch.Tensor)]
    known: dict[int, Any] = {t.data_ptr(): t for t in tensors if t.numel()}

    class Emulated(Launcher):
        """The launcher of the decode kernel and of the merge after it."""

        def __call__(self, arguments: tuple[Any, ...]) -> None:
            names = self._kernel.arg_names
            at = list(names).index("states")
            memory = (ctypes.c_float * (plan.workspace // 4)).from_address(arguments[at] or id(self))
            states = torch.frombuffer(memory, dtype=torch.float32) if plan.workspace else torch.empty(0)
            lses = states[(arguments[at + 1] - arguments[at]) // 4 :]
            if self._kernel is not hopper_decode_kernel:
                merge(plan, x, states, lses, out, lse)
                return
            states.fill_(NAN)
            addresses = known | {arguments[at]: states, arguments[at + 1]: lses}
            seen = [addresses.get(a, a) if isinstance(a, int) and a > 2**31 else a for a in arguments]
            variant = {**self._constants, **self._options}
            launch(hopper_decode_kernel, self._grid[0], *seen, seed=seed, once=(out, lse), **variant)

    with patch.object(backend, "Launcher", Emulated), patch.object(descriptors, "Place", itself):
        backend.prepare(plan, x, out, lse)(x, out, lse)
    return out, lse


def itself(t: torch.Tensor) -> torch.Tensor:
    """The emulator's copy engine reads the tensor that a descriptor describes."""
    return t


def merge(
    plan: Plan, x: Inputs, states: torch.Tensor, lses: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge the states of every tile that several programs share into its rows."""
    dv = x.v.shape[-1]
    width, height = -(-dv // 8) * 8, min(plan.block_m, backend._rows(x) * plan.fold)
    many = [len(reference.queries_of(x, i)) * plan.fold for i in range(x.batch)]
    per_lane = max(1, plan.tiles_per_sequence)
    for lane_tile in range(per_lane):
        items = [(i, lane_tile) for i in range(x.batch)]
        if plan.tiles_per_sequence == 0:
            items = [_packed(plan, x, i) for i in range(plan.tiles)]
        blocks = torch.tensor(
            [_blocks(plan, x, i, tile) if tile * plan.block_m < many[i] else 0 for i, tile in items]
        )
        starts, _ = schedule.list_of(blocks, plan.gap)
        even = bool((blocks == blocks[0]).all())
        ranges = plan.even_ranges if even else plan.ranges
        for n, (i, tile) in enumerate(items):
            if not blocks[n]:
                continue
            numbers = [n * plan.num_splits + j for j in range(min(plan.num_splits, int(blocks[n])))]
            if plan.ranges:
                ends = torch.stack([starts[n], starts[n] + blocks[n] - 1])
                first, last = schedule.range_of(ends, starts[-1], ranges).tolist()
                numbers = [2 * first + 1, *(2 * j for j in range(first + 1, last + 1))]
            if len(numbers) == 1:
                continue
            rows = torch.arange(min(many[i] - tile * plan.block_m, plan.block_m))
            for unit in range(plan.head_units):
                lane = lane_tile * plan.head_units + unit
                at = (torch.tensor(numbers) * plan.lanes + lane)[:, None] * height + rows
                parts = torch.stack([states[at * width + c] for c in range(dv)], -1).double()
                weights = lses[at].double().softmax(0).nan_to_num(0.0)
                whole = (parts * weights[..., None]).sum(0)
                folded = tile * plan.block_m + rows
                position, head = folded // plan.fold, unit * plan.fold + folded % plan.fold
                total = lses[at].double().logsumexp(0).float()
                if x.cu_seqlens_q is None:
                    out[i, position, head], lse[i, head, position] = whole.to(out.dtype), total
                else:
                    position = position + int(x.cu_seqlens_q[i])
                    out[position, head], lse[head, position] = whole.to(out.dtype), total


def _blocks(plan: Plan, x: Inputs, i: int, tile: int) -> int:
    """Blocks of keys that some row of a tile sees, at least one."""
    sq, sk = len(reference.queries_of(x, i)), len(reference.keys_of(x, i)[0])
    seen = reference.visible(sq, sk, x.window_left, x.window_right, x.bottom_right)
    first = tile * plan.block_m // plan.fold
    last = (min((tile + 1) * plan.block_m, sq * plan.fold) - 1) // plan.fold
    keys = seen[first : last + 1].any(0).nonzero().flatten().tolist()
    return -(-(keys[-1] + 1 - keys[0]) // plan.block_n) if keys else 1


def _packed(plan: Plan, x: Inputs, tile: int) -> tuple[int, int]:
    """(sequence, its tile) of a tile among all of a ragged batch."""
    assert x.cu_seqlens_q is not None
    firsts = [int(n) * plan.fold // plan.block_m + i for i, n in enumerate(x.cu_seqlens_q[:-1])]
    i = max(i for i, first in enumerate(firsts) if first <= tile)
    return i, tile - firsts[i]
