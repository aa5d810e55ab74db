"""Threads of which one runs at a time, switched at random: a seed is a schedule.

Every program of a grid has a thread that starts it, and one more for each further partition of its warps. What the
copy engine does is a list of events, any of which may come next.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

from tests.gluon_emulator.ordering import Clock, join

# A kernel of the tests takes some thousand steps; one that takes this many goes round in circles.
MOST_STEPS = 2_000_000


class DeadlockError(RuntimeError):
    """Every thread waits for what nobody will do."""


class _Stopped(BaseException):
    """Unwinds the other threads when one has failed."""


_local = threading.local()


def current() -> Thread:
    """The emulated thread that runs."""
    return _local.thread


class Thread:
    """A partition: warps that go through a program together."""

    def __init__(
        self, scheduler: Scheduler, name: str, program: Any, warps: int, run: Callable[[], None]
    ) -> None:
        self.scheduler, self.name, self.program, self.warps, self._run = scheduler, name, program, warps, run
        self.ready: Callable[[], bool] | None = None  # at once
        self.waits_for: Any = ""
        self.finished = False
        self.clock: Clock = {name: 1}
        self.fenced: Clock = {}  # its clock at its last proxy fence
        self.unsettled: list[Any] = []  # ordinary accesses without a proxy fence and a barrier behind them
        self.products: list[Any] = []  # asynchronous products in flight, the oldest first
        self.sent: list[Any] = []  # boxes on their way to global memory that no wait has seen read
        self.pieces: list[Any] = []  # copies that are in no group yet
        self.groups: list[Any] = []  # groups of copies that no wait has seen land
        self.copies = 0  # issued so far: the epochs of their clock
        self.weight = 1.0
        self.turn = threading.Lock()  # held until the thread may go on: 1 us a turn, a semaphore takes 15
        self.turn.acquire()
        self.thread = threading.Thread(target=self._main, name=name, daemon=True)

    def release(self) -> Clock:
        """Its clock, to be passed on; what it does from now on is later."""
        passed = dict(self.clock)
        self.clock[self.name] += 1
        return passed

    def step(self) -> None:
        """Let others go on, maybe."""
        self.scheduler.switch(self)

    def wait(self, ready: Callable[[], bool], what: Any) -> None:
        """Go on once `ready()` holds; `what` tells a deadlock's reader what was waited for."""
        self.ready, self.waits_for = ready, what
        self.scheduler.switch(self)
        self.ready, self.waits_for = None, ""

    def _main(self) -> None:
        _local.thread = self
        self.turn.acquire()
        try:
            if self.scheduler.error is None:
                self._run()
                self.finished = True
                self.scheduler.switch(self)
        except _Stopped:
            pass
        except BaseException as error:
            self.scheduler.stop(error)

    def __str__(self) -> str:
        return self.name


class Scheduler:
    """Runs threads to their end, in an order drawn from `seed`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.threads: list[Thread] = []
        self.events: list[Callable[[], bool]] = []  # return whether they are done
        self.error: BaseException | None = None
        self.over = threading.Event()
        self.copy_weight = 1.0
        self.steps = 0

    def spawn(
        self, name: str, program: Any, warps: int, run: Callable[[], None], parent: Thread | None = None
    ) -> Thread:
        thread = Thread(self, name, program, warps, run)
        if parent is not None:
            join(thread.clock, parent.release())
        self.threads.append(thread)
        thread.thread.start()
        return thread

    def run(self) -> None:
        """Start the first thread; return when the last has ended, or raise what one of them raised."""
        self._draw_speeds()
        self._next().turn.release()
        self.over.wait()
        for thread in self.threads:
            thread.thread.join()
        if self.error is not None:
            raise self.error

    def stop(self, error: BaseException) -> None:
        """End all threads; `error` is what the launch raises."""
        self.error = self.error or error
        for thread in self.threads:
            if thread.turn.locked():
                thread.turn.release()
        self.over.set()

    def switch(self, me: Thread) -> None:
        """Pick who goes on, and come back when it is `me` (never, when it has finished)."""
        if self.error is not None:
            raise _Stopped
        if all(thread.finished for thread in self.threads):
            self.over.set()
            return
        chosen = self._next()
        if chosen is me:
            return
        chosen.turn.release()
        if me.finished:
            return
        me.turn.acquire()
        if self.error is not None:
            raise _Stopped

    def _next(self) -> Thread:
        """The thread that goes on next, after what the copy engine does before that."""
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise RuntimeError(f"no end after {MOST_STEPS} steps")
        if self.random.random() < 0.02:
            self._draw_speeds()
        while True:
            threads = [t for t in self.threads if not t.finished and (t.ready is None or t.ready())]
            if not threads and not self.events:
                waiting = [f"{t} waits for {t.waits_for}" for t in self.threads if not t.finished]
                raise DeadlockError("nobody can go on: " + "; ".join(waiting))
            weights = [t.weight for t in threads]
            if self.events:
                weights.append(self.copy_weight)
            left = self.random.random() * sum(weights)
            for thread in threads:
                left -= thread.weight
                if left < 0:
                    return thread
            if not self.events:
                return threads[-1]
            event = self.random.choice(self.events)
            if event():
                self.events.remove(event)

    def _draw_speeds(self) -> None:
        """Some threads are far faster than others for a while: that is where buffers change hands too early."""
        for thread in self.threads:
            thread.weight = 10 ** self.random.uniform(-2, 2)
        self.copy_weight = 10 ** self.random.uniform(-2, 2)
