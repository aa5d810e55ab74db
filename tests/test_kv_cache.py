"""PagedKVCache against a naive model, attention over it, and everything that it must refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headfold import flash_attn_func, flash_attn_with_kvcache
from headfold.kv_cache import PagedKVCache
from headfold.kv_pages import OutOfPages, OutOfSequences
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.conftest import Target

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


# ---- appending --------------------------------------------------------------------------------------------


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


# ---- sharing ----------------------------------------------------------------------------------------------


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


# ---- running out ------------------------------------------------------------------------------------------


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


# ---- attention --------------------------------------------------------------------------------------------


def dense_call(
    cache: PagedKVCache, q: torch.Tensor, held: list[Tokens]
) -> tuple[Inputs, tuple[torch.Tensor, torch.Tensor]]:
    """The same attention over dense keys of the same capacity, NaN past the ends."""
    room = cache.max_pages_per_sequence * cache.page_size
    k = torch.full((len(held), room, HEADS, D), NAN, dtype=cache.dtype, device=cache.device)
    v = torch.full((len(held), room, HEADS, DV), NAN, dtype=cache.dtype, device=cache.device)
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


# ---- any order of calls -----------------------------------------------------------------------------------


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


# ---- errors -----------------------------------------------------------------------------------------------

K, V = tokens(2, 3)
CALLS: list[tuple[str, tuple[Any, ...], type[Exception], str]] = [
    ("append", (9, K, V), ValueError, "ids [0] is 9; no such sequence; ids come from allocate and fork"),
    ("append", ([0, 0], K, V), ValueError, "ids is [0, 0]; every sequence may come once"),
    ("append", ("01", K, V), TypeError, "ids is '01'; it must be an int on the host"),
    ("append", ([0, 1.0], K, V), TypeError, "ids[1] is 1.0; it must be an int on the host"),
    ("append", (True, K, V), TypeError, "ids is True; it must be an int on the host"),
    (
        "append",
        (torch.tensor([0, 1]), K, V),
        TypeError,
        "ids is tensor([0, 1]); it must be an int on the host",
    ),
    ("append", (None, K, V), TypeError, "ids is None; it must be an int on the host"),
    ("append", ([0, 1], [1.0], V), TypeError, "k is a list; it must be a torch.Tensor"),
    ("append", ([0, 1], K, None), TypeError, "v is a NoneType; it must be a torch.Tensor"),
    (
        "append",
        ([0, 1], K[0], V[0]),
        ValueError,
        "k has shape (3, 2, 8); it must be (n, s, num_kv_heads, head_dim), or ragged with lengths",
    ),
    ("append", ([0], K, V), ValueError, "k has shape (2, 3, 2, 8); it must be (1, 3, 2, 8)"),
    ("append", ([0, 1], K[..., :4], V), ValueError, "k has shape (2, 3, 2, 4); it must be (2, 3, 2, 8)"),
    ("append", ([0, 1], K, V[:, :2]), ValueError, "v has shape (2, 2, 2, 12); it must be (2, 3, 2, 12)"),
    (
        "append",
        ([0, 1], K.half(), V),
        ValueError,
        "k has dtype torch.float16; it must be the cache's torch.float32",
    ),
    ("append", ([0, 1], K, V.to("meta")), ValueError, "v is on meta; it must be on the cache's cpu"),
    ("append", ([0, 1], K[0], V[0], [1]), ValueError, "lengths has 1 entries; there are 2 sequences"),
    ("append", ([0, 1], K[0], V[0], [4, -1]), ValueError, "lengths has -1; it must be >= 0"),
    ("append", ([0, 1], K[0], V[0], [1, 1]), ValueError, "k has shape (3, 2, 8); it must be (2, 2, 8)"),
    ("append", ([0, 1], K, V, [3, 3]), ValueError, "k has shape (2, 3, 2, 8); it must be (6, 2, 8)"),
    (
        "append",
        ([0, 1], K[0], V[0], torch.tensor([1, 2])),
        TypeError,
        "lengths is tensor([1, 2]); it must be an int on the host",
    ),
    (
        "append",
        (0, *tokens(1, 30)),
        ValueError,
        "k brings 30 tokens more to sequence [0], which has 5; max_pages_per_sequence gives room for 32",
    ),
    (
        "reserve",
        ([1, 0], [0, 28]),
        ValueError,
        "num_tokens brings 28 tokens more to sequence [1], which has 5; max_pages_per_sequence gives room for 32",
    ),
    (
        "allocate",
        (33,),
        ValueError,
        "num_tokens brings 33 tokens more to sequence [0], which has 0; max_pages_per_sequence gives room for 32",
    ),
    ("allocate", ([1, None],), TypeError, "num_tokens[1] is None; it must be an int on the host"),
    ("allocate", (-1,), ValueError, "num_tokens has -1; it must be >= 0"),
    ("reserve", ([0, 1], [1]), ValueError, "num_tokens has 1 entries; there are 2 sequences"),
    ("reserve", (0, 2.5), TypeError, "num_tokens is 2.5; it must be an int on the host"),
    ("advance", (0, 4), ValueError, "num_tokens is 4 for sequence 0; 3 are reserved; call reserve first"),
    ("advance", ([0, 1], -1), ValueError, "num_tokens has -1; it must be >= 0"),
    ("slots", (0, 4), ValueError, "num_tokens is 4 for sequence 0; 3 are reserved; call reserve first"),
    ("fork", (7,), ValueError, "ids [0] is 7; no such sequence; ids come from allocate and fork"),
    ("fork", ([0],), TypeError, "ids[0] is [0]; it must be an int on the host"),
    ("free", ([1, 4],), ValueError, "ids [1] is 4; no such sequence; ids come from allocate and fork"),
    ("free", ([1, 1],), ValueError, "ids is [1, 1]; every sequence may come once"),
    ("truncate", (0, 6), ValueError, "length is 6 for sequence 0; it must be 0 to its length 5"),
    ("truncate", ([0, 1], [5, 1]), ValueError, "length is 1 for sequence 1; it must be 0 to its length 0"),
    ("truncate", (0, -1), ValueError, "length has -1; it must be >= 0"),
    ("view", ([5],), ValueError, "ids [0] is 5; no such sequence; ids come from allocate and fork"),
    ("length", (5,), ValueError, "ids [0] is 5; no such sequence; ids come from allocate and fork"),
    (
        "shared_prefix_len",
        ([0, 5],),
        ValueError,
        "ids [1] is 5; no such sequence; ids come from allocate and fork",
    ),
    ("write", ([0], K[0], V[0]), TypeError, "slots is a list; it must be a torch.Tensor"),
    (
        "write",
        (torch.zeros(3, 1).int(), K[0], V[0]),
        ValueError,
        "slots has shape (3, 1); it must be (tokens,)",
    ),
    (
        "write",
        (torch.zeros(3), K[0], V[0]),
        ValueError,
        "slots has dtype torch.float32; it must be int64 or int32",
    ),
    (
        "write",
        (torch.zeros(3, device="meta").int(), K[0], V[0]),
        ValueError,
        "slots is on meta; it must be on the cache's cpu",
    ),
    ("write", (torch.arange(2), K[0], V[0]), ValueError, "k has shape (3, 2, 8); it must be (2, 2, 8)"),
    ("write", (torch.arange(3), K[0], V[0, :2]), ValueError, "v has shape (2, 2, 12); it must be (3, 2, 12)"),
    (
        "write",
        (torch.tensor([0, -2, 2]), K[0], V[0]),
        ValueError,
        "slots [1] is -2; a slot must be 0 to 47, or -1 for padding",
    ),
    (
        "write",
        (torch.tensor([-1, 1, 48]), K[0], V[0]),
        ValueError,
        "slots [2] is 48; a slot must be 0 to 47, or -1 for padding",
    ),
    (
        "write",
        (torch.arange(3), K[0], V[0], 8),
        ValueError,
        "ids [0] is 8; no such sequence; ids come from allocate and fork",
    ),
]


def small_cache() -> PagedKVCache:
    """Sequence 0 with 5 tokens in pages 0 and 1, sequence 1 with none."""
    cache = make_cache(4)
    ids = cache.allocate([0, 0])
    assert ids == [0, 1]
    cache.append(0, *tokens(1, 5))
    return cache


@pytest.mark.parametrize("call", CALLS, ids=lambda c: f"{c[0]}-{c[3][:32]}")
def test_bad_arguments_change_nothing(call: tuple[str, tuple[Any, ...], type[Exception], str]) -> None:
    method, arguments, kind, message = call
    cache = small_cache()
    before = state_of(cache)
    with pytest.raises(kind) as error:
        getattr(cache, method)(*arguments)
    assert str(error.value) == f"PagedKVCache.{method}: {message}"
    assert_unchanged(cache, before)


@pytest.mark.parametrize("name", ["k", "v"])
def test_tokens_that_require_a_gradient_are_refused(name: str) -> None:
    cache = small_cache()
    given = {"k": K.clone(), "v": V.clone()}
    given[name].requires_grad_()
    before = state_of(cache)
    with pytest.raises(NotImplementedError, match=f"PagedKVCache.append: {name} requires a gradient"):
        cache.append([0, 1], **given)
    assert_unchanged(cache, before)
    with torch.no_grad():
        cache.append([0, 1], **given)
    assert_holds(cache, 1, (K[1], V[1]))


PADDED = ([9, -1, 4], [-1, -1, -1], [4, 9, -1])  # -1 among slots, alone, and beside slot 0's page


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slots", PADDED, ids=str)
def test_padding_is_not_written(
    slots: list[int], dtype: torch.dtype, check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pads a batch to a graph's size comes with slot -1 and any bytes."""
    monkeypatch.setenv("HEADFOLD_CHECK", check)
    cache = small_cache()
    assert_padding_is_skipped(cache, slots, lambda k, v: cache.write(torch.tensor(slots, dtype=dtype), k, v))


