"""What runs beside the threads: the copy engine and the tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from tests.gluon_emulator import barriers
from tests.gluon_emulator.ordering import Access, join
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.shared import Shared
from tests.gluon_emulator.values import GLUON, Tensor, number


class Descriptor:
    """A tensor in global memory as the copy engine knows it."""

    def __init__(self, host: Any) -> None:
        self.base, self.sizes, self.block_shape, self.layout = (
            host.base,
            list(host.shape),
            list(host.block_shape),
            host.layout,
        )
        self.view = host.base.as_strided(host.shape, host.strides)
        self.dtype = GLUON[host.base.dtype]
        size = torch.Size(self.block_shape).numel() * host.base.element_size()
        self.block_type = SimpleNamespace(nbytes=size, shape=self.block_shape, element_ty=self.dtype)

    def inside(self, corner: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of the box that begins at `corner` lies inside the tensor: where in the tensor, and where in the box."""
        of_tensor, of_box = [], []
        for first, extent, size in zip(corner, self.block_shape, self.sizes, strict=True):
            low = min(max(first, 0), size)
            high = max(min(first + extent, size), low)
            of_tensor.append(slice(low, high))
            of_box.append(slice(low - first, high - first) if high > low else slice(0, 0))
        return tuple(of_tensor), tuple(of_box)

    def box(self, corner: list[int]) -> torch.Tensor:
        """The box that begins at `corner`; what lies outside the tensor is 0."""
        found = torch.zeros(self.block_shape, dtype=self.base.dtype)
        of_tensor, of_box = self.inside(corner)
        found[of_box] = self.view[of_tensor]
        return found

    def corner_of(self, corner: list[Any], memory: Shared) -> list[int]:
        """Where a copy's box begins, after a look at whether the engine can copy it from or to `memory`."""
        first = [int(number(n)) for n in corner]
        if memory.shape != self.block_shape or memory.dtype != self.dtype:
            raise ValueError(f"a box {self.block_shape} of {self.dtype} copied into {memory!r}")
        if memory.layout != self.layout:
            raise ValueError(f"a box of layout {self.layout} copied into {memory.layout}")
        if first[-1] * self.base.element_size() % 16:
            raise ValueError(f"a box at column {first[-1]}: it must begin at a multiple of 16 bytes")
        return first


def tma_load(
    descriptor: Descriptor, corner: list[Any], bar: Shared, result: Shared, pred: Any = True
) -> None:
    """Issue the copy of a box. It is written, and later counted on the barrier, whenever the scheduler says."""
    thread = current()
    thread.step()
    if not pred:
        return
    first = descriptor.corner_of(corner, result)
    one = barriers.of(bar)
    low, high = result.interval()
    result.history.meet("copy", low, high, thread.clock, thread.name)
    one.copies += 1
    engine = f"the engine for {one.name}"
    result.history.add(Access("copy", low, high, engine, one.copies))
    clock = {**thread.clock, engine: one.copies}
    written = False

    def event() -> bool:
        nonlocal written
        if not written:
            result.write(descriptor.box(first))
            written = True
            return False
        one.transfer(descriptor.block_type.nbytes, clock)
        return True

    thread.scheduler.events.append(event)


class Sent:
    """A box on its way to global memory: an event that reads shared memory first, and writes some time after that."""

    def __init__(
        self, descriptor: Descriptor, corner: list[int], source: Shared, stored: dict[int, Any]
    ) -> None:
        self._descriptor, self._corner, self._source, self._stored = descriptor, corner, source, stored
        self._box: torch.Tensor | None = None

    def read(self) -> None:
        if self._box is None:
            self._box = self._source.read()

    def __call__(self) -> bool:
        if self._box is None:
            self.read()
            return False
        of_tensor, of_box = self._descriptor.inside(self._corner)
        view = self._descriptor.view
        view[of_tensor] = self._box[of_box]
        stored = self._stored.get(view.untyped_storage().data_ptr())
        if stored is not None:
            part = stored.as_strided(view.shape, view.stride(), view.storage_offset())[of_tensor]
            if bool(part.any()):
                raise RuntimeError(f"a box at {self._corner}: an element is stored twice")
            part[...] = True
        return True


