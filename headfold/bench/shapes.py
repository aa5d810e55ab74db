"""A Problem from the words of the command line, checked by the checks that every call goes through."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from headfold.bench.cases import DTYPES, Case
from headfold.bench.catalogue import catalogue
from headfold.planner import Device, Plan, device_named, make_plan, running_device
from headfold.planner.cost import NoPrediction, predicted_seconds
from headfold.problem import Inputs, Problem, check, problem_of


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """The options of `headfold plan` that describe a problem, as they were typed."""

    heads: str
    dim: int
    batch: int
    keys: int
    queries: int = 1
    dim_v: int | None = None
    causal: bool = False
    window: str | None = None
    page_size: int = 0
    dtype: str = "bf16"
    num_splits: int = 0
    pack: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """A plan with what it was made for, its explanation, and the time it will take where the planner predicts it."""

    problem: Problem
    device: Device
    plan: Plan
    text: str
    predicted_us: float | None
    predicted_text: str

    def record(self) -> dict[str, Any]:
        """Everything as plain data."""
        problem = dataclasses.asdict(self.problem)
        problem["dtype"] = str(self.problem.dtype).removeprefix("torch.")
        return {
            "device": dataclasses.asdict(self.device),
            "problem": problem,
            "plan": dataclasses.asdict(self.plan),
            "predicted_us": self.predicted_us,
            "explanation": self.text.splitlines(),
        }


def device_from(name: str | None) -> Device:
    """The device named, or the GPU that is here, or else an H200.

    Raises:
        ValueError: no such device.
    """
    if name is not None:
        try:
            return device_named(name)
        except ValueError as e:
            raise ValueError(f"--{e}") from e
    return running_device(torch.device("cuda")) if torch.cuda.is_available() else device_named("h200")


def explain(problem: Problem, device: Device) -> Answer:
    """Plan a problem and say why."""
    plan = make_plan(problem, device)
    us, text = None, ""
    try:
        us = predicted_seconds(problem, plan, device) * 1e6
        text = f"predicted: {us:,.1f} us"
    except NoPrediction as e:
        text = str(e)
    return Answer(problem, device, plan, plan.explain(problem, device), us, text)


def case_named(name: str, device: Device) -> Case:
    """A benchmark case, of the catalogue for that kind of device or of the other.

    Raises:
        ValueError: no such case, or one whose call is more than one plan.
    """
    kind = _kind(device)
    cases = {c.name: c for other in ("cpu", "cuda") for c in catalogue(other)}
    cases.update({c.name: c for c in catalogue(kind)})
    if name not in cases:
        raise ValueError(f"--case is {name!r}, which is no case; `headfold bench --list` lists them")
    if cases[name].shared:
        raise ValueError(
            f"--case is {name!r}, which shares a prefix: its call has two plans, and this tells of one"
        )
    return cases[name]


def lengths_from(text: str | None, problem: Problem, case: Case | None = None) -> tuple[int, ...]:
    """Keys of every sequence: those of `text`, such as 4096,128,77, else the case's, else all at the bound.

    Raises:
        ValueError: something else than numbers.
    """
    if text is None:
        return case.all_lengths if case is not None else (problem.max_seqlen_k,) * problem.batch
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"--lengths is {text!r}; it must be the keys of every sequence, such as 4096,128,77")
    return tuple(int(part) for part in parts)


def _kind(device: Device) -> str:
    return "cpu" if device.is_cpu else "cuda"


def problem_from(shape: Shape, device: Device) -> Problem:
    """The Problem of a shape.

    Raises:
        ValueError: an option that does not fit; the message names it.
    """
    heads, kv_heads = _heads(shape.heads)
    for name, least in (("dim", 1), ("batch", 0), ("keys", 0), ("queries", 0), ("page_size", 0)):
        if getattr(shape, name) < least:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is {getattr(shape, name)}; it must be at least {least}")
    if shape.dtype not in DTYPES:
        raise ValueError(f"--dtype is {shape.dtype!r}; it must be one of {', '.join(DTYPES)}")
    left, right = _window(shape.window)
    dtype, dim_v = getattr(torch, DTYPES[shape.dtype]), shape.dim if shape.dim_v is None else shape.dim_v
    rows: tuple[int, int] = (shape.batch, shape.keys)
    table = used = None
    if shape.page_size:
        pages = -(-shape.keys // shape.page_size)
        rows = (shape.batch * pages, shape.page_size)
        table = torch.empty(shape.batch, pages, dtype=torch.int32, device="meta")
        used = torch.empty(shape.batch, dtype=torch.int32, device="meta")
    x = Inputs(
        torch.empty(shape.batch, shape.queries, heads, shape.dim, dtype=dtype, device="meta"),
        torch.empty(*rows, kv_heads, shape.dim, dtype=dtype, device="meta"),
        torch.empty(*rows, kv_heads, dim_v, dtype=dtype, device="meta"),
        page_table=table,
        seqused_k=used,
        max_seqlen_k=shape.keys,
        window_left=left,
        window_right=0 if shape.causal else right,
        num_splits=shape.num_splits,
        pack_gqa=None if shape.pack else False,
        caller="plan",
    )
    check(x)
    return dataclasses.replace(problem_of(x), device_type=_kind(device))


def _heads(text: str) -> tuple[int, int]:
    parts = text.split(":")
    if len(parts) not in (1, 2) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ValueError(f"--heads is {text!r}; it must be query heads : KV heads, such as 96:8")
    return int(parts[0]), int(parts[-1])


def _window(text: str | None) -> tuple[int, int]:
    if text is None:
        return -1, -1
    parts = [p.strip() for p in text.split(",")]
    try:
        left, right = (-1 if p == "" else int(p) for p in parts)
    except ValueError:
        raise ValueError(
            f"--window is {text!r}; it must be LEFT,RIGHT, such as 4095,0 (-1 is open)"
        ) from None
    return left, right
