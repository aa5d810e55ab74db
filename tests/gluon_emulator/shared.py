"""Shared memory: allocations, poisoned with NaN, and views of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.gluon_emulator.ordering import Access, History
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.values import GLUON, TORCH, Tensor, number


class Shared:
    """A view of shared memory. Layouts are compared, not carried out: elements lie in the order of their indices."""

    def __init__(self, data: torch.Tensor, layout: Any, history: History) -> None:
        self.data, self.layout, self.history = data, layout, history
        self.dtype = GLUON[data.dtype]
        self.shape = list(data.shape)
        self.type = SimpleNamespace(shape=self.shape, layout=layout, element_ty=self.dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def interval(self) -> tuple[int, int]:
        """The bytes of its allocation between its first element and its last."""
        size = self.data.element_size()
        first = self.data.storage_offset() * size
        span = sum((n - 1) * s for n, s in zip(self.data.shape, self.data.stride(), strict=True))
        return first, first + (span + 1) * size

    def index(self, index: Any) -> Shared:
        """Element `index` of the first dimension."""
        i = int(number(index))
        if not 0 <= i < self.shape[0]:
            raise IndexError(f"buffer {i} of {self.history.name}, which has {self.shape[0]}")
        return Shared(self.data[i], self.layout, self.history)

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """`length` elements of dimension `dim` from `start` on, both known at compile time."""
        if not isinstance(start, int) or not isinstance(length, int):
            raise TypeError(f"slice({start!r}, {length!r}): a view of shared memory has constant bounds")
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(f"{start} to {start + length} of dimension {dim} of shape {self.shape}")
        return Shared(self.data.narrow(dim, start, length), self.layout, self.history)

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.data.permute(order), self.layout, self.history)

    def view_as(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        """The same bytes, or the first of them, with another element type and shape; a swizzle must stay what it is."""
        if not self.data.is_contiguous():
            raise ValueError(f"a view with gaps cannot be seen as {shape}")
        mine, theirs = (getattr(one, "swizzle_byte_width", 0) for one in (self.layout, layout))
        if mine != theirs:
            raise ValueError(f"memory swizzled by {mine} bytes cannot be seen as swizzled by {theirs}")
        data, count = self.data.flatten().view(TORCH[dtype]), torch.Size(shape).numel()
        if count > data.numel():
            raise ValueError(f"{self.shape} of {self.dtype} cannot be seen as {shape} of {dtype}")
        return Shared(data[:count].view(shape), layout, self.history)

    def load(self, layout: Any) -> Tensor:
        thread = current()
        thread.step()
        self.access("load")
        return Tensor(self.data.clone(), layout)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"{value!r} stored into {self.shape} of {self.dtype}")
        current().step()
        same = torch.equal(bits(self.data), bits(value.data))
        self.access("store", harmless=same)
        self.data.copy_(value.data)

    def access(self, kind: str, harmless: bool = False) -> None:
        """Check an ordinary access of the running thread, and remember it."""
        thread = current()
        low, high = self.interval()
        # A store that changes no byte may meet a product: to the copy engine it is a load.
        self.history.meet("load" if harmless else kind, low, high, thread.clock, thread.name)
        done = Access(kind, low, high, thread.name, thread.clock[thread.name])
        thread.unsettled.append(self.history.add(done))

    def __repr__(self) -> str:
        return f"Shared({self.history.name}, {self.dtype}, {self.shape})"


def bits(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.uint8)


def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    """New shared memory: every byte is 255, which is NaN in every floating-point type."""
    count = torch.Size(shape).numel()
    data = torch.full((count * TORCH[dtype].itemsize,), 255, dtype=torch.uint8).view(TORCH[dtype])
    program = current().program
    program.allocations += 1
    return Shared(data.view(shape), layout, History(f"allocation {program.allocations} {shape}"))


def fence() -> None:
    """Order the running thread's ordinary accesses with the copy engine's and the tensor cores', once a barrier follows."""
    current().step()
    for one in current().unsettled:
        one.settled = 1


def barrier() -> None:
    """All warps of the partition have come here."""
    thread = current()
    thread.step()
    for one in thread.unsettled:
        if one.settled == 1:
            one.settled = 2
    thread.unsettled = [one for one in thread.unsettled if one.settled < 2]
