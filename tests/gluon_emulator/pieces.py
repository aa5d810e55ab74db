"""`cp.async`: copies in pieces that a partition's lanes issue themselves, and wait for by groups.

They are written at random moments until a wait says that they have landed, and are ordinary stores of those lanes from
then on: products may read what they wrote after a proxy fence and a barrier. Or an mbarrier counts them when they have
landed, and the fence is sent by those who waited for it.
"""

from __future__ import annotations

from typing import Any

from tests.gluon_emulator import barriers, language
from tests.gluon_emulator.ordering import Access, join
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.shared import Shared
from tests.gluon_emulator.values import Pointer, Tensor


def copy_to_shared(result: Shared, pointer: Pointer, mask: Tensor | None = None) -> None:
    """Issue the copy of elements; those that the mask leaves out come as zeros."""
    thread = current()
    thread.step()
    if mask is not None and isinstance(pointer.offset, Tensor):
        mask = Tensor(mask.data.expand(pointer.offset.data.shape), mask.layout)
    found = language.load(pointer, mask, 0)
    if found.shape != result.shape or found.dtype != result.dtype:
        raise ValueError(f"{found!r} copied into {result!r}")
    low, high = result.interval()
    engine = f"the copies of {thread.name}"
    result.history.meet("piece", low, high, thread.clock, engine)
    thread.copies += 1
    access = result.history.add(Access("piece", low, high, engine, thread.copies))

    def event() -> bool:
        result.write(found.data)
        return True

    thread.pieces.append((event, access))
    thread.scheduler.events.append(event)


def mbarrier_arrive(bar: Shared, increment_count: bool = True) -> None:
    """Let every lane arrive when the copies issued so far have landed. Who waits for that must send a proxy fence."""
    if increment_count:
        raise NotImplementedError("arrivals that the barrier does not count on")
    thread = current()
    thread.step()
    one, clock, before = barriers.of(bar), thread.release(), list(thread.pieces)
    thread.pieces = []
    for _, access in before:
        join(clock, {access.actor: access.epoch})
    events: list[Any] = thread.scheduler.events

    def arrived() -> bool:
        if any(event in events for event, _ in before):
            return False
        one.arrive(32 * thread.warps, clock)
        return True

    events.append(arrived)


def commit_group() -> None:
    """All copies since the last group are one."""
    thread = current()
    thread.groups.append(thread.pieces)
    thread.pieces = []


def wait_group(num_outstanding: int) -> None:
    """Until all groups but the last `num_outstanding` have landed."""
    thread = current()
    thread.step()
    events: list[Any] = thread.scheduler.events
    while len(thread.groups) > num_outstanding:
        for event, access in thread.groups.pop(0):
            if event in events:
                events.remove(event)
                event()
            join(thread.clock, {access.actor: access.epoch})
            thread.unsettled.append(access)
