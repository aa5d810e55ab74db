"""Mixed batches on a Hopper GPU, whose decodes run while the prefill runs: both are right, and the call ends after both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headfold import backends
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate, make, poisoned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
    pytest.mark.usefixtures("small_mixed_batches"),
]

QUERIES = [1, 300, 1, 1, 0, 520, 1, 2, 1, 1, 1, 1]
KEYS = [4000, 2000, 7, 900, 30, 1500, 1, 2500, 64, 3000, 0, 128]


def call(layout: str, page_size: int, d: int) -> Inputs:
    x = make(QUERIES, KEYS, heads=32, kv_heads=8, d=d, dtype=torch.bfloat16, q_layout="ragged", kv_layout=layout,
             causal=True, slack=0, page_size=page_size, device="cuda")  # fmt: skip
    x.max_seqlen_q = 4096  # a bound, as a serving engine gives it
    return x


@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(("layout", "page_size"), [("ragged", 1), ("paged", 1), ("paged", 16), ("paged", 64)])
def test_both_parts_are_right_and_over_when_the_next_kernel_starts(
    layout: str, page_size: int, d: int
) -> None:
    x = call(layout, page_size, d)
    out, lse = poisoned(x)
    _, plan = backends.plan_of(x, out)
    assert plan.beside
    run = backends.prepare(x, out, lse)
    run(x, out, lse)
    assert_accurate(x, out, lse)
    want = out.clone()
    taken = []
    for _ in range(50):
        out.fill_(NAN)
        run(x, out, lse)
        taken.append(out.clone())  # at once: a part that is not over yet would be missing
    torch.cuda.synchronize()
    assert all(torch.equal(one.nan_to_num(7.0), want.nan_to_num(7.0)) for one in taken)


def test_replays_whose_lengths_change() -> None:
    """The same graph for lists of lengths that are short and long in turn, each beside the call of its own."""
    x = call("paged", 16, 128)
    assert x.seqused_k is not None
    out, lse = poisoned(x)
    run = backends.prepare(x, out, lse)
    keys = x.seqused_k.clone()
    run(x, out, lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(x, out, lse)
    for seed in range(20):
        torch.manual_seed(seed)
        x.seqused_k.copy_((keys * torch.rand(keys.shape, device="cuda")).int())
        out.fill_(NAN)
        graph.replay()
        got = out.clone()
        assert_accurate(replace(x, seqused_k=x.seqused_k.clone()), got, lse)
