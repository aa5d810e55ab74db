"""Tokens appended by tensors and by slots, in every layout."""

from __future__ import annotations

import pytest
import torch

from headfold.kv_cache import PagedKVCache
from tests.kv_cache.caches import DV, HEADS, LAYOUTS, PAGE_SIZES, D, assert_holds, joined, make_cache, tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_append_crosses_pages_and_fills_the_last_one(page_size: int, layout: str) -> None:
    """One token, up to the end of a page exactly, one more, and over several pages at once."""
    cache = make_cache(page_size, layout=layout)
    (id,) = cache.allocate()
    parts, length = [], 0
    for n in (1, page_size - 1, 1, 2 * page_size + 1, -(3 * page_size + 2) % page_size):
        k, v = tokens(1, n, seed=len(parts))
        cache.append(id, k, v)
        parts.append((k[0], v[0]))
        length += n
        assert cache.num_free_pages == 12 - -(-length // page_size)
        assert_holds(cache, id, joined(*parts))
    assert length % page_size == 0
    unwritten = cache.k_cache.isnan().any(-1).any(-1)
    assert unwritten.sum() == 12 * page_size - length


@pytest.mark.parametrize("ragged", [False, True])
def test_append_to_several_sequences(ragged: bool) -> None:
    cache = make_cache(4)
    ids = cache.allocate([0, 0, 0])
    lengths = [5, 0, 3] if ragged else [3, 3, 3]
    k, v = tokens(sum(lengths))
    given = (k, v, lengths) if ragged else (k.view(3, 3, HEADS, D), v.view(3, 3, HEADS, DV))
    cache.append(ids[::-1], *given)
    for id, kk, vv in zip(ids[::-1], k.split(lengths), v.split(lengths), strict=True):
        assert_holds(cache, id, (kk, vv))


def test_new_tokens_of_any_strides() -> None:
    cache = make_cache(4)
    ids = cache.allocate([0, 0])
    k, v = tokens(1, 5)
    k, v = k.expand(2, -1, -1, -1), v.transpose(-1, -2).contiguous().transpose(-1, -2).expand(2, -1, -1, -1)
    cache.append(ids, k, v)
    for id in ids:
        assert_holds(cache, id, (k[0], v[0]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_append_by_slot_mapping(layout: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    cache = make_cache(3, layout=layout)
    ids = cache.allocate([5, 2])
    k, v = tokens(7)
    slots = cache.slots(ids, [5, 2])
    assert slots.dtype == torch.int64
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    cache.write(slots[order].to(dtype), k[order], v[order], ids)
    assert [cache.length(id) for id in ids] == [0, 0]
    cache.advance(ids, [5, 2])
    assert_holds(cache, ids[0], (k[:5], v[:5]))
    assert_holds(cache, ids[1], (k[5:], v[5:]))


def test_slots_are_page_times_size_plus_offset() -> None:
    cache = make_cache(4)
    (id,) = cache.allocate()
    cache.append(id, *tokens(1, 3))
    cache.reserve(id, 3)
    first, second = cache.page_table[id, :2].tolist()
    assert cache.slots(id, 3).tolist() == [first * 4 + 3, second * 4, second * 4 + 1]
    assert cache.slots([], []).tolist() == []


def test_reserving_again_adds_nothing() -> None:
    cache = make_cache(4)
    (id,) = cache.allocate(9)
    assert cache.num_free_pages == 9
    cache.reserve(id, 12)
    cache.reserve(id, 1)
    assert cache.num_free_pages == 9
    assert int(cache.lengths[id]) == 0


def test_views_are_copies_in_the_order_asked_for() -> None:
    cache = make_cache(4)
    ids = cache.allocate([0, 0])
    cache.append(ids, *tokens(5, seed=1), lengths=[1, 4])
    table, lengths = cache.view([ids[1], ids[0], ids[1]])
    assert table.shape == (3, 8)
    assert (table.dtype, lengths.dtype) == (torch.int32, torch.int32)
    assert lengths.tolist() == [4, 1, 4]
    cache.append(ids, *tokens(2, 1))
    assert lengths.tolist() == [4, 1, 4]
    assert cache.view([])[0].shape == (0, 8)


def test_a_cache_made_in_inference_mode_is_used_outside() -> None:
    with torch.inference_mode():
        cache = PagedKVCache(
            4, 2, HEADS, D, DV, max_sequences=2, max_pages_per_sequence=2, dtype=torch.float32, device="cpu"
        )
        (id,) = cache.allocate()
        first = tokens(1, 2, seed=1)
        cache.append(id, *first)
    second = tokens(1, 1, seed=2)
    cache.append(id, *second)
    assert_holds(cache, id, joined((first[0][0], first[1][0]), (second[0][0], second[1][0])))


def test_engine_storage_is_used_as_it_is() -> None:
    for layout in LAYOUTS:
        k, v = LAYOUTS[layout](3, 4)
        cache = PagedKVCache(
            3,
            4,
            HEADS,
            D,
            DV,
            max_sequences=1,
            max_pages_per_sequence=3,
            dtype=torch.float32,
            device="cpu",
            k_cache=k,
            v_cache=v,
        )
        assert cache.k_cache is k
        assert cache.v_cache is v
