"""Tensor descriptors of a decode: made once for each place that a call's K and V lie at, and launched without a detour.

Triton 3.6 and 3.7 walk through all arguments of every launch of a kernel that takes descriptors, in Python, and encode each
descriptor anew: on the host of an H200 a call took 53 us, one without descriptors 20. Later versions do it in C++.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.nvidia import driver

from headfold.kernels.hopper.compat import TensorDescriptor

# Places that are remembered at a time: K and V of more layers than models have.
MOST = 1024

MAP_BYTES = 128  # of a CUtensorMap
# Bytes of Triton's object that holds one, behind Python's header and at its alignment of 64 or 128.
_HOLDERS = (64 + MAP_BYTES, 128 + MAP_BYTES)


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
        self._maps: dict[int, tuple[int, Any]] = {}

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

    def map_of(self, t: torch.Tensor, meta: Any) -> tuple[int, Any] | None:
        """(address, owner) of the tensor map of `t`: made by Triton, and alive as long as its owner.

        None where Triton's object is not as expected. `meta` is that of the one kernel that takes these descriptors.
        """
        at = t.data_ptr()
        found = self._maps.get(at)
        if found is None:
            owner = _expanded(self(t), meta)[0]
            if type(owner).__name__ != "PyCUtensorMap" or type(owner).__basicsize__ not in _HOLDERS:
                return None
            if len(self._maps) == MOST:
                self._maps.clear()
            found = self._maps[at] = id(owner) + type(owner).__basicsize__ - MAP_BYTES, owner
        return found


@dataclass(frozen=True, slots=True)
class Boxes:
    """What stands before a decode kernel's other arguments: descriptors of K and V, where it takes any, and numbers."""

    numbers: tuple[int | None, ...] = ()
    k: Descriptors | None = None
    v: Descriptors | None = None

    def of(self, k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
        """For a call with this K and V."""
        if self.k is None or self.v is None:
            return self.numbers
        return self.k(k), self.v(v), *self.numbers


def metas_of(compiled: Any) -> Sequence[Any]:
    """What Triton keeps of a compiled kernel's descriptors, in their order, to encode them."""
    return getattr(compiled.metadata, "tensordesc_meta", None) or ()


def _expanded(descriptor: TensorDescriptor, meta: Any) -> list[Any]:
    """The launch arguments that a descriptor stands for, of which one is its encoding; kept with it."""
    found = vars(descriptor).get("expanded")
    if found is None:
        make = driver.make_tensordesc_arg
        # From 3.8 on it takes the launch's own arguments too, and does not look at them.
        others = [None] * (len(inspect.signature(make).parameters) - 2)
        found = make(descriptor, meta, *others)
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
