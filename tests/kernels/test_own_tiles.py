"""A machine's own tiles, through the very kernels: right, and rows of a cache still have the bits of its pages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headfold import backends, flash_attn_with_kvcache, reference
from headfold.planner.tuned import Entry
from tests.conftest import Target
from tests.planner.tables import pair

LENGTHS, PAGE, HEADS, KV_HEADS, D = (17, 150, 64), 16, 4, 2, 64


@pytest.mark.parametrize("queries", [1, 8])
@pytest.mark.parametrize(
    "tiles",
    [pair(16, 128, keys=16, resident=2) + pair(64, 128, keys=64, warps=4), pair(16, 128, keys=128, stages=3)],
    ids=["fewer keys", "more keys"],
)
def test_rows_and_pages_have_the_same_bits_in_own_tiles(
    kernels: Target, tiles: tuple[Entry, ...], queries: int
) -> None:
    """Lengths on the device: a stream, whose cuts depend on the tile too. Against float64."""
    gen = torch.Generator().manual_seed(0)
    q = torch.randn(3, queries, HEADS, D, generator=gen).half()
    k, v = torch.randn(2, 3, 160, KV_HEADS, D, generator=gen).half()
    order = torch.randperm(30, generator=gen)
    pages = torch.empty(2, 30, PAGE, KV_HEADS, D, dtype=torch.float16)
    pages[:, order] = torch.stack([k, v]).reshape(2, 30, PAGE, KV_HEADS, D)
    q, k, v, pages = (t.to(kernels.device) for t in (q, k, v, pages))
    table = order.reshape(3, 10).to(kernels.device, torch.int32)
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=kernels.device)
    device = replace(backends.device_of(q.device), tiles=tiles)
    with backends.force(device):
        rows = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
        paged = flash_attn_with_kvcache(q, *pages, cache_seqlens=lengths, page_table=table, causal=True)
    assert torch.equal(rows, paged)
    for i, n in enumerate(LENGTHS):
        seen = reference.visible(queries, n, -1, 0, True)[None]
        want, _ = reference.attend(
            q[i].double().cpu(), k[i, :n].double().cpu(), v[i, :n].double().cpu(), D**-0.5, seen
        )
        torch.testing.assert_close(rows[i].double().cpu(), want, atol=2e-3, rtol=2e-3)
