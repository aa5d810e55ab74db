"""The planner: Problem x Device -> Plan, as small pure functions."""

from __future__ import annotations

from functools import lru_cache

from headfold.planner.cpu import plan_cpu
from headfold.planner.device import DEVICES, Device, device_named, running_device
from headfold.planner.gpu import plan_gpu
from headfold.planner.plan import Plan
from headfold.problem import Problem

__all__ = ["DEVICES", "Device", "Plan", "device_named", "make_plan", "plan_to_append", "running_device"]


@lru_cache(maxsize=4096)
def make_plan(problem: Problem, device: Device) -> Plan:
    """Decide how `problem` runs on `device`. Cached: the same question costs one dictionary look-up."""
    if problem.is_empty:
        return Plan("cpu" if device.is_cpu else "triton", "none")
    return plan_cpu(problem) if device.is_cpu else plan_gpu(problem, device)


@lru_cache(maxsize=4096)
def plan_to_append(problem: Problem, device: Device) -> Plan:
    """The plan of a call whose new tokens its own kernel writes, which only the Triton kernel does."""
    return plan_gpu(problem, device, "")
