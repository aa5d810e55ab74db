"""What the public functions make of their arguments: what reaches the operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import headfold
from headfold.problem import Inputs
from tests.interface.bad import BASES, OUT_SHAPES, PAGED, PAGES_K, PAGES_V, TABLE, K, Q, V
from tests.interface.functions import ATTENTION, FUNCTIONS
from tests.interface.tensors import ints
from tests.interface.varlen_errors import VARLEN


@pytest.mark.parametrize("with_out", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_options_reach_the_operator(name: str, with_out: bool, seen: list[Inputs]) -> None:
    out = {"out": torch.empty(OUT_SHAPES[name])} if with_out else {}
    FUNCTIONS[name](
        **BASES[name], softmax_scale=3, window_size=(7, 2), num_splits=5, pack_gqa=False, sm_margin=9, **out
    )
    FUNCTIONS[name](**BASES[name], causal=True, pack_gqa=True, **out)
    FUNCTIONS[name](**BASES[name], **out)
    first, causal, plain = seen
    assert (first.softmax_scale, first.window_left, first.window_right) == (3.0, 7, 2)
    assert (first.num_splits, first.pack_gqa, first.sm_margin) == (5, False, 9)
    assert (causal.window_left, causal.window_right, causal.pack_gqa) == (-1, 0, True)
    assert (plain.softmax_scale, plain.window_left, plain.window_right) == (None, -1, -1)
    assert (plain.num_splits, plain.pack_gqa, plain.sm_margin) == (0, None, 0)
    assert all(x.bottom_right and x.caller == name for x in seen)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((3, 2), (3, 2)),
        ([3, 2], (3, 2)),
        (torch.tensor([3, 2]), (3, 2)),
        (torch.tensor([[3], [2]], dtype=torch.int8), (3, 2)),
        ((None, 2), (-1, 2)),
        ((3, None), (3, -1)),
        ((None, None), (-1, -1)),
        (torch.tensor([-1, 4]), (-1, 4)),
        ((2**62, 2**31), (2**62, 2**31)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ATTENTION)
def test_window_size_in_every_form(
    name: str, window: Any, expected: tuple[int, int], seen: list[Inputs]
) -> None:
    FUNCTIONS[name](**BASES[name], window_size=window)
    FUNCTIONS[name](**BASES[name], window_size=window, causal=True)
    assert [(x.window_left, x.window_right) for x in seen] == [expected, (expected[0], 0)]


def test_varlen_hands_on_every_tensor_and_bound(seen: list[Inputs]) -> None:
    used_q, used_k, lengths = ints(2, 3), ints(5, 4), ints(0, 5, 9)
    paged = {**VARLEN, "k": PAGES_K, "v": PAGES_V, "cu_seqlens_k": lengths, "max_seqlen_k": None}
    headfold.flash_attn_varlen_func(**VARLEN, seqused_q=used_q, seqused_k=used_k)
    headfold.flash_attn_varlen_func(**paged, page_table=TABLE)
    first, second = seen
    for name, value in VARLEN.items():
        assert getattr(first, name) is value
    assert first.seqused_q is used_q
    assert first.seqused_k is used_k
    assert first.page_table is None
    assert second.page_table is TABLE
    assert second.cu_seqlens_k is lengths
    assert second.max_seqlen_k is None


def test_kvcache_hands_on_every_tensor_and_bound(seen: list[Inputs]) -> None:
    q, offsets, lengths = Q.flatten(0, 1), ints(0, 3, 6), ints(5, 4)
    headfold.flash_attn_with_kvcache(q, **PAGED, cache_seqlens=lengths, cu_seqlens_q=offsets, max_seqlen_q=4)
    (x,) = seen
    assert x.q is q
    assert x.k is PAGES_K
    assert x.v is PAGES_V
    assert x.page_table is TABLE
    assert x.seqused_k is lengths
    assert x.cu_seqlens_q is offsets
    assert x.max_seqlen_q == 4
    assert x.seqused_q is None
    assert x.cu_seqlens_k is None


def test_an_int_length_is_a_view_of_a_dense_cache_and_a_tensor_for_pages(seen: list[Inputs]) -> None:
    headfold.flash_attn_with_kvcache(Q, K, V, cache_seqlens=2)
    headfold.flash_attn_with_kvcache(Q, **PAGED, cache_seqlens=6)
    dense, paged = seen
    assert dense.seqused_k is None
    assert (dense.k.data_ptr(), dense.k.shape[1], dense.k.stride()) == (K.data_ptr(), 2, K.stride())
    assert (dense.v.data_ptr(), dense.v.shape[1], dense.v.stride()) == (V.data_ptr(), 2, V.stride())
    assert paged.seqused_k is not None
    assert torch.equal(paged.seqused_k, ints(6, 6))
