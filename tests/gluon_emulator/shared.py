"""Shared memory: allocations, poisoned with NaN, and views of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from headfold.kernels.hopper.layouts import grouped_layout
from tests.gluon_emulator.ordering import Access, History
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.values import GLUON, TORCH, Tensor, number


class Shared:
    """A view of shared memory. Swizzling is compared, not carried out: within a row elements lie in order.

    Rows longer than a swizzled one lie in memory as Hopper's do: one matrix (rows, columns of a swizzled row) after the
    other. `data` has the shape of memory, (..., matrices, rows, columns) in that case, and (groups of 8 rows, matrices, 8,
    columns) of a matrix that is `grouped`.
    """

    def __init__(
        self,
        data: torch.Tensor,
        layout: Any,
        history: History,
        pieces: bool,
        order: list[int] | None = None,
        grouped: bool = False,
    ) -> None:
        self.data, self.layout, self.history, self.pieces, self.order = data, layout, history, pieces, order
        self.grouped = grouped
        self.dtype = GLUON[data.dtype]
        shape = list(data.shape)
        if grouped:
            shape = [shape[0] * shape[2], shape[1] * shape[3]]
        elif pieces:
            shape = [*shape[:-3], shape[-2], shape[-3] * shape[-1]]
        self.shape = [shape[i] for i in order] if order else shape

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, layout=self.layout, element_ty=self.dtype)

    @property
    def rank(self) -> int:
        return len(self.shape)

    def read(self) -> torch.Tensor:
        """The elements in the order of their indices, now."""
        found = self.data.movedim(-3, -2).flatten(-2) if self.pieces or self.grouped else self.data
        found = found.flatten(0, 1) if self.grouped else found
        return (found.permute(self.order) if self.order else found).clone()

    def write(self, value: torch.Tensor) -> None:
        if self.order:
            value = value.permute([self.order.index(i) for i in range(self.rank)])
        if self.grouped:
            value = value.unflatten(0, (self.data.shape[0], -1))
        if self.pieces or self.grouped:
            value = value.unflatten(-1, (self.data.shape[-3], -1)).movedim(-2, -3)
        self.data.copy_(value)

    def interval(self) -> tuple[int, int]:
        """The bytes of its allocation between its first element and its last."""
        size = self.data.element_size()
        first = self.data.storage_offset() * size
        if self.data.is_contiguous():
            return first, first + self.data.numel() * size
        span = sum((n - 1) * s for n, s in zip(self.data.shape, self.data.stride(), strict=True))
        return first, first + (span + 1) * size

    def _part(self, data: torch.Tensor) -> Shared:
        return Shared(data, self.layout, self.history, self.pieces, self.order, self.grouped)

    def index(self, index: Any) -> Shared:
        """Element `index` of the first dimension."""
        i = int(index if isinstance(index, int) else number(index))
        if not 0 <= i < self.shape[0]:
            raise IndexError(f"buffer {i} of {self.history.name}, which has {self.shape[0]}")
        if self.order or self.grouped or (self.pieces and self.rank == 2):
            raise NotImplementedError(f"a row of {self!r}")
        return self._part(self.data[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        """`length` elements of dimension `dim` from `start` on, both known at compile time."""
        if not isinstance(start, int) or not isinstance(length, int):
            raise TypeError(f"slice({start!r}, {length!r}): a view of shared memory has constant bounds")
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise IndexError(f"{start} to {start + length} of dimension {dim} of shape {self.shape}")
        if self.order or ((self.pieces or self.grouped) and dim == self.rank - 1):
            raise NotImplementedError(f"a slice of the columns of {self!r}")
        if self.grouped:
            if start % 8 or length % 8:
                raise NotImplementedError(f"rows {start} to {start + length} of groups of 8 rows")
            return self._part(self.data.narrow(0, start // 8, length // 8))
        in_memory = dim + 1 if self.pieces and dim == self.rank - 2 else dim
        return self._part(self.data.narrow(in_memory, start, length))

    def permute(self, order: list[int]) -> Shared:
        if self.order:
            raise NotImplementedError("a permutation of permuted memory")
        return Shared(self.data, self.layout, self.history, self.pieces, list(order), self.grouped)

    def view_as(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        """The same bytes, or the first of them, with another element type and shape; a swizzle must stay what it is."""
        if not self.data.is_contiguous() or self.order:
            raise ValueError(f"a view with gaps cannot be seen as {shape}")
        if grouped := isinstance(layout, gl.SharedLinearLayout):
            if layout != grouped_layout(*shape) or TORCH[dtype].itemsize != 2:
                raise NotImplementedError(f"{self!r} seen as {shape} of {dtype} with {layout}")
        theirs = 128 if grouped else getattr(layout, "swizzle_byte_width", 0)
        mine = 128 if self.grouped else getattr(self.layout, "swizzle_byte_width", 0)
        if mine != theirs:
            raise ValueError(f"memory swizzled by {mine} bytes cannot be seen as swizzled by {theirs}")
        data, count = self.data.flatten().view(TORCH[dtype]), torch.Size(shape).numel()
        if count > data.numel():
            raise ValueError(f"{self.shape} of {self.dtype} cannot be seen as {shape} of {dtype}")
        if grouped:
            in_memory = [shape[0] // 8, shape[1] // 64, 8, 64]
            return Shared(data[:count].view(in_memory), layout, self.history, False, grouped=True)
        in_memory, pieces = shape_in_memory(shape, layout, dtype)
        return Shared(data[:count].view(in_memory), layout, self.history, pieces)

    def load(self, layout: Any) -> Tensor:
        thread = current()
        thread.step()
        self.access("load")
        return Tensor(self.read(), layout)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise ValueError(f"{value!r} stored into {self.shape} of {self.dtype}")
        current().step()
        self.access("store", harmless=torch.equal(bits(self.read()), bits(value.data)))
        self.write(value.data)

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


def shape_in_memory(shape: list[int], layout: Any, dtype: Any) -> tuple[list[int], bool]:
    """(shape of the elements as they lie in memory, whether rows lie there in pieces)."""
    width = getattr(layout, "swizzle_byte_width", 0) // TORCH[dtype].itemsize
    if width == 0 or len(shape) < 2 or shape[-1] <= width:
        return list(shape), False
    return [*shape[:-2], shape[-1] // width, shape[-2], width], True


def allocate(dtype: Any, shape: list[int], layout: Any) -> Shared:
    """New shared memory: every byte is 255, which is NaN in every floating-point type."""
    in_memory, pieces = shape_in_memory(shape, layout, dtype)
    size = torch.Size(shape).numel() * TORCH[dtype].itemsize
    data = torch.full((size,), 255, dtype=torch.uint8).view(TORCH[dtype]).view(in_memory)
    program = current().program
    program.allocations += 1
    return Shared(data, layout, History(f"allocation {program.allocations} {shape}"), pieces)


def fence() -> None:
    """Order the running thread's ordinary accesses with the copy engine's and the tensor cores', once a barrier follows."""
    thread = current()
    thread.step()
    thread.fenced = dict(thread.clock)
    for one in thread.unsettled:
        one.settled = 1


def barrier() -> None:
    """All warps of the partition have come here."""
    thread = current()
    thread.step()
    for one in thread.unsettled:
        if one.settled == 1:
            one.settled = 2
    thread.unsettled = [one for one in thread.unsettled if one.settled < 2]
