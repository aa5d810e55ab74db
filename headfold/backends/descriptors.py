"""Tensor descriptors of a decode: made once for each place that a call's K and V lie at, and launched without a detour.

Triton 3.6 and 3.7 walk through all arguments of every launch of a kernel that takes descriptors, in Python, and encode each
descriptor anew: on the host of an H200 a call took 53 us, one without descriptors 20. Later versions do it in C++.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from triton.backends.nvidia import driver

from headfold.kernels.hopper.compat import TensorDescriptor

# Places that are remembered at a time: K and V of more layers than models have.
MOST = 1024


class Place:
    """What a descriptor needs of a tensor, without keeping its memory alive."""

    __slots__ = ("_at", "dtype")

    def __init__(self, t: torch.Tensor) -> None:
        self.dtype = t.dtype
        self._at = t.data_ptr()

    def data_ptr(self) -> int:
        """The address of the first element."""
        return self._at


class Descriptors:
    """Descriptors like a checked one, of tensors that differ from its base in nothing but where they lie."""

    def __init__(self, like: TensorDescriptor) -> None:
        self._like = vars(like) | {"base": None}
        self._made: dict[int, TensorDescriptor] = {}

    def __call__(self, t: torch.Tensor) -> TensorDescriptor:
        """The descriptor of `t`. Its constructor takes 25 times as long, to check what `like` was checked for."""
        at = t.data_ptr()
        made = self._made.get(at)
        if made is None:
            if len(self._made) == MOST:
                self._made.clear()
            made = self._made[at] = object.__new__(TensorDescriptor)
            vars(made).update(self._like, base=Place(t))
        return made


def _expanded(descriptor: TensorDescriptor, meta: Any) -> list[Any]:
    """The launch arguments that a descriptor stands for, of which one is its encoding; kept with it."""
    found = vars(descriptor).get("expanded")
    if found is None:
        found = driver.make_tensordesc_arg(descriptor, meta)
        vars(descriptor)["expanded"] = found
    return found


def quicken(compiled: Any) -> None:
    """Have a compiled kernel that takes descriptors launched with what is kept of them, where Triton's launcher allows."""
    launch = getattr(compiled.run, "launch", None)
    known = inspect.getclosurevars(launch).nonlocals if inspect.isfunction(launch) else {}
    if set(known) == {"launcher", "tensordesc_indices", "tensordesc_meta"}:  # Triton 3.6 and 3.7
        compiled.run.launch = _quick(
            known["launcher"], sorted(known["tensordesc_indices"]), known["tensordesc_meta"]
        )


def _quick(launcher: Callable[..., None], indices: list[int], metas: list[Any]) -> Callable[..., None]:
    """What Triton's own wrapper of `launcher` comes to."""
    # 3.6 takes a kernel's arguments one by one behind its own, 3.7 all in one.
    flat = not hasattr(driver, "annotate_arguments")
    before = driver._BASE_ARGS_FORMAT_LEN if flat else 0
    places = list(zip(indices, metas, strict=True))

    def expand(arguments: tuple[Any, ...]) -> list[Any]:
        found: list[Any] = []
        at = 0
        for i, meta in places:
            found += arguments[at : before + i]
            found += _expanded(arguments[before + i], meta)
            at = before + i + 1
        found += arguments[at:]
        return found

    if flat:
        return lambda *arguments: launcher(*expand(arguments))
    return lambda *arguments: launcher(*arguments[:-1], expand(arguments[-1]))
