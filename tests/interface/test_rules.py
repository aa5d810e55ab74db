"""The rules of docs/semantics.md as a user meets them, each against attention computed one pair at a time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import headfold
from tests.cases import NAN
from tests.conftest import Target
from tests.interface.one_pair import INF, Rules, attend, rotate
from tests.interface.tensors import ints, rand

B, SQ, SK, H, HK, D, DV = 2, 3, 7, 6, 2, 8, 6
Q, K, V = rand(B, SQ, H, D), rand(B, SK, HK, D), rand(B, SK, HK, DV)
SINK, SLOPES, EACH_SLOPES = rand(H), rand(H).abs(), rand(B, H).abs()
COS, SIN = rand(24, 3).cos(), rand(24, 3).sin()


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


def holds(
    target: Target,
    rules: list[Rules],
    q: torch.Tensor = Q,
    k: torch.Tensor = K,
    v: torch.Tensor = V,
    **options: Any,
) -> None:
    """flash_attn_func with these options is what the rules say for each sequence."""
    placed = {n: o.to(target.device) if isinstance(o, torch.Tensor) else o for n, o in options.items()}
    out, lse = headfold.flash_attn_func(*(t.to(target.device) for t in (q, k, v)), return_lse=True, **placed)
    assert lse.dtype == torch.float32
    for i, rule in enumerate(rules):
        want, want_lse = attend(q[i], k[i], v[i], rule)
        close(out[i], want)
        close(lse[i], want_lse)


def test_head_map_lse_and_the_default_scale(target: Target) -> None:
    """Query head i reads KV head i // G; the LSE is natural, (b, h, sq); None is d**-0.5."""
    holds(target, [Rules()] * B)


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.5])
def test_scale(target: Target, scale: float) -> None:
    holds(target, [Rules(scale=scale)] * B, softmax_scale=scale)


@pytest.mark.parametrize("window", [(2, 1), (None, 1), (2, None), (-1, 0), (0, 0), (None, None)], ids=str)
def test_windows_with_both_ends_included(target: Target, window: tuple[int | None, int | None]) -> None:
    left, right = (None if side in (None, -1) else side for side in window)
    holds(target, [Rules(left=left, right=right)] * B, window_size=window)
    if None not in window:
        holds(target, [Rules(left=left, right=right)] * B, window_size=torch.tensor(window, device="cpu"))


@pytest.mark.parametrize(("sq", "sk"), [(3, 7), (7, 3), (4, 4)])
def test_causal_is_a_right_side_of_0_from_the_last_key(target: Target, sq: int, sk: int) -> None:
    q, k, v = rand(B, sq, H, D), rand(B, sk, HK, D), rand(B, sk, HK, DV)
    holds(target, [Rules(right=0)] * B, q, k, v, causal=True)
    holds(target, [Rules(left=1, right=0)] * B, q, k, v, causal=True, window_size=(1, 5))


@pytest.mark.parametrize(("sq", "sk"), [(3, 7), (7, 3)])
def test_attention_chunk(target: Target, sq: int, sk: int) -> None:
    """(i + sk - sq) // c == j // c, floored below 0 too, and causal or a window on top."""
    q, k, v = rand(B, sq, H, D), rand(B, sk, HK, D), rand(B, sk, HK, DV)
    holds(target, [Rules(chunk=3)] * B, q, k, v, attention_chunk=3)
    holds(target, [Rules(chunk=3, right=0)] * B, q, k, v, attention_chunk=3, causal=True)
    holds(target, [Rules(chunk=4, left=2, right=1)] * B, q, k, v, attention_chunk=4, window_size=(2, 1))


def test_softcap_comes_before_the_bias_and_the_mask(target: Target) -> None:
    holds(target, [Rules(softcap=0.7)] * B, softcap=0.7)
    holds(
        target,
        [Rules(softcap=0.7, slopes=SLOPES, right=0)] * B,
        softcap=0.7,
        alibi_slopes=SLOPES,
        causal=True,
    )


