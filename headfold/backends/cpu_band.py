"""Band: which (query, key) pairs of one sequence are visible, as arithmetic on row and key ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from headfold.problem import Inputs

Kind = Literal["full", "causal", "masked"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Queries first..last-1 against keys start..end-1.

    `kind` says how: every pair is visible, the top-left lower triangle is, or a mask is needed.
    """

    first: int
    last: int
    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Band:
    """Query i of 0..sq-1 sees key j of 0..sk-1 iff i + diagonal - left <= j <= i + diagonal + right.

    `left`, `right` are -1 for an open side, as in `Inputs`.
    """

    sq: int
    sk: int
    diagonal: int
    left: int
    right: int

    @classmethod
    def of(cls, x: Inputs, sq: int, sk: int) -> Band:
        """The band of one sequence of x with sq queries and sk keys."""
        return cls(sq, sk, sk - sq if x.bottom_right else 0, x.window_left, x.window_right)

    def rows(self) -> tuple[int, int]:
        """Half-open range of the queries that see at least one key; (0, 0) when none does."""
        first = 0 if self.right < 0 else max(0, -self.diagonal - self.right)
        last = self.sq if self.left < 0 else min(self.sq, self.sk - self.diagonal + self.left)
        return (first, last) if first < last and self.sk > 0 else (0, 0)

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of the keys that some query of first..last-1 sees; may be empty."""
        start = 0 if self.left < 0 else max(0, first + self.diagonal - self.left)
        end = self.sk if self.right < 0 else min(self.sk, last + self.diagonal + self.right)
        return start, end

    def is_full(self, first: int, last: int, start: int, end: int) -> bool:
        """True when each query of first..last-1 sees each key of start..end-1."""
        after_left = self.left < 0 or last - 1 + self.diagonal - self.left <= start
        return after_left and (self.right < 0 or first + self.diagonal + self.right >= end - 1)

    def visible(self, first: int, last: int, start: int, end: int) -> torch.Tensor:
        """Bool (last - first, end - start): which of those keys each of those queries sees."""
        offset = torch.arange(start, end) - torch.arange(first, last).unsqueeze(1) - self.diagonal
        seen = torch.ones_like(offset, dtype=torch.bool)
        if self.left >= 0:
            seen &= offset >= -self.left
        if self.right >= 0:
            seen &= offset <= self.right
        return seen

    def counts(self, first: int, last: int) -> torch.Tensor:
        """Float32 (last - first,): how many keys each of the queries first..last-1 sees."""
        position = torch.arange(first, last) + self.diagonal
        start = torch.zeros_like(position) if self.left < 0 else (position - self.left).clamp(0, self.sk)
        end = torch.full_like(position, self.sk)
        if self.right >= 0:
            end = (position + self.right + 1).clamp(0, self.sk)
        return (end - start).float()

    def pieces(self, block_m: int, start: int, end: int) -> Iterator[Piece]:
        """Cover every visible pair whose key is in start..end-1, each pair once, with few pieces.

        An open left side gives at most a full and a causal piece, which need no mask; otherwise the queries
        are taken block_m at a time, so that a mask stays small and keys outside the window are not touched.
        """
        first, last = self.rows()
        if self.left < 0:
            yield from self._triangle(first, last, start, end)
            return
        for row in range(first, last, block_m):
            stop = min(row + block_m, last)
            a, b = self.keys(row, stop)
            a, b = max(a, start), min(b, end)
            if a < b:
                yield Piece(row, stop, a, b, "full" if self.is_full(row, stop, a, b) else "masked")

    def _triangle(self, first: int, last: int, start: int, end: int) -> Iterator[Piece]:
        if self.right < 0:
            yield Piece(first, last, start, end, "full")
            return
        # Row i sees keys up to i + reach. The first row that sees key `start` sees `corner` as its last key:
        # before the corner all rows see everything, from it on the triangle is top-left.
        reach = self.diagonal + self.right
        first = max(first, start - reach)
        if first >= last:
            return
        corner = first + reach
        end = min(end, last + reach)
        if corner >= end - 1:
            yield Piece(first, last, start, end, "full")
            return
        if corner > start:
            yield Piece(first, last, start, corner, "full")
        yield Piece(first, last, corner, end, "causal")
