"""Run checked inputs through the Gluon kernel's own source, emulated on CPU tensors."""

from __future__ import annotations

import dataclasses

import torch

from headfold.backends.hopper import launch_arguments, list_tiles
from headfold.kernels.hopper.prefill import prefill_kernel
from headfold.planner import DEVICES, Plan
from headfold.planner.hopper import plan_hopper
from headfold.problem import Inputs, problem_of
from tests.cases import poisoned
from tests.gluon_emulator import launch


def attend(x: Inputs, seed: int = 0, programs: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE of `programs` programs (fewer where there are fewer tiles), whatever the planner would prefer."""
    out, lse = poisoned(x)
    problem = dataclasses.replace(problem_of(x, out), device_type="cuda")
    device = dataclasses.replace(DEVICES["h200"], sms=programs)
    plan = plan_hopper(problem, device, triton_rows=2**31)
    assert isinstance(plan, Plan), plan
    arguments, variant = launch_arguments(plan, x, out, lse, list_tiles(plan, x))
    if x.sink is not None:  # the emulator knows tensors, not where they lie
        at = prefill_kernel.arg_names.index("sinks")
        arguments = (*arguments[:at], x.sink, *arguments[at + 1 :])
    counter = torch.zeros(2, dtype=torch.int32)
    launch(prefill_kernel, plan.workers, *arguments, counter, seed=seed, once=(out, lse), **variant)
    assert counter.tolist() == [0, 0]
    return out, lse
