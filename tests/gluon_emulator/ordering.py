"""Which accesses to shared memory are ordered by barriers: a race is found in any schedule, not only where it bites.

Every thread has a vector clock. Arriving at an mbarrier passes it on, waiting takes it over (FastTrack, Flanagan and
Freund 2009). A copy may write from the moment it is issued until its barrier counts its bytes. An asynchronous product may
read until the wait for it, and so may a box that is sent to global memory; a piece may be written until the wait for its
group. A store collides with a product or a box that is sent only where it changes bytes. Ordinary loads and stores that
meet each other are judged by their results alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Clock = dict[Any, int]


class RaceError(RuntimeError):
    """Two accesses to the same shared memory that nothing orders."""


def join(into: Clock, other: Clock) -> None:
    for actor, epoch in other.items():
        if into.get(actor, 0) < epoch:
            into[actor] = epoch


@dataclass
class Access:
    """One access to bytes [low, high) of an allocation.

    `kind` is copy (written by the copy engine), send (read by it), piece (written by `cp.async`), product (read by one),
    load or store. `settled`
    counts what has followed an ordinary access, or a piece that has landed, in its partition: 1 a proxy fence, 2 a barrier
    after that.
    """

    kind: str
    low: int
    high: int
    actor: Any
    epoch: int | None  # None while it goes on
    settled: int = 0

    def overlaps(self, low: int, high: int) -> bool:
        return self.low < high and low < self.high

    def before(self, clock: Clock) -> bool:
        return self.epoch is not None and clock.get(self.actor, 0) >= self.epoch


class History:
    """The accesses to one allocation that a later one may still collide with."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.accesses: list[Access] = []

    def meet(
        self, kind: str, low: int, high: int, clock: Clock, me: Any, fenced: Clock | None = None
    ) -> None:
        """Raise if an access of `kind` by `me` at `clock` collides with an earlier one.

        `fenced` is its clock at its last proxy fence: pieces that had landed by then need no fence by those who issued them.
        """
        for one in self.accesses:
            if not one.overlaps(low, high):
                continue
            what = f"{self.name}, bytes {low} to {high}: {kind} by {me}"
            if self._conflict(kind, one.kind) and one.actor != me and not one.before(clock):
                raise RaceError(f"{what} is not ordered after the {one.kind} by {one.actor}")
            mine = one.kind == "piece" or (one.kind == "store" and one.actor == me)
            proxies = kind == "copy" or (kind in ("product", "send") and mine)
            if kind == "product" and one.kind == "piece" and one.before(fenced or {}):
                continue
            if proxies and one.kind in ("load", "store", "piece") and one.settled < 2:
                missing = "fence_async_shared" if one.settled == 0 else "barrier after the fence"
                raise RaceError(f"{what} follows the {one.kind} by {one.actor} without a {missing}")

    @staticmethod
    def _conflict(kind: str, earlier: str) -> bool:
        return bool({"copy", "piece"} & {kind, earlier}) or (
            kind == "store" and earlier in ("product", "send")
        )

    def add(self, access: Access) -> Access:
        if access.kind in (
            "copy",
            "piece",
        ):  # what it follows happened before: later accesses need to follow the copy alone
            self.accesses = [
                one for one in self.accesses if not (access.low <= one.low and one.high <= access.high)
            ]
        self.accesses = [
            one
            for one in self.accesses
            if (one.kind, one.low, one.high, one.actor)
            != (access.kind, access.low, access.high, access.actor)
        ]
        self.accesses.append(access)
        return access
