"""Mixed batches through the kernels: every row is written by one of both launches, and is right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headfold import backends
from headfold.backends import mixed as launch
from headfold.problem import Inputs
from tests.cases import assert_accurate, make, poisoned
from tests.conftest import Target

pytestmark = pytest.mark.usefixtures("small_mixed_batches")


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    # Few multiprocessors: a large device would rather split the keys of so few tiles.
    with backends.force(replace(backends.device_of(x.q.device), sms=12)):
        return _run(x)


def _run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    _, plan = backends.plan_of(x)
    assert plan.short is not None
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    assert_accurate(x, out, lse)
    return out, lse


# Lengths at the border of short (4 queries of 4 heads), one beyond it, and none.
LENGTHS = {
    "decodes and a prompt": ([1, 34, 1, 1], [40, 50, 9, 33], "paged"),
    "borders": ([4, 5, 0, 30], [10, 5, 20, 40], "ragged"),
}


def call(name: str, kernels: Target) -> Inputs:
    q_lens, k_lens, layout = LENGTHS[name]
    x = make(q_lens, k_lens, heads=4, kv_heads=1, d=64, dtype=kernels.dtypes[1], q_layout="ragged",
             kv_layout=layout, causal=True, slack=0, page_size=16, device=kernels.device)  # fmt: skip
    x.max_seqlen_q = 40  # a bound, as a serving engine gives it
    return x


@pytest.mark.parametrize("name", LENGTHS)
def test_every_sequence_is_right(kernels: Target, name: str) -> None:
    x = call(name, kernels)
    expected, lse = run(x)
    if name == "borders":  # and where nobody asks for the LSE
        out = torch.full_like(expected, float("nan"))
        with backends.force(replace(backends.device_of(x.q.device), sms=12)):
            backends.prepare(x, out, lse)(replace(x), out, None)
        assert torch.equal(out, expected)


@pytest.mark.parametrize("used", [False, True])
def test_more_sequences_than_one_program_parts(kernels: Target, used: bool) -> None:
    lengths = torch.randint(0, 9, (300,), dtype=torch.int32)
    offsets = torch.zeros(301, dtype=torch.int32)
    offsets[1:] = (lengths + 3 * used).cumsum(0)
    q = torch.empty(int(offsets[-1]), 4, 16, device=kernels.device)
    k = torch.empty(300, 1, 1, 16, device=kernels.device)
    rows = lengths.to(kernels.device)
    x = Inputs(q, k, k, cu_seqlens_q=offsets.to(kernels.device), seqused_q=rows if used else None)
    parts: list[torch.Tensor] = []

    def record(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        assert x.seqused_q is not None
        parts.append(x.seqused_q.cpu())

    launch.prepare(4, record, record, x)(x, q, None)
    assert torch.equal(parts[0], lengths.where(lengths <= 4, 0))
    assert torch.equal(parts[1], lengths.where(lengths > 4, 0))


def test_features_go_both_ways(kernels: Target) -> None:
    x = make([1, 33, 3, 1], [40, 45, 3, 30], heads=6, kv_heads=2, d=64,
             dtype=kernels.dtypes[1], q_layout="ragged", kv_layout="paged", window=(20, 0), slack=3, page_size=8,
             device=kernels.device)  # fmt: skip
    assert x.seqused_q is not None
    x.sink = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, 3.0], device=kernels.device)
    x.max_seqlen_q = 60
    run(x)
