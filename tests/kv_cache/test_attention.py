"""Attention over the cache is attention over its tokens."""

from __future__ import annotations

import pytest
import torch

from headfold import flash_attn_func, flash_attn_with_kvcache
from headfold.kv_cache import PagedKVCache
from headfold.problem import Inputs, is_aligned
from tests.cases import NAN, assert_accurate
from tests.conftest import Target
from tests.kv_cache.caches import (
    DV,
    HEADS,
    LAYOUTS,
    PAGE_SIZES,
    D,
    Tokens,
    assert_holds,
    joined,
    make_cache,
    tokens,
)


def dense_call(
    cache: PagedKVCache, q: torch.Tensor, held: list[Tokens]
) -> tuple[Inputs, tuple[torch.Tensor, torch.Tensor]]:
    """The same attention over dense keys of the same capacity and alignment, NaN past the ends."""
    room = cache.max_pages_per_sequence * cache.page_size
    odd = 0 if is_aligned(cache.k_cache) and is_aligned(cache.v_cache) else 1
    shape = (len(held), room, HEADS)
    k = torch.full((*shape, D + odd), NAN, dtype=cache.dtype, device=cache.device)[..., :D]
    v = torch.full((*shape, DV + odd), NAN, dtype=cache.dtype, device=cache.device)[..., :DV]
    for i, (ki, vi) in enumerate(held):
        k[i, : len(ki)], v[i, : len(vi)] = ki, vi
    lengths = torch.tensor([len(ki) for ki, _ in held], dtype=torch.int32, device=cache.device)
    got = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True)
    return Inputs(q, k, v, seqused_k=lengths, window_right=0), got  # type: ignore[return-value]


def assert_attends(cache: PagedKVCache, ids: list[int], held: list[Tokens], seed: int = 0) -> None:
    """Attention over the cache: the bits of a dense call, and accurate."""
    q = torch.randn(len(ids), 2, 3 * HEADS, D, generator=torch.Generator().manual_seed(seed))
    q = q.to(cache.device, cache.dtype)
    table, lengths = cache.view(ids)
    out, lse = flash_attn_with_kvcache(  # type: ignore[misc]
        q,
        cache.k_cache,
        cache.v_cache,
        cache_seqlens=lengths,
        page_table=table,
        causal=True,
        return_softmax_lse=True,
    )
    x, (want, want_lse) = dense_call(cache, q, held)
    assert torch.equal(out, want)
    assert torch.equal(lse, want_lse)
    assert_accurate(x, out, lse)


