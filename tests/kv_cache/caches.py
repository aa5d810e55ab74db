"""Caches of every layout, their tokens, and what is the same about them before and after."""

from __future__ import annotations

import copy
from typing import Any

import torch

from headfold.kv_cache import PagedKVCache
from tests.cases import NAN

PAGE_SIZES = [1, 3, 16, 64]
HEADS, D, DV = 2, 8, 12
Tokens = tuple[torch.Tensor, torch.Tensor]


def contiguous(pages: int, size: int, **to: Any) -> Tokens:
    return torch.empty(pages, size, HEADS, D, **to), torch.empty(pages, size, HEADS, DV, **to)


def halves(pages: int, size: int, **to: Any) -> Tokens:
    """K and V beside each other in one row."""
    both = torch.empty(pages, size, HEADS, D + DV, **to)
    return both[..., :D], both[..., D:]


def heads_first(pages: int, size: int, **to: Any) -> Tokens:
    k, v = torch.empty(pages, HEADS, size, D, **to), torch.empty(pages, HEADS, size, DV, **to)
    return k.transpose(1, 2), v.transpose(1, 2)


def one_buffer(pages: int, size: int, **to: Any) -> Tokens:
    """Each page holds its K, then its V, in a buffer that is off by one element."""
    page, cut = size * HEADS * (D + DV), size * HEADS * D
    flat = torch.empty(pages * page + 1, **to)[1:].view(pages, page)
    return flat[:, :cut].view(pages, size, HEADS, D), flat[:, cut:].view(pages, size, HEADS, DV)


LAYOUTS = {f.__name__: f for f in (contiguous, halves, heads_first, one_buffer)}


def make_cache(
    page_size: int = 4,
    *,
    num_pages: int = 12,
    max_sequences: int = 6,
    max_pages: int = 8,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PagedKVCache:
    """A cache full of NaN."""
    k, v = LAYOUTS[layout](num_pages, page_size, dtype=dtype, device=device)
    return PagedKVCache(
        num_pages,
        page_size,
        HEADS,
        D,
        DV,
        max_sequences=max_sequences,
        max_pages_per_sequence=max_pages,
        dtype=dtype,
        device=device,
        k_cache=k.fill_(NAN),
        v_cache=v.fill_(NAN),
    )


def tokens(*lead: int, seed: int = 0, like: PagedKVCache | None = None) -> Tokens:
    """Random tokens (*lead, hk, d | dv)."""
    g = torch.Generator().manual_seed(seed)
    k, v = torch.randn(*lead, HEADS, D, generator=g), torch.randn(*lead, HEADS, DV, generator=g)
    return (k, v) if like is None else (k.to(like.device, like.dtype), v.to(like.device, like.dtype))


def content(cache: PagedKVCache, id: int) -> Tokens:
    """A sequence's tokens as a kernel finds them: through page_table and lengths."""
    n = int(cache.lengths[id])
    at = torch.arange(n, device=cache.device)
    page = cache.page_table[id].long()[at // cache.page_size]
    return cache.k_cache[page, at % cache.page_size], cache.v_cache[page, at % cache.page_size]


def assert_holds(cache: PagedKVCache, id: int, want: Tokens) -> None:
    assert cache.length(id) == len(want[0]) == int(cache.lengths[id])
    for got, expected in zip(content(cache, id), want, strict=True):
        assert torch.equal(got, expected)


def state_of(cache: PagedKVCache) -> tuple[Any, ...]:
    """All that a refused call must leave as it was."""
    tensors = (cache.page_table, cache.lengths, cache.k_cache, cache.v_cache)
    return (copy.deepcopy(cache._ledger), *(t.clone().nan_to_num(-77.0) for t in tensors))


def assert_unchanged(cache: PagedKVCache, before: tuple[Any, ...]) -> None:
    after = state_of(cache)
    assert after[0] == before[0]
    for got, want in zip(after[1:], before[1:], strict=True):
        assert torch.equal(got, want)


def joined(*parts: Tokens) -> Tokens:
    return torch.cat([k for k, _ in parts]), torch.cat([v for _, v in parts])


K, V = tokens(2, 3)


def small_cache() -> PagedKVCache:
    """Sequence 0 with 5 tokens in pages 0 and 1, sequence 1 with none."""
    cache = make_cache(4)
    ids = cache.allocate([0, 0])
    assert ids == [0, 1]
    cache.append(0, *tokens(1, 5))
    return cache
