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

    `left`, `right` are -1 for an open side, as in `Inputs`. With `chunk` > 0 a query sees keys of its own chunk
    only, (i + diagonal) // chunk == j // chunk.
    """

    sq: int
    sk: int
    diagonal: int
    left: int
    right: int
    chunk: int = 0

    @classmethod
    def of(cls, x: Inputs, sq: int, sk: int) -> Band:
        """The band of one sequence of x with sq queries and sk keys."""
        diagonal = sk - sq if x.bottom_right else 0
        one_chunk = diagonal >= 0 and max(sk, sq + diagonal) <= x.attention_chunk
        chunk = 0 if one_chunk else x.attention_chunk
        return cls(sq, sk, diagonal, x.window_left, x.window_right, chunk)

    def rows(self) -> tuple[int, int]:
        """Half-open range of the queries that see at least one key; (0, 0) when none does."""
        first = 0 if self.right < 0 else max(0, -self.diagonal - self.right)
        last = self.sq if self.left < 0 else min(self.sq, self.sk - self.diagonal + self.left)
        if self.chunk:
            first = max(first, -self.diagonal)
            last = min(last, -(-self.sk // self.chunk) * self.chunk - self.diagonal)
        return (first, last) if first < last and self.sk > 0 else (0, 0)

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """Half-open range of the keys that some query of first..last-1 sees; may be empty."""
        return self._low(first), self._high(last - 1)

    def _low(self, row: int) -> int:
        """The first key that a query sees, if it sees any."""
        low = 0 if self.left < 0 else max(0, row + self.diagonal - self.left)
        return max(low, (row + self.diagonal) // self.chunk * self.chunk) if self.chunk else low

    def _high(self, row: int) -> int:
        """The key after the last one that a query sees, if it sees any."""
        high = self.sk if self.right < 0 else min(self.sk, row + self.diagonal + self.right + 1)
        return min(high, self._chunk_end(row)) if self.chunk else high

    def _chunk_end(self, row: int) -> int:
        return ((row + self.diagonal) // self.chunk + 1) * self.chunk

    def is_full(self, first: int, last: int, start: int, end: int) -> bool:
        """True when each query of first..last-1 sees each key of start..end-1."""
        return self._low(last - 1) <= start and end <= self._high(first)

    def visible(self, first: int, last: int, start: int, end: int) -> torch.Tensor:
        """Bool (last - first, end - start): which of those keys each of those queries sees."""
        key, position = torch.arange(start, end), torch.arange(first, last).unsqueeze(1) + self.diagonal
        offset = key - position
        seen = torch.ones_like(offset, dtype=torch.bool)
        if self.left >= 0:
            seen &= offset >= -self.left
        if self.right >= 0:
            seen &= offset <= self.right
        if self.chunk:
            seen &= position.div(self.chunk, rounding_mode="floor") == key // self.chunk
        return seen

    def counts(self, first: int, last: int) -> torch.Tensor:
        """Float32 (last - first,): how many keys each of the queries first..last-1 sees."""
        position = torch.arange(first, last) + self.diagonal
        start, end = torch.zeros_like(position), torch.full_like(position, self.sk)
        if self.left >= 0:
            start = (position - self.left).clamp(0, self.sk)
        if self.right >= 0:
            end = (position + self.right + 1).clamp(0, self.sk)
        if self.chunk:
            own = position.div(self.chunk, rounding_mode="floor") * self.chunk
            start, end = start.maximum(own), end.minimum(own + self.chunk)
        return (end - start).float()

    def pieces(self, block_m: int, start: int, end: int) -> Iterator[Piece]:
        """Cover every visible pair whose key is in start..end-1, each pair once, with few pieces.

        An open left side gives at most a full and a causal piece a chunk, which need no mask; otherwise the
        queries are taken block_m at a time, so that a mask stays small and keys outside the window are not
        touched.
        """
        first, last = self.rows()
        if self.left < 0:
            while first < last:
                stop = min(last, self._chunk_end(first) - self.diagonal) if self.chunk else last
                a = max(self._low(first), start)
                b = min(self._chunk_end(first), end) if self.chunk else end
                if a < b:
                    yield from self._triangle(first, stop, a, b)
                first = stop
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
