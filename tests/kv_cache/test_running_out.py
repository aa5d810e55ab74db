"""Too few pages or rows: an error that changes nothing."""

from __future__ import annotations

import pytest

from headfold.kv_cache import PagedKVCache
from headfold.kv_pages import OutOfPages, OutOfSequences
from tests.kv_cache.caches import assert_unchanged, make_cache, state_of, tokens


def full_cache() -> tuple[PagedKVCache, list[int]]:
    """Three pages, one free: [0] ends inside a page that [1] shares, [2] is empty."""
    cache = make_cache(4, num_pages=3, max_sequences=4)
    (a,) = cache.allocate()
    cache.append(a, *tokens(1, 8))
    b = cache.fork(a)
    cache.truncate(a, 7)
    return cache, [a, b, *cache.allocate()]


OUT_OF_PAGES = {
    "append": lambda c, ids: c.append(ids, *tokens(3, 1)),
    "append after a copy": lambda c, ids: c.append(ids[:1], *tokens(1, 2)),
    "append ragged": lambda c, ids: c.append(ids, *tokens(9), lengths=[0, 0, 9]),
    "reserve": lambda c, ids: c.reserve(ids, [1, 0, 1]),
    "allocate": lambda c, ids: c.allocate(5),
}


@pytest.mark.parametrize("name", OUT_OF_PAGES)
def test_out_of_pages_changes_nothing(name: str) -> None:
    cache, ids = full_cache()
    before = state_of(cache)
    with pytest.raises(
        OutOfPages, match=r"[23] more pages are needed and 1 of 3 are free; nothing was changed"
    ):
        OUT_OF_PAGES[name](cache, ids)
    assert_unchanged(cache, before)
    assert issubclass(OutOfPages, RuntimeError)


def test_a_fork_out_of_pages_changes_nothing() -> None:
    cache, ids = full_cache()
    cache.reserve(ids[2], 1)
    before = state_of(cache)
    with pytest.raises(OutOfPages, match="1 more pages are needed and 0 of 3 are free"):
        cache.fork(ids[0])
    assert_unchanged(cache, before)
    cache.fork(ids[1])  # page-aligned: it needs no page


def test_out_of_sequences_changes_nothing() -> None:
    cache, ids = full_cache()
    before = state_of(cache)
    with pytest.raises(OutOfSequences, match="2 more sequences are needed and 1 of 4 rows are free"):
        cache.allocate([0, 0])
    assert_unchanged(cache, before)
    cache.allocate()
    with pytest.raises(OutOfSequences, match="1 more sequences are needed and 0 of 4 rows are free"):
        cache.fork(ids[1])
