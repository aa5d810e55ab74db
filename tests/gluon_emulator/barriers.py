"""mbarriers: arrivals and bytes to come, in phases of which waiters know the parity alone."""

from __future__ import annotations

from typing import Any

from tests.gluon_emulator.ordering import Clock, join
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.shared import Shared
from tests.gluon_emulator.values import number


class MBarrier:
    """One barrier. A phase ends when `count` arrivals and all expected bytes have come."""

    def __init__(self, name: str, count: int) -> None:
        self.name, self.count = name, count
        self.phase = 0
        self.pending = count
        self.bytes = 0
        self.copies = 0  # issued so far: the epochs of the copies' clock
        self.gathered: Clock = {}
        self.passed: Clock = {}  # what the last complete phase passes on

    def arrive(self, count: int, clock: Clock) -> None:
        if count > self.pending:
            raise RuntimeError(f"{self.name}: {count} arrivals where {self.pending} of {self.count} are left")
        self.pending -= count
        self._gather(clock)

    def transfer(self, size: int, clock: Clock) -> None:
        """`size` bytes have come."""
        self.bytes -= size
        self._gather(clock)

    def _gather(self, clock: Clock) -> None:
        join(self.gathered, clock)
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count
            self.passed, self.gathered = self.gathered, {}

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}, {self.pending} of {self.count} arrivals and {self.bytes} bytes missing)"


def init(bar: Shared, count: int) -> None:
    barriers = current().program.barriers
    name = f"mbarrier {bar.interval()[0] // 8} of {bar.history.name}"
    barriers[id(bar.history), bar.interval()[0]] = MBarrier(name, count)


def of(bar: Shared) -> MBarrier:
    found = current().program.barriers.get((id(bar.history), bar.interval()[0]))
    if found is None:
        raise RuntimeError(f"{bar!r} was not initialised as an mbarrier")
    return found


def expect(bar: Shared, size: Any, pred: Any = True) -> None:
    """Arrive, and let the phase end no sooner than `size` more bytes have come."""
    thread = current()
    thread.step()
    if pred:
        one = of(bar)
        one.bytes += int(number(size))
        one.arrive(1, thread.release())


def arrive(bar: Shared, *, count: int = 1, pred: Any = True) -> None:
    thread = current()
    thread.step()
    if pred:
        of(bar).arrive(count, thread.release())


def wait(bar: Shared, phase: Any, pred: Any = True) -> None:
    """Until the phase of this parity is over: the current one has the other parity."""
    thread, one, parity = current(), of(bar), int(number(phase))
    if parity not in (0, 1):
        raise ValueError(f"{one.name}: parity {parity}")
    if pred:
        thread.wait(lambda: one.phase & 1 != parity, one)
        join(thread.clock, one.passed)
