"""Shared prefixes in one launch on a Hopper GPU: accurate, the same bits every time, and under changing lengths of a graph."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import headfold
from headfold import shared_prefix
from tests.cases import NAN, assert_accurate
from tests.interface.tensors import bits
from tests.sharing import SharedCall, shared_call

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]

RUNS = 100


@pytest.fixture(autouse=True)
def sharing() -> Iterator[None]:
    """Whether it pays or not, and with nothing kept from other tests."""
    shared_prefix._kept.clear()
    with shared_prefix.force(True):
        yield
    shared_prefix._kept.clear()


def attend(call: SharedCall) -> tuple[torch.Tensor, torch.Tensor]:
    """Into a result full of NaN, through the kernel that runs both parts."""
    out = torch.full((*call.tensors["q"].shape[:-1], call.tensors["v_cache"].shape[-1]), NAN)
    result = call.run(**call.promise, out=out.to(call.tensors["q"]))
    assert any(way is not None and way.pair is not None for way in shared_prefix._kept.values())
    return result


def drawn(seed: int) -> SharedCall:
    r = random.Random(seed)
    page_size = r.choice((8, 16, 32, 64, 256))
    groups = [(r.randint(1, 24), r.randint(0, 4000) // page_size) for _ in range(r.randint(1, 3))]
    kv_heads = r.choice((1, 2, 8))
    ragged_q = r.random() < 0.3
    most = r.choice((1, 1, 2, 5))
    batch = sum(n for n, _ in groups)
    q_lens = [r.randint(0, most) for _ in range(batch)] if ragged_q else [most] * batch
    longest = r.choice((20, 300, 3000))
    own = [n + r.randint(1, longest) for n in q_lens]
    d, dv = r.choice(((64, 64), (128, 128), (128, 128), (256, 256), (96, 96), (128, 64)))
    options: dict[str, Any] = {
        "page_size": page_size,
        "heads": kv_heads * r.choice((1, 4, 5)),
        "kv_heads": kv_heads,
        "d": d,
        "dv": dv,
        "dtype": r.choice((torch.bfloat16, torch.float16)),
        "ragged_q": ragged_q,
        "causal": r.random() < 0.8,
        "append": not ragged_q and r.random() < 0.3,
        "seed": seed,
    }
    return shared_call(groups, q_lens, own, device="cuda", **options)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_calls(seed: int) -> None:
    call = drawn(seed)
    caches = call.caches()
    out = torch.full((*call.tensors["q"].shape[:-1], call.tensors["v_cache"].shape[-1]), NAN)
    out, lse = call.run(**caches, **call.promise, out=out.to(call.tensors["q"]))
    assert_accurate(call.inputs(**caches), out, lse)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_same_bits_every_time(d: int) -> None:
    own = [3, 700, 512, 1, 64, 65, 128, 300] * 4
    call = shared_call(
        [(32, 64)],
        [1] * 32,
        own,
        page_size=16,
        heads=32,
        kv_heads=8,
        d=d,
        dv=d,
        dtype=torch.bfloat16,
        device="cuda",
    )
    first = attend(call)
    assert_accurate(call.inputs(), *first)
    for _ in range(RUNS):
        again = attend(call)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip(again, first, strict=True))


def test_a_graph_whose_lengths_change() -> None:
    """Which list gets how many programs is decided anew in every replay."""
    batch, shared, room, page = 24, 2048, 1024, 16
    torch.manual_seed(0)
    pages = (shared + batch * room) // page
    order = torch.randperm(pages, device="cuda", dtype=torch.int32)
    table = torch.cat([order[: shared // page].expand(batch, -1), order[shared // page :].view(batch, -1)], 1)
    table = table.contiguous()
    k, v = (torch.randn(pages, page, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch, 1, 32, 128, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), shared + room, device="cuda", dtype=torch.int32)

    def step(**more: Any) -> Any:
        return headfold.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, page_table=table, causal=True, return_softmax_lse=True, **more
        )

    step(shared_prefix_len=shared)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = step(shared_prefix_len=shared)
    for most in (1, 30, room, 200, 2, room):
        lengths.copy_(shared + torch.randint(1, most + 1, (batch,), device="cuda"))
        out.fill_(NAN)
        graph.replay()
        with shared_prefix.force(False):
            want, want_lse = step()
        assert (out.float() - want.float()).abs().max() < 4e-3
        assert (lse - want_lse).abs().max() < 1e-4
