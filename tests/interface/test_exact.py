"""Calls that must give the same bits, because they read the same keys in the same splits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headfold
from tests.cases import NAN
from tests.conftest import Target
from tests.interface.tensors import ints, rand

B, SQ, H, HK, D = 2, 2, 6, 2, 16
# Splits that depend on the keys alone, not on what the host knows of their number.
SPLITS: list[dict[str, Any]] = [{"num_splits": 1}, {"tokens_per_split": 16}]


def on(device: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_appended_then_attended_is_attended_over_the_concatenation(
    target: Target, splits: dict[str, Any]
) -> None:
    q, k, v = on(target.device, rand(B, SQ, H, D), rand(B, 37, HK, D), rand(B, 37, HK, D))
    k_new, v_new = on(target.device, rand(B, SQ, HK, D) + 1, rand(B, SQ, HK, D) + 1)
    caches = [torch.full((B, 60, HK, D), NAN, device=target.device) for _ in range(2)]
    for cache, t in zip(caches, (k, v), strict=True):
        cache[:, :37] = t
    got = headfold.flash_attn_with_kvcache(
        *(q, *caches, k_new, v_new), cache_seqlens=37, causal=True, return_softmax_lse=True, **splits
    )
    want = headfold.flash_attn_func(
        *(q, torch.cat([k, k_new], 1), torch.cat([v, v_new], 1)), causal=True, return_lse=True, **splits
    )
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("splits", SPLITS, ids=str)
def test_planned_from_the_capacity_is_planned_from_the_length(
    target: Target, splits: dict[str, Any], page_size: int
) -> None:
    """The same keys in a cache that has room for many more, behind lengths that the host does not know."""
    q, k, v = on(target.device, rand(B, SQ, H, D), rand(B, 37, HK, D), rand(B, 37, HK, D))
    caches = [torch.full((B, 200, HK, D), NAN, device=target.device) for _ in range(2)]
    for cache, t in zip(caches, (k, v), strict=True):
        cache[:, :37] = t
    options: dict[str, Any] = {"cache_seqlens": ints(37, 37).to(target.device), **splits}
    if page_size:
        caches = [t.view(-1, page_size, HK, D) for t in caches]
        pages = torch.arange(B * 200 // page_size, dtype=torch.int32, device=target.device)
        options["page_table"] = pages.view(B, -1)
    got = headfold.flash_attn_with_kvcache(q, *caches, causal=True, return_softmax_lse=True, **options)
    want = headfold.flash_attn_func(q, k, v, causal=True, return_lse=True, **splits)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_ragged_batch_is_its_sequences_one_by_one(target: Target) -> None:
    """With splits that are fixed, in any layout and whatever else is in the batch."""
    lengths = [5, 41, 17]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = rand(3, H, D), rand(sum(lengths), HK, D), rand(sum(lengths), HK, D)
    out = headfold.flash_attn_varlen_func(
        *on(target.device, q, k, v, ints(0, 1, 2, 3), cu), 1, max(lengths), tokens_per_split=16
    )
    for i, n in enumerate(lengths):
        keys = slice(int(cu[i]), int(cu[i]) + n)
        alone = headfold.flash_attn_func(
            *on(target.device, q[None, i : i + 1], k[None, keys], v[None, keys]), tokens_per_split=16
        )
        assert torch.equal(out[i], alone[0, 0])
