"""Arguments of PagedKVCache: numbers on the host and tensors of the right shape, with messages that name them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch


def bad(caller: str, name: str, got: str, need: str, kind: type[Exception] = ValueError) -> Exception:
    """The error of an argument: which call's, its name, what came and what is needed."""
    return kind(f"PagedKVCache{'.' if caller else ''}{caller}: {name} {got}; {need}")


def check_kind(caller: str, name: str, t: Any, dims: int, need: str) -> None:
    """Raise unless t is a tensor with so many dimensions; `need` says which."""
    if not isinstance(t, torch.Tensor):
        raise bad(caller, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
    if t.dim() != dims:
        raise bad(caller, name, f"has shape {tuple(t.shape)}", f"it must be {need}")


def integer(caller: str, name: str, value: Any) -> int:
    """An int on the host. No tensors: reading one from a device would wait for it."""
    try:
        if isinstance(value, bool | torch.Tensor):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise bad(caller, name, f"is {value!r}", "it must be an int on the host", TypeError) from None


def integers(caller: str, name: str, values: Any, n: int | None = None) -> list[int]:
    """Integers >= 0 from a list, or from one number that stands for n (None: for itself)."""
    if isinstance(values, torch.Tensor | str) or not isinstance(values, Sequence):
        listed = [integer(caller, name, values)] * (1 if n is None else n)
    else:
        listed = [integer(caller, f"{name}[{j}]", value) for j, value in enumerate(values)]
    if n is not None and len(listed) != n:
        raise bad(caller, name, f"has {len(listed)} entries", f"there are {n} sequences")
    for value in listed:
        if value < 0:
            raise bad(caller, name, f"has {value}", "it must be >= 0")
    return listed
