"""Who owns which page of a paged cache: bookkeeping on the host, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a call needs. Nothing was changed."""


class OutOfSequences(RuntimeError):
    """The page table has fewer free rows than a call needs. Nothing was changed."""


@dataclass(slots=True)
class Pages:
    """Pages of one sequence in order, some of them possibly past its length (reserved), and its length."""

    pages: list[int]
    length: int


@dataclass(slots=True)
class Change:
    """What a call will do."""

    tails: dict[int, tuple[int, list[int]]] = field(
        default_factory=dict
    )  # id -> (first, its pages from there on)
    lengths: dict[int, int] = field(default_factory=dict)
    copies: list[tuple[int, int, int]] = field(default_factory=list)  # (from page, to page, tokens)
    taken: int = 0  # pages that leave the free list
    shared: list[int] = field(default_factory=list)  # pages that gain an owner
    dropped: list[int] = field(default_factory=list)  # pages that lose one


@dataclass(slots=True)
class Ledger:
    """Who owns which page: the host's half of the cache. Draws up changes and does their bookkeeping."""

    page_size: int
    free: list[int]
    free_ids: list[int]
    owners: list[int]
    sequences: dict[int, Pages] = field(default_factory=dict)

    def opened(self, counts: list[int]) -> Change:
        """New sequences with pages for so many tokens each."""
        change = Change()
        for i, n in zip(self._new_ids(len(counts)), counts, strict=True):
            self._grow(change, i, Pages([], 0), n)
            change.lengths[i] = 0
        return change

    def forked(self, i: int) -> Change:
        """A new sequence with the tokens of sequence i."""
        source = self.sequences[i]
        full, rest = divmod(source.length, self.page_size)
        (new,) = self._new_ids(1)
        change = Change(lengths={new: source.length}, shared=source.pages[:full])
        tail = list(change.shared)
        if rest:
            tail.append(self._take(change))
            change.copies.append((source.pages[full], tail[-1], rest))
        change.tails[new] = 0, tail
        return change

    def grown(self, ids: list[int], counts: list[int]) -> Change:
        """Room for so many more tokens each, in pages that the sequence alone owns."""
        change = Change()
        for i, n in zip(ids, counts, strict=True):
            self._grow(change, i, self.sequences[i], n)
        return change

    def cut(self, ids: list[int], lengths: list[int]) -> Change:
        """Shorter sequences, without the pages past their ends."""
        change = Change(lengths=dict(zip(ids, lengths, strict=True)))
        for i, n in change.lengths.items():
            keep = -(-n // self.page_size)
            change.tails[i] = keep, []
            change.dropped += self.sequences[i].pages[keep:]
        return change

    def longer(self, ids: list[int], counts: list[int]) -> dict[int, int]:
        """Lengths with so many tokens more."""
        return {i: self.sequences[i].length + n for i, n in zip(ids, counts, strict=True)}

    def room(self, i: int) -> int:
        """Tokens that may be written behind sequence i now."""
        s = self.sequences[i]
        return 0 if self._ends_shared(s) else len(s.pages) * self.page_size - s.length

    def slots(self, change: Change, ids: list[int], counts: list[int]) -> list[int]:
        """Where the next tokens of each sequence go once the change is done."""
        slots: list[int] = []
        for i, n in zip(ids, counts, strict=True):
            first, at = divmod(self.sequences[i].length, self.page_size)
            pages = change.tails[i][1] if i in change.tails else self.sequences[i].pages[first:]
            end = at + n
            for page in pages[: -(-end // self.page_size)]:
                start = page * self.page_size
                slots.extend(range(start + at, start + min(end, self.page_size)))
                at, end = 0, end - self.page_size
        return slots

    def new_cells(self, change: Change) -> list[tuple[int, int, int]]:
        """(row, column, page) of the page table that the change alters."""
        cells = []
        for i, (first, tail) in change.tails.items():
            had = self.sequences[i].pages[first:] if i in self.sequences else []
            cells += [(i, first + j, page) for j, page in enumerate(tail) if had[j : j + 1] != [page]]
        return cells

    def families(self, ids: list[int]) -> list[tuple[int, int]]:
        """(whole pages in common, sequences) of neighbours with a common beginning, parted where that shares more."""
        full = [s.pages[: s.length // self.page_size] for s in (self.sequences[i] for i in ids)]
        return _families([len(pages) for pages in full], [_common_start(a, b) for a, b in pairwise(full)])

    def commit(self, change: Change) -> None:
        """Do the change; `refuse_if_out` let it through."""
        for _ in range(change.taken):
            self.owners[self.free.pop()] = 1
        for page in change.shared:
            self.owners[page] += 1
        for page in change.dropped:
            self.owners[page] -= 1
            if self.owners[page] == 0:
                self.free.append(page)
        for i, (first, tail) in change.tails.items():
            if i not in self.sequences:
                self.sequences[self.free_ids.pop()] = Pages([], 0)
            self.sequences[i].pages[first:] = tail
        for i, n in change.lengths.items():
            self.sequences[i].length = n

    def close(self, ids: list[int]) -> None:
        """Forget sequences that own no page any more."""
        for i in ids:
            del self.sequences[i]
        self.free_ids.extend(ids)

    def refuse_if_out(self, change: Change) -> None:
        """Raise OutOfPages if the change takes more pages than are free."""
        if change.taken > len(self.free):
            free = f"{len(self.free)} of {len(self.owners)} are free"
            raise OutOfPages(
                f"PagedKVCache: {change.taken} more pages are needed and {free}; nothing was changed"
            )

    def _new_ids(self, n: int) -> list[int]:
        if n > len(self.free_ids):
            free = f"{len(self.free_ids)} of {len(self.free_ids) + len(self.sequences)} rows are free"
            raise OutOfSequences(
                f"PagedKVCache: {n} more sequences are needed and {free}; nothing was changed"
            )
        return self.free_ids[::-1][:n]

    def _take(self, change: Change) -> int:
        """One more free page. Past the last one it is -1, and `refuse_if_out` refuses the change."""
        change.taken += 1
        return self.free[-change.taken] if change.taken <= len(self.free) else -1

    def _grow(self, change: Change, i: int, s: Pages, n: int) -> None:
        first, used = divmod(s.length, self.page_size)
        tail = s.pages[first:]
        # Others that leave the page in this same change leave it to the last one, which need not copy.
        if n and self._ends_shared(s) and self.owners[tail[0]] - change.dropped.count(tail[0]) > 1:
            change.dropped.append(tail[0])
            change.copies.append((tail[0], self._take(change), used))
            tail[0] = change.copies[-1][1]
        pages = -(-(s.length + n) // self.page_size)
        tail += [self._take(change) for _ in range(pages - first - len(tail))]
        change.tails[i] = first, tail

    def _ends_shared(self, s: Pages) -> bool:
        """True when the next token of s would go into a page that another sequence reads."""
        first, used = divmod(s.length, self.page_size)
        return used > 0 and self.owners[s.pages[first]] > 1


def _common_start(a: list[int], b: list[int]) -> int:
    """How many leading entries are the same, by bisection: comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


@dataclass(slots=True)
class Family:
    """Neighbours that begin with the same `pages`, and the groups of (pages, sequences) that share most of them."""

    pages: int
    size: int = 0
    groups: list[tuple[int, int]] = field(default_factory=list)
    saved: int = 0  # pages that need not be read again when each group reads its common ones once

    def take(self, part: Family) -> None:
        """Have another part, whose sequences have these pages and maybe more in common."""
        self.size += part.size
        self.groups += part.groups
        self.saved += part.saved

    def whole_or_parted(self) -> Family:
        """One group, or its parts' where they share more; without a page in common always its parts'."""
        whole = self.pages * (self.size - 1)
        if self.pages and whole >= self.saved:
            self.groups, self.saved = [(self.pages, self.size)], whole
        return self


def _families(full: list[int], common: list[int]) -> list[tuple[int, int]]:
    """Groups of sequences with so many pages, of which each has `common` with the next.

    Families lie within one another; `path` are those that the sequence at hand is in, the outermost first.
    """
    path = [Family(0)]
    for pages, shared in zip(full, [*common, 0][: len(full)], strict=True):
        done = Family(pages, 1, [(pages, 1)])
        while path[-1].pages > shared:
            # The sequence is the last of this family.
            path[-1].take(done)
            done = path.pop().whole_or_parted()
        if path[-1].pages < shared:
            path.append(Family(shared))
        path[-1].take(done)
    return path[0].groups
