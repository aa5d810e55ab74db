"""shared_prefix: what the ledger says of neighbours is what a look at their page tables says, and attention by it."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch

from headfold import flash_attn_with_kvcache, shared_prefix
from headfold.kv_cache import PagedKVCache
from headfold.problem import Inputs
from tests.cases import assert_accurate
from tests.conftest import Target
from tests.kv_cache.caches import HEADS, D, make_cache, tokens

Groups = list[tuple[int, int]]


def common(cache: PagedKVCache, ids: list[int]) -> int:
    """Leading whole pages that the page table rows of all ids have in common."""
    full = min(int(cache.lengths[i]) // cache.page_size for i in ids)
    rows = cache.page_table[ids, :full]
    same = (rows == rows[:1]).all(0).tolist()
    return same.index(False) if False in same else full


def saved(groups: Groups) -> int:
    return sum(pages * (n - 1) for pages, n in groups)


def looked_up(cache: PagedKVCache, ids: list[int]) -> Groups:
    """The rule of the docstring, by the page table."""
    if not ids:
        return []
    pages = common(cache, ids)
    if len(ids) == 1:
        return [(pages, 1)]
    cuts = [
        0,
        *(i + 1 for i, pair in enumerate(pairwise(ids)) if common(cache, list(pair)) == pages),
        len(ids),
    ]
    parts = [group for a, b in pairwise(cuts) for group in looked_up(cache, ids[a:b])]
    whole = [(pages, len(ids))]
    return whole if pages and saved(whole) >= saved(parts) else parts


def assert_as_looked_up(cache: PagedKVCache, ids: list[int]) -> None:
    lengths, sizes = cache.shared_prefix(ids)
    want = looked_up(cache, ids)
    size = cache.page_size
    assert lengths == [pages * size for pages, _ in want]
    assert sizes == [n for _, n in want]
    assert sum(sizes) == len(ids)
    found = [(n // size, s) for n, s in zip(lengths, sizes, strict=True)]
    first = 0
    for pages, n in found:
        assert pages == common(cache, ids[first : first + n]), "all that the group has in common"
        first += n
    if ids:
        assert saved(found) >= saved([(common(cache, ids), len(ids))]), "no less than one group shares"


@pytest.mark.parametrize("page_size", [1, 4])
def test_any_family_is_what_its_page_tables_say(page_size: int) -> None:
    """Random forks, appends, truncations and ends; any ids in any order, some of them twice."""
    draw = random.Random(page_size)
    grouped = 0
    for _ in range(60):
        cache = make_cache(page_size, num_pages=120, max_sequences=12, max_pages=24 // page_size)
        ids = cache.allocate([0, 0])
        for _ in range(30):
            some = draw.choice(ids)
            action = draw.choice(("append", "append", "fork", "fork", "fork", "cut", "free"))
            if action == "append" and cache.length(some) < 18:
                cache.append(some, *tokens(1, draw.randint(1, 6)))
            elif action == "fork" and len(ids) < 12:
                ids.insert(ids.index(some) + draw.randint(0, 1), cache.fork(some))
            elif action == "cut":
                cache.truncate(some, draw.randint(0, cache.length(some)))
            elif action == "free" and len(ids) > 2:
                cache.free(some)
                ids.remove(some)
            asked = (
                list(ids) if draw.random() < 0.6 else [draw.choice(ids) for _ in range(draw.randint(0, 8))]
            )
            assert_as_looked_up(cache, asked)
            grouped += saved([(n, s) for n, s in zip(*cache.shared_prefix(asked), strict=True)]) > 0
    assert grouped > 500


def test_beams_of_requests_behind_one_prompt() -> None:
    """One group of all while the requests are short; a group for each once their own pages are worth more."""
    cache = make_cache(4, num_pages=40, max_sequences=8)
    (prompt,) = cache.allocate()
    cache.append(prompt, *tokens(1, 16))
    requests = [cache.fork(prompt) for _ in range(2)]
    cache.append(requests, *tokens(2, 4))
    beams = [id for r in requests for id in (r, cache.fork(r), cache.fork(r))]
    assert cache.shared_prefix(beams) == ([16], [6])
    assert cache.shared_prefix([prompt, *beams]) == ([16], [7])
    cache = make_cache(4, num_pages=40, max_sequences=8)
    (prompt,) = cache.allocate()
    cache.append(prompt, *tokens(1, 4))
    requests = [cache.fork(prompt) for _ in range(2)]
    cache.append(requests, *tokens(2, 13))
    beams = [id for r in requests for id in (r, cache.fork(r), cache.fork(r))]
    assert cache.shared_prefix(beams) == ([16, 16], [3, 3])
    assert cache.shared_prefix([beams[i] for i in (0, 3, 1, 4)]) == ([4], [4]), "neighbours alone make groups"
    (other,) = cache.allocate(8)
    assert cache.shared_prefix([other, *beams[:2]]) == ([0, 16], [1, 2])
    assert cache.shared_prefix([]) == ([], [])
    assert cache.shared_prefix(beams[0]) == ([16], [1])


def test_a_long_chain_of_forks() -> None:
    """Each a page longer than the one before: nested families as deep as there are sequences."""
    cache = make_cache(1, num_pages=3000, max_sequences=1500, max_pages=1500)
    ids = cache.allocate()
    for _ in range(1200):
        ids.append(cache.fork(ids[-1]))
        cache.append(ids[-1], *tokens(1, 1))
    lengths, sizes = cache.shared_prefix(ids)
    assert sum(sizes) == len(ids)
    assert saved([(n, s) for n, s in zip(lengths, sizes, strict=True)]) > 1200


def test_nothing_is_read_from_the_device() -> None:
    cache = make_cache(4)
    (a,) = cache.allocate()
    cache.append(a, *tokens(1, 9))
    b = cache.fork(a)
    cache.page_table.fill_(-1)
    cache.lengths.fill_(-1)
    assert cache.shared_prefix([a, b]) == ([8], [2])


@pytest.mark.parametrize("append", ["before", "by the call"])
def test_attention_by_what_the_cache_says(
    target: Target, append: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fork, decode some steps, decode together: the promise is kept under value checks and the result accurate."""
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    cache = make_cache(3, num_pages=60, max_pages=12, device=target.device)
    parent, other = cache.allocate([0, 0])
    cache.append([parent, other], *tokens(2, 8, like=cache))
    beams = [parent, cache.fork(parent), cache.fork(parent)]
    cache.append(beams[1:], *tokens(2, 2, seed=1, like=cache))
    cache.truncate(beams[1], 7)
    ids = [*beams, cache.fork(beams[2]), other]
    new = tokens(len(ids), 2, seed=2, like=cache)
    q = torch.randn(len(ids), 2, 2 * HEADS, D, generator=torch.Generator().manual_seed(3)).to(cache.device)
    if append == "before":
        cache.append(ids, *new)
        new = ()  # type: ignore[assignment]
    else:
        cache.reserve(ids, 2)
    lengths, groups = cache.shared_prefix(ids)
    assert (lengths, groups) == ([6, 9], [4, 1]) if append == "before" else ([6, 6], [4, 1])
    table, used = cache.view(ids)
    with shared_prefix.force(True):
        out, lse = flash_attn_with_kvcache(  # type: ignore[misc]
            q,
            cache.k_cache,
            cache.v_cache,
            *new,
            cache_seqlens=used,
            page_table=table,
            causal=True,
            return_softmax_lse=True,
            shared_prefix_len=lengths,
            shared_prefix_groups=groups,
        )
    if new:
        cache.advance(ids, 2)
    table, used = cache.view(ids)
    x = Inputs(q, cache.k_cache, cache.v_cache, page_table=table, seqused_k=used, window_right=0)
    assert_accurate(x, out, lse)
