"""How a decode is shared out: streams of ragged batches, forced and fixed splits, and what merges their states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from headfold import backends
from headfold.problem import Inputs, check
from tests.cases import assert_accurate, make, poisoned
from tests.conftest import Target

# Zeros, one key, equal and huge ratios, more sequences than ranges.
LENGTHS = {
    "ragged": (300, 0, 1, 700, 64),
    "huge ratio": (1, 2000, 3),
    "equal": (130, 130, 130),
    "many": (5, 0, 40, 33, 1, 64, 65, 2, 90, 17, 0, 3, 128, 7),
    "nothing": (0, 0),
}


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `x` into poisoned outputs, checked by the accuracy rule."""
    check(x)
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    assert_accurate(x, out, lse)
    return out, lse


def drawn(lengths: tuple[int, ...], target: Target, queries: int = 1, **more: Any) -> Inputs:
    """A decode of 6:2 heads at those lengths, which lie on the device."""
    values = {"heads": 6, "kv_heads": 2, "d": 32, "device": target.device, "dtype": target.dtypes[0]}
    return make([queries] * len(lengths), list(lengths), **{**values, **more})


@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("name", LENGTHS)
def test_streams_of_every_kind_of_lengths(name: str, kv_layout: str, kernels: Target) -> None:
    """Two queries, of which each sees what it should, in lists that are cut anywhere."""
    x = drawn(LENGTHS[name], kernels, 2, kv_layout=kv_layout, causal=True)
    assert backends.plan_of(x)[1].ranges > 0
    run(x)


@pytest.mark.parametrize("change", [{"window": (40, 0)}, {"d": 80, "dv": 40}, {"heads": 2}, {"heads": 40}])
def test_streams_under_windows_and_odd_heads(change: dict[str, Any], kernels: Target) -> None:
    """A window leaves few blocks of a long sequence: those are what is shared out."""
    x = drawn(LENGTHS["ragged"], kernels, 3, **{"kv_layout": "paged", **change})
    assert backends.plan_of(x)[1].ranges > 0
    run(x)


@pytest.mark.parametrize("kv_layout", ["ragged", "paged"])
def test_a_sink_counts_once_however_many_programs_share_a_row(kv_layout: str, kernels: Target) -> None:
    """Also for a sequence without a key, where it is all there is."""
    x = drawn(LENGTHS["ragged"], kernels, kv_layout=kv_layout)
    x = replace(x, sink=torch.randn(6, generator=torch.Generator().manual_seed(0)).to(kernels.device))
    assert backends.plan_of(x)[1].ranges > 0
    run(x)
    run(replace(x, num_splits=3))


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
def test_every_number_of_splits(kv_layout: str, kernels: Target) -> None:
    """1 to 16, forced, more than there are blocks among them."""
    x = drawn((0, 1, 200), kernels, kv_layout=kv_layout)
    for n in range(1, 17):
        forced = replace(x, num_splits=n)
        assert backends.plan_of(forced)[1].num_splits == n
        run(forced)


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
@pytest.mark.parametrize("size", [64, 100])
def test_fixed_splits_give_a_sequence_its_bits_in_any_batch(
    kv_layout: str, size: int, kernels: Target
) -> None:
    """Alone, beside longer ones and where every range starts elsewhere: the same blocks, merged in the same order."""
    more = {"kv_layout": kv_layout, "slack": 0}
    whole = drawn((300, 40, 0, 700, 129), kernels, **more)
    out, lse = run(replace(whole, tokens_per_split=size))
    for i, n in enumerate((300, 40, 0, 700, 129)):
        if not n:
            continue
        alone = replace(
            whole,
            q=whole.q[i : i + 1],
            seqused_k=whole.seqused_k[i : i + 1],  # type: ignore[index]
            tokens_per_split=size,
        )
        if kv_layout == "paged":
            alone.page_table = whole.page_table[i : i + 1]  # type: ignore[index]
        else:
            alone.k, alone.v = whole.k[i : i + 1], whole.v[i : i + 1]
        same, same_lse = run(alone)
        assert torch.equal(same[0], out[i])
        assert torch.equal(same_lse[0], lse[i])


def test_the_bits_of_a_stream_repeat(kernels: Target) -> None:
    """Nothing depends on which program ends first."""
    x = drawn(LENGTHS["ragged"], kernels, kv_layout="paged")
    first = run(x)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(x), strict=True))