def test_alibi_slopes_of_heads_and_of_sequences(target: Target) -> None:
    holds(target, [Rules(slopes=SLOPES)] * B, alibi_slopes=SLOPES)
    holds(target, [Rules(slopes=s, right=0) for s in EACH_SLOPES], alibi_slopes=EACH_SLOPES, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sink_is_one_more_logit_without_a_value(target: Target, dtype: torch.dtype) -> None:
    sink = SINK.to(dtype)
    holds(target, [Rules(sink=sink)] * B, learnable_sink=sink)
    holds(target, [Rules(sink=sink, right=0)] * B, rand(B, 9, H, D), learnable_sink=sink, causal=True)


@pytest.mark.parametrize("sink", [None, SINK], ids=["no sink", "sink"])
def test_a_row_without_a_key_is_0_and_its_lse_the_sink_or_minus_infinity(
    target: Target, sink: torch.Tensor | None
) -> None:
    holds(target, [Rules(right=0, sink=sink)] * B, rand(B, 9, H, D), causal=True, learnable_sink=sink)
    out, lse = headfold.flash_attn_func(
        *(t.to(target.device) for t in (Q, K[:, :0], V[:, :0])),
        learnable_sink=None if sink is None else sink.to(target.device),
        return_lse=True,
    )
    assert not out.any()
    want = (
        torch.full_like(lse, -INF) if sink is None else sink.to(target.device)[None, :, None].expand_as(lse)
    )
    assert torch.equal(lse, want)


def test_num_splits_changes_no_meaning(target: Target) -> None:
    for n in (1, 2, 5):
        holds(target, [Rules(right=0)] * B, causal=True, num_splits=n)


def test_a_fixed_extent_of_splits_wins_over_their_number(target: Target) -> None:
    """With tokens_per_split the bits do not depend on num_splits, nor on the rest of the batch."""
    holds(target, [Rules()] * B, tokens_per_split=2)
    q, k, v = (t.to(target.device) for t in (Q, K, V))
    out, lse = headfold.flash_attn_func(q, k, v, tokens_per_split=2, return_lse=True)
    again, again_lse = headfold.flash_attn_func(q, k, v, tokens_per_split=2, num_splits=3, return_lse=True)
    alone, alone_lse = headfold.flash_attn_func(q[1:], k[1:], v[1:], tokens_per_split=2, return_lse=True)
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)
    assert torch.equal(out[1:], alone)
    assert torch.equal(lse[1:], alone_lse)


def test_deterministic_changes_nothing(target: Target) -> None:
    q, k, v = (t.to(target.device) for t in (Q, K, V))
    assert torch.equal(
        headfold.flash_attn_func(q, k, v, deterministic=True), headfold.flash_attn_func(q, k, v)
    )


def test_ragged_sequences_with_some_of_their_slots_used(target: Target) -> None:
    """(total, h, d) with offsets; seqused says how much of a slot counts, and the rest may be NaN."""
    cu_q, cu_k, used_q, used_k = ints(0, 3, 3, 8), ints(0, 7, 11, 13), ints(2, 0, 4), ints(5, 0, 2)
    q, k, v = rand(8, H, D), rand(13, HK, D), rand(13, HK, DV)
    poisoned = [t.clone() for t in (q, k, v)]
    for i in range(3):
        poisoned[0][int(cu_q[i]) + int(used_q[i]) : int(cu_q[i + 1])] = NAN
        for t in poisoned[1:]:
            t[int(cu_k[i]) + int(used_k[i]) : int(cu_k[i + 1])] = NAN
    tensors = [t.to(target.device) for t in (*poisoned, cu_q, cu_k)]
    used = [t.to(target.device) for t in (used_q, used_k)]
    for bounds in ((5, 7), (None, None), (40, 80)):
        out, lse = headfold.flash_attn_varlen_func(*tensors, *bounds, *used, causal=True, return_lse=True)
        assert lse.shape == (H, 8)
        for i in range(3):
            rows = slice(int(cu_q[i]), int(cu_q[i]) + int(used_q[i]))
            keys = slice(int(cu_k[i]), int(cu_k[i]) + int(used_k[i]))
            want, want_lse = attend(q[rows], k[keys], v[keys], Rules(right=0))
            close(out[rows], want)
            close(lse[:, rows], want_lse)


