"""Any order of calls against a naive model."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headfold.kv_pages import OutOfPages, OutOfSequences
from tests.kv_cache.caches import (
    DV,
    HEADS,
    LAYOUTS,
    D,
    Tokens,
    assert_holds,
    assert_unchanged,
    make_cache,
    state_of,
)
from tests.kv_cache.test_shared_prefix import assert_as_looked_up


class CacheMachine(RuleBasedStateMachine):
    """Random calls against a dict of lists of tokens; a token is one number, at every place of its K and V row."""

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[int, list[float]] = {}
        self.next_token = 1.0

    @initialize(
        page_size=st.sampled_from([3, 4, 1, 16]),
        num_pages=st.integers(3, 20),
        layout=st.sampled_from(sorted(LAYOUTS)),
    )
    def start(self, page_size: int, num_pages: int, layout: str) -> None:
        self.cache = make_cache(page_size, num_pages=num_pages, max_sequences=6, max_pages=6, layout=layout)
        (first,) = self.cache.allocate()  # most rules need a sequence: without one, runs would end early
        self.model[first] = []

    def fresh(self, n: int) -> list[float]:
        values = [self.next_token + i for i in range(n)]
        self.next_token += n
        return values

    def pick(self, data: st.DataObject, leave: int = 0) -> list[int]:
        ids = st.sampled_from(sorted(self.model))
        most = len(self.model) - leave
        return data.draw(st.lists(ids, min_size=1, max_size=most, unique=True), label="ids")

    def counts(self, data: st.DataObject, ids: list[int]) -> list[int]:
        size = self.cache.page_size
        likely = st.sampled_from([1, 0, 2, size, size + 1, 2 * size + 1])
        return [data.draw(likely, label="tokens") for _ in ids]

    def fits(self, ids: list[int], counts: list[int]) -> bool:
        room = self.cache.max_pages_per_sequence * self.cache.page_size
        return all(len(self.model[i]) + n <= room for i, n in zip(ids, counts, strict=True))

    def attempt(self, call: Any, ids: list[int], counts: list[int]) -> bool:
        """Make the call. When it is refused that must be right, and have changed nothing."""
        before, free = state_of(self.cache), self.cache.num_free_pages
        try:
            call()
        except ValueError:
            assert not self.fits(ids, counts)
        except OutOfPages:
            ledger, size = before[0], self.cache.page_size
            need = 0
            for i, n in zip(ids, counts, strict=True):
                held = ledger.sequences[i].pages
                need += max(0, -(-(len(self.model[i]) + n) // size) - len(held))
                first, rest = divmod(len(self.model[i]), size)
                need += bool(n and rest and ledger.owners[held[first]] > 1)
            assert need > free
        else:
            assert self.fits(ids, counts)
            return True
        assert_unchanged(self.cache, before)
        return False

    @staticmethod
    def rows(values: list[float]) -> Tokens:
        column = torch.tensor(values).view(-1, 1, 1)
        return column.expand(-1, HEADS, D), -column.expand(-1, HEADS, DV)

    @rule(data=st.data())
    def allocate(self, data: st.DataObject) -> None:
        counts = data.draw(
            st.lists(st.integers(0, 2 * self.cache.page_size), min_size=1, max_size=2), label="counts"
        )
        before = state_of(self.cache)
        pages = sum(-(-n // self.cache.page_size) for n in counts)
        try:
            ids = self.cache.allocate(counts)
        except OutOfSequences:
            assert len(counts) + len(self.model) > 6
            assert_unchanged(self.cache, before)
        except OutOfPages:
            assert pages > self.cache.num_free_pages
            assert_unchanged(self.cache, before)
        else:
            assert not set(ids) & set(self.model)
            assert len(set(ids)) == len(counts)
            self.model.update({i: [] for i in ids})

    @rule(data=st.data(), ragged=st.booleans())
    def append(self, data: st.DataObject, ragged: bool) -> None:
        ids = self.pick(data)
        counts = self.counts(data, ids)
        if not ragged:
            counts = counts[:1] * len(ids)
        values = [self.fresh(n) for n in counts]
        k, v = self.rows([t for new in values for t in new])
        if not ragged:
            k, v = k.reshape(len(ids), counts[0], HEADS, D), v.reshape(len(ids), counts[0], HEADS, DV)
        if self.attempt(lambda: self.cache.append(ids, k, v, counts if ragged else None), ids, counts):
            for i, new in zip(ids, values, strict=True):
                self.model[i] += new

    @rule(data=st.data(), kept=st.integers(0, 3))
    def reserve_write_advance(self, data: st.DataObject, kept: int) -> None:
        """What a kernel that appends does; `kept` tokens of each are not counted, and must leave no trace."""
        ids = self.pick(data)
        counts = self.counts(data, ids)
        if not self.attempt(lambda: self.cache.reserve(ids, counts), ids, counts):
            return
        values = [self.fresh(n) for n in counts]
        k, v = self.rows([t for new in values for t in new])
        self.cache.write(self.cache.slots(ids, counts), k, v, ids)
        counts = [max(0, n - kept) for n in counts]
        self.cache.advance(ids, counts)
        for i, n, new in zip(ids, counts, values, strict=True):
            self.model[i] += new[:n]

    @rule(data=st.data(), dropped=st.integers(0, 2))
    def fork(self, data: st.DataObject, dropped: int) -> None:
        """Fork, and drop a few tokens of the fork: it may then end inside a page that it shares."""
        source = data.draw(st.sampled_from(sorted(self.model)), label="id")
        before = state_of(self.cache)
        try:
            new = self.cache.fork(source)
        except OutOfSequences:
            assert len(self.model) == 6
            assert_unchanged(self.cache, before)
        except OutOfPages:
            assert self.cache.num_free_pages == 0
            assert len(self.model[source]) % self.cache.page_size
            assert_unchanged(self.cache, before)
        else:
            assert new not in self.model
            self.model[new] = list(self.model[source])
            full = len(self.model[new]) // self.cache.page_size * self.cache.page_size
            assert self.cache.shared_prefix_len([source, new]) == full
            keep = max(0, len(self.model[new]) - dropped)
            self.cache.truncate(new, keep)
            del self.model[new][keep:]

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        ids = self.pick(data, leave=1)
        self.cache.free(ids)
        for i in ids:
            del self.model[i]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        ids = self.pick(data)
        drops = [data.draw(st.sampled_from([1, 2, 0, 5, 100]), label="dropped") for _ in ids]
        lengths = [max(0, len(self.model[i]) - n) for i, n in zip(ids, drops, strict=True)]
        self.cache.truncate(ids, lengths)
        for i, n in zip(ids, lengths, strict=True):
            del self.model[i][n:]

    @invariant()
    def every_sequence_holds_its_tokens(self) -> None:
        for i, values in self.model.items():
            assert_holds(self.cache, i, self.rows(values))
        if self.model:
            for i in set(range(6)) - set(self.model):
                assert int(self.cache.lengths[i]) == 0

    @invariant()
    def what_neighbours_share_is_what_their_page_tables_say(self) -> None:
        if self.model:
            assert_as_looked_up(self.cache, sorted(self.model))

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        if not hasattr(self, "cache"):
            return
        ledger, size = self.cache._ledger, self.cache.page_size
        owned = [page for s in ledger.sequences.values() for page in s.pages]
        assert set(ledger.sequences) == set(self.model)
        assert len(set(ledger.free)) == len(ledger.free) == self.cache.num_free_pages
        assert set(ledger.free) | set(owned) == set(range(self.cache.num_pages))
        assert not set(ledger.free) & set(owned)
        assert ledger.owners == [owned.count(page) for page in range(self.cache.num_pages)]
        for i, s in ledger.sequences.items():
            assert len(set(s.pages)) == len(s.pages)
            assert self.cache.page_table[i, : len(s.pages)].tolist() == s.pages
            assert all(ledger.owners[page] == 1 for page in s.pages[-(-s.length // size) :])


CacheMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestAnyOrderOfCalls = CacheMachine.TestCase
