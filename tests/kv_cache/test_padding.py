"""Slots of -1: the padding of a batch, which is not written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from headfold.kv_cache import PagedKVCache
from tests.conftest import Target
from tests.kv_cache.caches import K, V, small_cache

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