def paged(
    k: torch.Tensor, v: torch.Tensor, lengths: list[int], size: int, garbage: int
) -> tuple[torch.Tensor, ...]:
    """The same keys in shuffled pages; NaN and garbage entries past every end."""
    per = -(-max(k.shape[1], 1) // size)
    order = torch.randperm(B * per, generator=torch.Generator().manual_seed(1))
    table = torch.full((B, per), garbage, dtype=torch.int32)
    pages = [torch.full((B * per, size, *t.shape[2:]), NAN) for t in (k, v)]
    for i, n in enumerate(lengths):
        for j in range(-(-n // size)):
            page = table[i, j] = order[i * per + j]
            for pool, t in zip(pages, (k, v), strict=True):
                rows = t[i, j * size : min((j + 1) * size, n)]
                pool[page, : len(rows)] = rows
    return *pages, table


@pytest.mark.parametrize("size", [1, 3, 4, 16])
def test_pages_hold_the_same_bits_and_nothing_past_the_end_is_read(target: Target, size: int) -> None:
    lengths = [7, 4]
    *pages, table = (t.to(target.device) for t in paged(K, V, lengths, size, garbage=2**31 - 1))
    q, k, v, used = (t.to(target.device) for t in (Q, K, V, ints(*lengths)))
    options: dict[str, Any] = {
        "cache_seqlens": used,
        "causal": True,
        "return_softmax_lse": True,
        "num_splits": 2,
    }
    out, lse = headfold.flash_attn_with_kvcache(q, *pages, page_table=table, **options)
    dense, dense_lse = headfold.flash_attn_with_kvcache(q, k, v, **options)
    assert torch.equal(out, dense)
    assert torch.equal(lse, dense_lse)
    for i, n in enumerate(lengths):
        close(out[i], attend(Q[i], K[i, :n], V[i, :n], Rules(right=0))[0])


def test_one_length_for_all_or_one_each(target: Target) -> None:
    q, k, v = (t.to(target.device) for t in (Q, K, V))
    want = torch.stack([attend(Q[i], K[i, :5], V[i, :5], Rules())[0] for i in range(B)])
    for length in (5, ints(5, 5).to(target.device)):
        close(headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=length), want)


@pytest.mark.parametrize("pages", [0, 4], ids=["dense", "paged"])
@pytest.mark.parametrize(
    ("interleaved", "options"),
    list(itertools.product([True, False], [{}, {"causal": True}, {"window_size": (2, 1)}])),
    ids=str,
)
@pytest.mark.parametrize("own_positions", [False, True])
def test_new_keys_go_into_the_cache_and_are_attended_to(
    target: Target, pages: int, interleaved: bool, options: dict[str, Any], own_positions: bool
) -> None:
    """New k at cache_seqlens + i or rotary_seqlens + i, q at the same with causal or a window, else all at the
    first; the lengths stay as they were. A sequence crosses into its next page, another fills its last one."""
    starts, new = [3, 6], 2
    k_new, v_new = rand(B, new, HK, D) + 1, rand(B, new, HK, DV) + 1
    caches = [torch.cat([t, torch.full((B, 1, *t.shape[2:]), NAN)], dim=1) for t in (K, V)]
    for i, n in enumerate(starts):
        for t in caches:
            t[i, n:] = NAN
    table = None
    if pages:
        *caches, table = paged(*caches, [8, 8], pages, garbage=0)
        table = table.to(target.device)
    caches = [t.to(target.device) for t in caches]
    lengths, positions = ints(*starts).to(target.device), [11, 0] if own_positions else starts
    out, lse = headfold.flash_attn_with_kvcache(
        Q.to(target.device),
        *caches,
        *(t.to(target.device) for t in (k_new, v_new)),
        rotary_cos=COS.to(target.device),
        rotary_sin=SIN.to(target.device),
        rotary_interleaved=interleaved,
        rotary_seqlens=ints(*positions).to(target.device) if own_positions else None,
        cache_seqlens=lengths,
        page_table=table,
        return_softmax_lse=True,
        **options,
    )
    assert lengths.tolist() == starts
    rules = Rules(right=0) if "causal" in options else Rules(left=2, right=1) if options else Rules()
    for i, n in enumerate(starts):
        turned = torch.stack(
            [rotate(k_new[i, t], positions[i] + t, COS, SIN, interleaved) for t in range(new)]
        )
        q = torch.stack(
            [rotate(Q[i, t], positions[i] + (t if options else 0), COS, SIN, interleaved) for t in range(SQ)]
        )
        want, want_lse = attend(
            q, torch.cat([K[i, :n].double(), turned]), torch.cat([V[i, :n], v_new[i]]), rules
        )
        close(out[i], want)
        close(lse[i], want_lse)
        held = caches[0][i] if table is None else caches[0][table[i].long()].flatten(0, 1)
        close(held[n : n + new], turned)
        assert held[n + new :].isnan().all(), "nothing is written past the new keys"


def test_cache_rows_and_left_padding(target: Target) -> None:
    """sk and j count from the first valid key: causal, windows and chunks do."""
    rows, pads, lengths = [2, 0], [2, 5], [6, 9]
    k, v = rand(3, 10, HK, D), rand(3, 10, HK, DV)
    hidden = [t.clone() for t in (k, v)]
    for row, pad, n in zip(rows, pads, lengths, strict=True):
        for t in hidden:
            t[row, :pad] = t[row, n:] = NAN
    for t in hidden:
        t[1] = NAN
    for options, rules in (
        ({}, Rules()),
        ({"causal": True}, Rules(right=0)),
        ({"window_size": (1, 0)}, Rules(left=1, right=0)),
        ({"attention_chunk": 2, "causal": True}, Rules(chunk=2, right=0)),
    ):
        out = headfold.flash_attn_with_kvcache(
            *(t.to(target.device) for t in (Q, *hidden)),
            cache_seqlens=ints(*lengths).to(target.device),
            cache_batch_idx=ints(*rows).to(target.device),
            cache_leftpad=ints(*pads).to(target.device),
            **options,  # type: ignore[arg-type]
        )
        for i, (row, pad, n) in enumerate(zip(rows, pads, lengths, strict=True)):
            close(out[i], attend(Q[i], k[row, pad:n], v[row, pad:n], rules)[0])


def test_cache_batch_idx_picks_rows_of_the_page_table(target: Target) -> None:
    table = torch.arange(12, dtype=torch.int32).view(3, 4)
    k, v = rand(12, 2, HK, D), rand(12, 2, HK, DV)
    tensors = [t.to(target.device) for t in (Q, k, v)]
    out = headfold.flash_attn_with_kvcache(
        *tensors,
        cache_seqlens=ints(7, 5).to(target.device),
        cache_batch_idx=ints(2, 0).to(target.device),
        page_table=table.to(target.device),
    )
    for i, (row, n) in enumerate([(2, 7), (0, 5)]):
        keys, values = (t[table[row].long()].flatten(0, 1)[:n] for t in (k, v))
        close(out[i], attend(Q[i], keys, values, Rules())[0])


def test_tree_mask_is_over_the_newest_keys(target: Target) -> None:
    tree = (rand(B, SQ, SQ) > 0) | torch.eye(SQ, dtype=torch.bool)
    lengths = [7, 4]
    packed = (
        (tree.to(torch.uint8) << torch.arange(SQ, dtype=torch.uint8)).sum(-1, keepdim=True).to(torch.uint8)
    )
    for given in (tree, packed):
        out = headfold.flash_attn_with_kvcache(
            *(t.to(target.device) for t in (Q, K, V)),
            cache_seqlens=ints(*lengths).to(target.device),
            tree_mask=given.to(target.device),
        )
        for i, n in enumerate(lengths):
            close(out[i], attend(Q[i], K[i, :n], V[i, :n], Rules(tree=tree[i]))[0])


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("shape", [(SQ, SK), (1, SK), (H, SQ, SK), (B, 1, SQ, SK), (B, H, 1, SK)], ids=str)
def test_masks_of_sdpa_broadcast(target: Target, shape: tuple[int, ...], kind: str) -> None:
    mask = rand(*shape) > 0 if kind == "bool" else rand(*shape)
    q, k, v = (t.transpose(1, 2).to(target.device) for t in (Q, K, V))
    out = headfold.scaled_dot_product_attention(q, k, v, mask.to(target.device), enable_gqa=True)
    full = mask.expand(B, H, SQ, SK)
    for i in range(B):
        close(out[i].transpose(0, 1), attend(Q[i], K[i], V[i], Rules(mask=full[i]))[0])


def test_is_causal_of_sdpa_is_top_left(target: Target) -> None:
    q, k, v = (t.transpose(1, 2).to(target.device) for t in (Q, K, V))
    out = headfold.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for i in range(B):
        close(out[i].transpose(0, 1), attend(Q[i], K[i], V[i], Rules(right=0, top_left=True))[0])
