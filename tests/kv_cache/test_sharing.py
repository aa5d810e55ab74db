"""Forks, truncation and pages that are used again."""

from __future__ import annotations

import pytest

from tests.kv_cache.caches import assert_holds, joined, make_cache, tokens


@pytest.mark.parametrize("who", ["parent", "fork", "both"])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9])
def test_neither_side_of_a_fork_sees_what_the_other_appends(length: int, who: str) -> None:
    cache = make_cache(4)
    (parent,) = cache.allocate()
    k, v = tokens(length)
    cache.append(parent, k[None], v[None])
    free = cache.num_free_pages
    fork = cache.fork(parent)
    assert free - cache.num_free_pages == (1 if length % 4 else 0)
    assert cache.shared_prefix_len([parent, fork]) == length // 4 * 4
    want = {parent: (k, v), fork: (k, v)}
    for id, name in ((parent, "parent"), (fork, "fork")):
        assert_holds(cache, id, (k, v))
        if who in (name, "both"):
            new = tokens(1, 6, seed=id + 10)
            cache.append(id, *new)
            want[id] = joined((k, v), (new[0][0], new[1][0]))
    for id in (parent, fork):
        assert_holds(cache, id, want[id])
    cache.free([parent])
    assert_holds(cache, fork, want[fork])
    cache.free(fork)
    assert cache.num_free_pages == 12


def test_reserved_pages_stay_the_parents() -> None:
    cache = make_cache(4)
    (parent,) = cache.allocate(12)
    cache.append(parent, *tokens(1, 4))
    fork = cache.fork(parent)
    assert cache.num_free_pages == 9
    slots = cache.slots(parent, 8)
    new = tokens(8, seed=1)
    cache.write(slots, *new)
    cache.advance(parent, 8)
    assert int(cache.lengths[fork]) == 4
    with pytest.raises(ValueError, match="0 are reserved"):
        cache.advance(fork, 1)


def test_a_sequence_cut_inside_a_shared_page_copies_it_before_it_writes() -> None:
    cache = make_cache(4)
    (parent,) = cache.allocate()
    k, v = tokens(8)
    cache.append(parent, k[None], v[None])
    fork = cache.fork(parent)
    cache.truncate(fork, 6)
    assert cache.num_free_pages == 10
    assert cache.shared_prefix_len([parent, fork]) == 6
    with pytest.raises(ValueError, match="0 are reserved; call reserve first"):
        cache.slots(fork, 1)
    cache.reserve(fork, 0)
    assert cache.num_free_pages == 10
    cache.reserve(fork, 1)
    assert cache.num_free_pages == 9
    assert cache.shared_prefix_len([parent, fork]) == 4
    new = tokens(1, 1, seed=1)
    cache.append(fork, *new)
    assert cache.num_free_pages == 9
    assert_holds(cache, parent, (k, v))
    assert_holds(cache, fork, joined((k[:6], v[:6]), (new[0][0], new[1][0])))


def test_the_last_of_those_that_leave_a_page_together_keeps_it() -> None:
    """Two sequences end inside the same page and both append: one copy suffices, and one free page."""
    cache = make_cache(4, num_pages=3)
    (parent,) = cache.allocate()
    k, v = tokens(8)
    cache.append(parent, k[None], v[None])
    fork = cache.fork(parent)
    cache.truncate([parent, fork], [7, 6])
    assert cache.num_free_pages == 1
    new = tokens(2, 1, seed=1)
    cache.append([parent, fork], *new)
    assert cache.num_free_pages == 0
    assert_holds(cache, parent, joined((k[:7], v[:7]), (new[0][0], new[1][0])))
    assert_holds(cache, fork, joined((k[:6], v[:6]), (new[0][1], new[1][1])))


def test_shared_prefix_of_many() -> None:
    cache = make_cache(4, num_pages=20)
    (a,) = cache.allocate()
    cache.append(a, *tokens(1, 12))
    b = cache.fork(a)
    cache.append([a, b], *tokens(2, 1))
    cache.truncate(b, 9)
    c = cache.fork(b)
    (other,) = cache.allocate(4)
    assert cache.shared_prefix_len(a) == 13
    assert cache.shared_prefix_len([a, b]) == 9
    assert cache.shared_prefix_len([a, b, c]) == 8
    assert cache.shared_prefix_len([a, other]) == 0
    assert cache.shared_prefix_len([]) == 0


def test_truncate_gives_pages_back() -> None:
    cache = make_cache(4)
    ids = cache.allocate([20, 0])
    k, v = tokens(2, 9)
    cache.append(ids, k, v)
    cache.truncate(ids, [9, 4])
    assert cache.num_free_pages == 12 - 3 - 1
    assert_holds(cache, ids[1], (k[1, :4], v[1, :4]))
    cache.truncate(ids, 0)
    assert cache.num_free_pages == 12
    assert cache.lengths.tolist() == [0] * 6


def test_any_free_page_is_used_again() -> None:
    cache = make_cache(1, num_pages=8, max_pages=8)
    ids = cache.allocate([1] * 6)
    cache.append(ids, *tokens(6, 1))
    cache.free(ids[::2])
    (late,) = cache.allocate()
    k, v = tokens(1, 5, seed=3)
    cache.append(late, k, v)
    assert cache.num_free_pages == 0
    assert_holds(cache, late, (k[0], v[0]))
    assert late in ids[::2]
