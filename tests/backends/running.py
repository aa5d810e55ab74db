"""Run the CPU backend by a plan, automatic or changed, and see what it held meanwhile."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from headfold.backends import cpu
from headfold.planner.cpu import plan_cpu
from headfold.planner.plan import Plan
from headfold.problem import Inputs, problem_of
from tests.cases import assert_accurate, poisoned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plan_for(x: Inputs, **changes: Any) -> Plan:
    return dataclasses.replace(plan_cpu(problem_of(x)), **changes)


def attend(x: Inputs, plan: Plan | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = poisoned(x)
    cpu.run(plan or plan_for(x), x, out, lse)
    return out, lse


def check(x: Inputs, **changes: Any) -> None:
    assert_accurate(x, *attend(x, plan_for(x, **changes)), factor=3.0 if x.softcap > 0 else 2.0)


def either_form(block_m: int = 16, block_n: int = 24) -> list[dict[str, Any]]:
    """Plans that cut the smallest problem into many splits and pieces, in both forms."""
    return [
        {"kernel": "decode", "block_n": block_n, "num_splits": 99, "num_stages": 3},
        {"kernel": "prefill", "block_n": block_n, "block_m": block_m, "num_splits": 99, "head_units": 2},
    ]


def peak_bytes(x: Inputs, plan: Plan) -> int:
    """Most bytes that PyTorch's CPU allocator held at once during a run, over what it held before."""
    out, lse = poisoned(x)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        cpu.run(plan, x, out, lse)
    held = peak = 0
    for event in p.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def kv_bytes_of(x: Inputs) -> int:
    return problem_of(x).kv_bytes