@pytest.mark.parametrize("slots", PADDED, ids=str)
def test_padding_is_not_written_by_slots_that_the_host_does_not_know(
    target: Target, slots: list[int]
) -> None:
    """The way of slots on a GPU: one append in which each token is a sequence and each page a cache row."""
    cache = small_cache()

    def put(k: torch.Tensor, v: torch.Tensor) -> None:
        cache._put_unseen(torch.tensor(slots), k, v)

    if target.device == "cuda":
        pytest.skip("tests on a GPU are below")
    assert_padding_is_skipped(cache, slots, put)


@pytest.mark.gpu
@pytest.mark.parametrize("slots", PADDED, ids=str)
def test_padding_is_not_written_on_a_gpu(slots: list[int]) -> None:
    cache = PagedKVCache(
        12, 4, 2, 8, 12, max_sequences=3, max_pages_per_sequence=8, dtype=torch.float32, device="cuda"
    )
    cache.k_cache.zero_()
    cache.v_cache.zero_()
    device_slots = torch.tensor(slots, device="cuda")
    assert_padding_is_skipped(cache, slots, lambda k, v: cache.write(device_slots, k, v))


def assert_padding_is_skipped(
    cache: PagedKVCache, slots: list[int], write: Callable[[torch.Tensor, torch.Tensor], None]
) -> None:
    """Writes three tokens, NaN where padding is, and compares the whole pool with what it must be."""
    k, v = (t[0].to(cache.device).clone() for t in (K, V))
    want_k, want_v = (t.clone() for t in (cache.k_cache, cache.v_cache))
    for j, slot in enumerate(slots):
        if slot < 0:
            k[j] = v[j] = float("nan")
        else:
            want_k[slot // 4, slot % 4], want_v[slot // 4, slot % 4] = k[j], v[j]
    write(k, v)
    torch.testing.assert_close(cache.k_cache, want_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(cache.v_cache, want_v, rtol=0, atol=0, equal_nan=True)


def test_tokens_of_any_strides_go_to_slots_that_the_host_does_not_know(target: Target) -> None:
    if target.device == "cuda":
        pytest.skip("CPU tensors")
    cache = small_cache()
    k, v = (t[0].transpose(0, 2).contiguous().transpose(0, 2) for t in (K, V))
    assert k.stride(-1) != 1
    cache._put_unseen(torch.tensor([5, 9, 0]), k, v)
    assert torch.equal(cache.k_cache[[1, 2, 0], [1, 1, 0]], k)
    assert torch.equal(cache.v_cache[[1, 2, 0], [1, 1, 0]], v)


def test_padding_may_come_twice_under_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    cache = small_cache()
    cache.write(torch.tensor([-1, 5, -1]), K[0], V[0], [0])
    assert torch.equal(cache.k_cache[1, 1], K[0, 1])


SLOT_CHECKS = [
    ([4, 5, 4], None, "slots [2] is 4, as [0] is; all must differ"),
    ([4, 5, 8], [0], "slots [2] is 8, in page 2; one of the sequences [0] must own that page alone"),
    ([5, 6, 4], 1, "slots [0] is 5, in page 1; one of the sequences [1] must own that page alone"),
    ([5, 6, 3], [0, 1], "slots [2] is 3, in page 0; one of the sequences [0, 1] must own that page alone"),
]


@pytest.mark.parametrize("case", SLOT_CHECKS, ids=lambda c: c[2][:24])
def test_value_checks_of_slots(case: tuple[list[int], Any, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that come twice, of pages that others own, or that a fork shares."""
    slots, ids, message = case
    cache = small_cache()
    cache.fork(0)  # shares page 0
    cache.write(torch.tensor(slots), K[0], V[0], ids)
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    before = state_of(cache)
    with pytest.raises(ValueError) as error:
        cache.write(torch.tensor(slots), K[0], V[0], ids)
    assert str(error.value) == f"PagedKVCache.write: {message}"
    assert_unchanged(cache, before)


GOOD: dict[str, Any] = {
    "num_pages": 3,
    "page_size": 4,
    "num_kv_heads": HEADS,
    "head_dim": D,
    "head_dim_v": DV,
    "max_sequences": 2,
    "max_pages_per_sequence": 3,
    "dtype": torch.float32,
    "device": "cpu",
}
KC, VC = torch.zeros(3, 4, HEADS, D), torch.zeros(3, 4, HEADS, DV)
BAD_CACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    *(
        ({name: 0}, ValueError, f"{name} is 0; it must be 1 to ")
        for name in GOOD
        if name not in ("dtype", "device")
    ),
    *(
        ({name: 2.0}, TypeError, f"{name} is 2.0; it must be an int on the host")
        for name in GOOD
        if name not in ("dtype", "device")
    ),
    ({"head_dim": 257}, ValueError, "head_dim is 257; it must be 1 to 256"),
    ({"head_dim_v": 257}, ValueError, "head_dim_v is 257; it must be 1 to 256"),
    (
        {"max_pages_per_sequence": 2**28 + 1},
        ValueError,
        "max_pages_per_sequence is 268435457; it must be 1 to 268435456",
    ),
    ({"dtype": torch.float64}, ValueError, "dtype is torch.float64; it must be float16, bfloat16 or float32"),
    ({"dtype": None}, ValueError, "dtype is None; it must be float16, bfloat16 or float32"),
    ({"device": None}, TypeError, "device is None; it must be a torch.device or its name"),
    ({"v_cache": None}, ValueError, "v_cache is None; k_cache and v_cache are given both or neither"),
    ({"k_cache": None}, ValueError, "k_cache is None; k_cache and v_cache are given both or neither"),
    ({"k_cache": 1}, TypeError, "k_cache is a int; it must be a torch.Tensor"),
    ({"k_cache": KC[0]}, ValueError, "k_cache has shape (4, 2, 8); it must be (3, 4, 2, 8)"),
    ({"k_cache": VC}, ValueError, "k_cache has shape (3, 4, 2, 12); it must be (3, 4, 2, 8)"),
    ({"v_cache": KC}, ValueError, "v_cache has shape (3, 4, 2, 8); it must be (3, 4, 2, 12)"),
    (
        {"v_cache": VC.half()},
        ValueError,
        "v_cache has dtype torch.float16; it must be the cache's torch.float32",
    ),
    ({"k_cache": KC.to("meta")}, ValueError, "k_cache is on meta; it must be on the cache's cpu"),
    (
        {"k_cache": torch.zeros(3, 4, D, HEADS).transpose(2, 3)},
        ValueError,
        "k_cache has last stride 2; its last dimension must be contiguous",
    ),
    (
        {"v_cache": torch.zeros(1, 4, HEADS, DV).expand(3, 4, HEADS, DV)},
        ValueError,
        "v_cache is expanded (a stride is 0); every element needs its own place",
    ),
]


@pytest.mark.parametrize("bad", BAD_CACHES, ids=lambda bad: bad[2][:40])
def test_bad_caches(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, kind, message = bad
    PagedKVCache(**{**GOOD, "k_cache": KC, "v_cache": VC})
    with pytest.raises(kind) as error:
        PagedKVCache(**{**GOOD, "k_cache": KC, "v_cache": VC, **changes})
    assert str(error.value).startswith(f"PagedKVCache: {message}")


def test_head_dim_v_defaults_to_head_dim() -> None:
    cache = PagedKVCache(**{**GOOD, "head_dim_v": None})
    assert cache.v_cache.shape == (3, 4, HEADS, D)
