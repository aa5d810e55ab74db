"""Run a call with shared prefixes as one launch: its Gluon kernel emulated, its merge interpreted."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any
from unittest.mock import patch

import torch

from headfold import shared_prefix
from headfold.backends import descriptors, hopper_pair
from headfold.backends.launch import Launcher
from headfold.kernels.hopper.pair import hopper_pair_kernel
from headfold.planner import DEVICES
from headfold.planner.pair import PairPlan, plan_pair
from headfold.problem import Inputs, problem_of
from tests.cases import NAN, poisoned
from tests.gluon_emulator import launch
from tests.kernels.emulated_decode import itself


def plan_of(x: Inputs, sizes: tuple[int, ...], sms: int) -> PairPlan:
    """The plan of a GPU of `sms` multiprocessors, which must be one for this kernel."""
    problem = dataclasses.replace(problem_of(x), device_type="cuda")
    plan = plan_pair(problem, dataclasses.replace(DEVICES["h200"], sms=sms), sizes)
    assert plan is not None
    return plan


def attend(
    x: Inputs, lengths: tuple[int, ...], sizes: tuple[int, ...], seed: int = 0, sms: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE, from the schedule that `seed` draws."""
    out, lse = poisoned(x)
    plan = plan_of(x, sizes, sms)
    groups = shared_prefix.Groups(lengths, sizes)
    with shared_prefix.force(True):
        parts = shared_prefix.parts_of(x, groups)
    assert parts is not None
    given = (getattr(x, f.name) for f in dataclasses.fields(x))
    tensors = [t for t in (*given, out, lse, parts.pads, parts.prefixes) if isinstance(t, torch.Tensor)]
    kept: list[torch.Tensor] = []

    def sources(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        kept[:] = shared_prefix.sources_of(x, parts)
        return kept[0], kept[1]

    class Emulated(Launcher):
        """The launcher of both kernels."""

        def __call__(self, arguments: tuple[Any, ...]) -> None:
            if self._kernel is not hopper_pair_kernel:
                super().__call__(arguments)
                return
            names = list(self._kernel.arg_names)
            first = arguments[names.index("own_states")]
            size = hopper_pair.Places(plan, -(-x.v.shape[-1] // 8) * 8).size
            memory = torch.frombuffer((ctypes.c_float * size).from_address(first), dtype=torch.float32)
            memory.fill_(NAN)
            known = {t.data_ptr(): t for t in (*tensors, *kept) if t.numel()}
            for name in ("states", "state_lses", "ends"):
                for at in (arguments[names.index(f"{which}_{name}")] for which in ("own", "prefix")):
                    known[at] = memory[(at - first) // 4 :]
                    if name == "ends":
                        known[at] = known[at].view(torch.int32)
            seen = [known.get(a, a) if isinstance(a, int) and a > 2**31 else a for a in arguments]
            variant = {**self._constants, **self._options}
            launch(hopper_pair_kernel, self._grid[0], *seen, seed=seed, **variant)

    with patch.object(hopper_pair, "Launcher", Emulated), patch.object(descriptors, "Place", itself):
        hopper_pair.prepare(plan, x, out, lse, parts.prefixes, parts.pads, sources)(x, out, lse)
    return out, lse
