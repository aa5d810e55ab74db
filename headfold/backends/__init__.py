"""The backends run a Plan. Nothing here decides anything.

`force` makes CPU tensors run on another backend or device's plan: it is how the tests drive the very kernels of
the GPU through Triton's interpreter, and a plan made for another device through the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from headfold.planner import Device, Plan, make_plan, running_device
from headfold.problem import Inputs, Problem, problem_of

# What runs a plan: inputs, output and LSE, both of which it writes in full; None for an LSE that nobody asks for.
Runner = Callable[[Inputs, torch.Tensor, torch.Tensor | None], None]

_forced: Device | None = None


@contextmanager
def force(device: Device) -> Iterator[None]:
    """Plan for `device` whatever device the tensors are on. For tests; not thread-safe."""
    global _forced
    before, _forced = _forced, device
    try:
        yield
    finally:
        _forced = before


def device_of(device: torch.device) -> Device:
    """The Device to plan for, given where the tensors are."""
    return _forced if _forced is not None else running_device(device)


def plan_of(x: Inputs, out: torch.Tensor | None = None) -> tuple[Problem, Plan]:
    """The Problem and the Plan of checked inputs, and of where the output goes if that is known."""
    problem = problem_of(x, out)
    return problem, make_plan(problem, device_of(x.q.device))


def forced() -> Device | None:
    """The Device of `force`, if one is in force."""
    return _forced


def prepare(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    """Plan checked inputs and where their results go; returns what runs them, and any call that looks the same."""
    _, plan = plan_of(x, out)
    return _prepare(plan, x, out, lse)


def _prepare(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    if plan.kernel == "none":
        return _nothing
    if plan.short is not None:
        from headfold.backends import mixed

        if plan.beside:
            return mixed.prepare_beside(plan, x, out, lse)
        rows = x.q.new_empty((x.batch,), dtype=torch.int32)
        short = _prepare(plan.short, mixed.short_part(x, plan.short_queries, rows), out, lse)
        long = _prepare(replace(plan, short=None), replace(x, seqused_q=rows), out, lse)
        return mixed.prepare(plan.short_queries, short, long, x)
    if plan.backend == "cpu":
        from headfold.backends.cpu import run as run_plan
    elif plan.backend == "triton" or plan.kernel == "decode":  # decodes are launched alike
        from headfold.backends.triton import prepare as prepare_plan

        return prepare_plan(plan, x, out, lse)
    else:
        from headfold.backends.hopper import run as run_plan
    return partial(run_plan, plan)


def _nothing(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """No query, or no key: 0, and what the softmax is without keys."""
    out.zero_()
    if lse is None:
        return
    if x.sink is None:
        lse.fill_(float("-inf"))
    else:  # the sink is all there is in the softmax
        lse.copy_(x.sink.view(-1, 1).expand_as(lse))


def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compute attention of checked inputs into `out` (x.out_shape) and `lse` (x.lse_shape, float32)."""
    prepare(x, out, lse)(x, out, lse)