def tma_store(descriptor: Descriptor, corner: list[Any], source: Shared) -> None:
    """Issue the copy of a box to global memory, a group of its own, which leaves out what lies outside the tensor."""
    thread = current()
    thread.step()
    first = descriptor.corner_of(corner, source)
    low, high = source.interval()
    source.history.meet("send", low, high, thread.clock, thread.name)
    thread.copies += 1
    access = source.history.add(Access("send", low, high, f"the engine for {thread.name}", thread.copies))
    event = Sent(descriptor, first, source, thread.program.stored)
    thread.sent.append((event, access))
    thread.scheduler.events.append(event)


def tma_store_wait(pendings: int) -> None:
    """Until all boxes but the last `pendings` have been read from shared memory; they may not be there yet."""
    thread = current()
    thread.step()
    while len(thread.sent) > pendings:
        event, access = thread.sent.pop(0)
        event.read()
        join(thread.clock, {access.actor: access.epoch})


class Product:
    """An asynchronous product: its result is there after the wait for it."""

    def __init__(self, compute: Callable[[], torch.Tensor], layout: Any, reads: list[Access]) -> None:
        self.layout, self.reads = layout, reads
        self._compute = compute
        self.result: torch.Tensor | None = None
        self.finished = False

    def compute(self) -> torch.Tensor:
        if self.result is None:
            self.result = self._compute()
        return self.result


def warpgroup_mma(
    a: Tensor | Shared,
    b: Shared,
    acc: Tensor | Product,
    *,
    use_acc: Any = True,
    is_async: bool = False,
) -> Tensor | Product:
    """a @ b + acc in float32. Operands in shared memory are read now or, half of the time, at the wait for it."""
    thread = current()
    thread.step()
    _check_operands(a, b, acc, thread.warps)
    reads = []
    for one in (a, b):
        if isinstance(one, Shared):
            low, high = one.interval()
            one.history.meet("product", low, high, thread.clock, thread.name, thread.fenced)
            reads.append(one.history.add(Access("product", low, high, thread.name, None)))

    def compute() -> torch.Tensor:
        left = a.read() if isinstance(a, Shared) else a.data
        product = left.float() @ b.read().float()
        if not use_acc:
            return product
        return product + (acc.compute() if isinstance(acc, Product) else acc.data)

    product = Product(compute, acc.layout, reads)
    if thread.scheduler.random.random() < 0.5:
        product.compute()
    thread.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product])


def _check_operands(a: Tensor | Shared, b: Shared, acc: Tensor | Product, warps: int) -> None:
    layout = acc.layout
    if not isinstance(layout, gl.NVMMADistributedLayout):
        raise ValueError(f"an accumulator of layout {layout}")
    if warps % 4 or layout.warps_per_cta[0] * layout.warps_per_cta[1] != warps:
        raise ValueError(f"a product of {warps} warps into {layout}")
    if isinstance(a, Tensor):
        rows = getattr(a.layout, "parent", None)  # an accumulator of the width of a's columns
        of_rows = isinstance(rows, gl.NVMMADistributedLayout) and rows.warps_per_cta == layout.warps_per_cta
        if not of_rows or a.layout != gl.DotOperandLayout(0, rows, 32 // a.dtype.primitive_bitwidth):
            raise ValueError(f"the left operand has the layout {a.layout}")
    if a.dtype != b.dtype:
        raise ValueError(f"a product of {a.dtype} and {b.dtype}")
    want = [a.shape[0], b.shape[1]]
    have = acc.shape if isinstance(acc, Tensor) else want
    if a.shape[1] != b.shape[0] or have != want:
        raise ValueError(f"a product of {a.shape} and {b.shape} into {have}")


def warpgroup_mma_wait(num_outstanding: int = 0, deps: list[Any] | None = None) -> Any:
    """Wait until at most `num_outstanding` products are in flight; returns `deps`, of which none may be in flight then."""
    thread = current()
    thread.step()
    if not deps:
        raise ValueError("warpgroup_mma_wait: deps must be given")
    while len(thread.products) > num_outstanding:
        product = thread.products.pop(0)
        product.compute()
        product.finished = True
        for read in product.reads:
            read.epoch = thread.clock[thread.name]
    results = []
    for one in deps:
        if isinstance(one, Product) and not one.finished:
            raise RuntimeError(f"{num_outstanding} products may be in flight, and the result of one is used")
        results.append(Tensor(one.compute(), one.layout) if isinstance(one, Product) else one)
    return results[0] if len(results) == 1 else tuple(results)