@pytest.mark.parametrize(("page_size", "layout"), list(zip(PAGE_SIZES, LAYOUTS, strict=True)))
def test_attention_over_the_cache(target: Target, page_size: int, layout: str) -> None:
    cache = make_cache(
        page_size,
        num_pages=64 // page_size + 6,
        max_pages=-(-40 // page_size),
        layout=layout,
        device=target.device,
    )
    ids = cache.allocate([0, 0, 0])
    k, v = tokens(45, like=cache)
    cache.append(ids, k, v, [33, 0, 12])
    held = [(k[:33], v[:33]), (k[:0], v[:0]), (k[33:], v[33:])]
    for step in range(3):  # decoding, across page boundaries
        k, v = tokens(3, 1, seed=step + 1, like=cache)
        cache.append(ids, k, v)
        held = [joined(h, (k[i], v[i])) for i, h in enumerate(held)]
    assert_attends(cache, ids[::-1], held[::-1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_in_half_precision(target: Target, dtype: torch.dtype) -> None:
    if dtype not in target.dtypes:
        pytest.skip(f"{target.name} does not compute {dtype}")
    cache = make_cache(16, dtype=dtype, device=target.device)
    ids = cache.allocate([0, 0])
    k, v = tokens(2, 21, like=cache)
    cache.append(ids, k, v)
    assert_attends(cache, ids, [(k[0], v[0]), (k[1], v[1])])


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_attention_of_a_fork_is_that_of_a_copy(target: Target, page_size: int) -> None:
    """Parent, fork and a copy made by appending give the same bits, before and after they part."""
    cache = make_cache(
        page_size, num_pages=72 // page_size + 6, max_pages=-(-28 // page_size), device=target.device
    )
    parent, copied = cache.allocate([0, 0])
    k, v = tokens(20, like=cache)
    cache.append(parent, k[None], v[None])
    cache.append(copied, k[None], v[None])
    fork = cache.fork(parent)
    mine, theirs = tokens(7, seed=1, like=cache), tokens(7, seed=2, like=cache)
    cache.append([fork, copied], mine[0].expand(2, -1, -1, -1), mine[1].expand(2, -1, -1, -1))
    assert_attends(cache, [parent, fork, copied], [(k, v), *[joined((k, v), mine)] * 2])
    cache.append(parent, theirs[0][None], theirs[1][None])
    held = [joined((k, v), theirs), *[joined((k, v), mine)] * 2]
    assert_attends(cache, [parent, fork, copied], held)


def test_attention_after_rejected_tokens(target: Target) -> None:
    """Speculative decoding: four tokens are written, three dropped, and others take their place."""
    cache = make_cache(3, num_pages=20, device=target.device)
    ids = cache.allocate([0, 0])
    k, v = tokens(2, 8, like=cache)
    cache.append(ids, k, v)
    draft = tokens(2, 4, seed=1, like=cache)
    cache.append(ids, *draft)
    cache.truncate(ids, [9, 12])
    new = tokens(2, 1, seed=2, like=cache)
    cache.append(ids, *new)
    held = [
        joined((k[i], v[i]), (draft[0][i, :kept], draft[1][i, :kept]), (new[0][i], new[1][i]))
        for i, kept in ((0, 1), (1, 4))
    ]
    assert_attends(cache, ids, held)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_tokens_that_the_kernel_appends(target: Target, page_size: int) -> None:
    """reserve, the call with k and v, advance: for sequences of different lengths, one of them cut in a shared page."""
    cache = make_cache(page_size, num_pages=60, max_pages=-(-24 // page_size), device=target.device)
    parent, other = cache.allocate([0, 0])
    k, v = tokens(21, like=cache)
    cache.append([parent, other], k, v, [16, 5])
    fork = cache.fork(parent)
    cache.truncate(fork, 14)
    ids = [fork, other]
    new = tokens(2, 4, seed=1, like=cache)
    cache.reserve(ids, 4)
    table, lengths = cache.view(ids)
    q = torch.randn(2, 4, 2 * HEADS, D).to(target.device)
    out = flash_attn_with_kvcache(
        q, cache.k_cache, cache.v_cache, *new, cache_seqlens=lengths, page_table=table, causal=True
    )
    cache.advance(ids, 4)
    held = [
        joined((k[:14], v[:14]), (new[0][0], new[1][0])),
        joined((k[16:], v[16:]), (new[0][1], new[1][1])),
    ]
    for id, want in zip([*ids, parent], [*held, (k[:16], v[:16])], strict=True):
        assert_holds(cache, id, want)
    assert isinstance(out, torch.Tensor)
    for i, (ki, vi) in enumerate(held):
        alone = flash_attn_func(q[i : i + 1], ki[None], vi[None], causal=True)
        torch.testing.assert_close(out[i : i + 1], alone)


def test_the_whole_table_is_a_batch(target: Target) -> None:
    """page_table and lengths serve as they are, as a CUDA graph uses them: free rows are empty sequences."""
    cache = make_cache(4, device=target.device)
    ids = cache.allocate([0, 0, 0])
    k, v = tokens(3, 7, like=cache)
    cache.append(ids, k, v)
    cache.free(ids[1])
    q = torch.randn(6, 1, 2 * HEADS, D).to(target.device)
    out = flash_attn_with_kvcache(
        q, cache.k_cache, cache.v_cache, cache_seqlens=cache.lengths, page_table=cache.page_table
    )
    assert isinstance(out, torch.Tensor)
    for i in (0, 2):
        alone = flash_attn_func(q[i : i + 1], k[i : i + 1], v[i : i + 1])
        torch.testing.assert_close(out[i : i + 1], alone)
    assert (out[[1, 3, 4, 5]] == 0).all()


@pytest.mark.gpu
def test_no_call_waits_for_the_gpu() -> None:
    cache = make_cache(4, num_pages=40, device="cuda")
    k, v = tokens(2, 5, like=cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids = cache.allocate([0, 3])
        cache.append(ids, k, v)
        cache.append(ids, k[:, 0], v[:, 0], [1, 1])
        fork = cache.fork(ids[0])
        cache.truncate([ids[0], fork], 4)
        cache.truncate(fork, 3)
        cache.reserve([fork], 2)
        cache.write(cache.slots(fork, 2), k[0, :2], v[0, :2], fork)
        cache.advance(fork, 2)
        cache.view([fork, ids[1]])
        cache.free(ids[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_holds(cache, ids[1], joined((k[1], v[1]), (k[1:, 0], v[1:, 0])))
    assert_holds(cache, fork, (torch.cat([k[0, :3], k[0, :2]]), torch.cat([v[0, :3], v[0, :2]])))
