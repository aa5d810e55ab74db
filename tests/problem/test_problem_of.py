"""What problem_of keeps of a call."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from headfold import reference
from headfold.problem import (
    Inputs,
    check,
    is_aligned,
    problem_of,
)
from tests.cases import make
from tests.problem.calls import (
    LAYOUTS,
    drawn_calls,
    ints,
    on_meta,
    paged,
    ragged,
)


@pytest.mark.parametrize(("q_layout", "kv_layout"), LAYOUTS)
def test_nothing_is_read_from_the_device(q_layout: str, kv_layout: str) -> None:
    """Meta tensors have no values: whoever read one would raise."""
    x = make([3, 1], [5, 9], q_layout=q_layout, kv_layout=kv_layout, causal=True, dv=8)
    check(on_meta(x))
    expected = problem_of(x)
    assert problem_of(on_meta(x)) == dataclasses.replace(expected, device_type="meta")


def test_a_dense_problem_has_the_tensors_sizes() -> None:
    x = make([3, 3], [5, 5], heads=6, dv=8, slack=0, window=(4, 2), num_splits=7, pack_gqa=False)
    p = problem_of(dataclasses.replace(x, sm_margin=3))
    assert (p.q_layout, p.kv_layout, p.page_size) == ("dense", "dense", 0)
    assert (p.batch, p.num_heads, p.num_kv_heads, p.group) == (2, 6, 2, 3)
    assert (p.head_dim, p.head_dim_v, p.dtype, p.device_type) == (16, 8, torch.float32, "cpu")
    assert (p.max_seqlen_q, p.max_seqlen_k, p.total_q, p.total_k) == (3, 5, 6, 10)
    assert (p.window_left, p.window_right, p.bottom_right) == (4, 2, True)
    assert (p.num_splits, p.pack_gqa, p.sm_margin) == (7, False, 3)
    assert not p.lengths_on_device
    assert p.kv_bytes == 10 * 2 * (16 + 8) * 4


def test_a_dense_problem_with_seqused_keeps_the_capacity_as_its_bound() -> None:
    p = problem_of(make([3, 3], [1, 2], slack=4))
    assert (p.max_seqlen_k, p.total_k, p.lengths_on_device) == (6, 12, True)


def test_a_ragged_problem_is_bounded_by_max_seqlen_and_by_the_rows_there_are() -> None:
    x = ragged()  # 9 rows of q, 13 of k
    given_bounds = problem_of(dataclasses.replace(x, max_seqlen_q=6, max_seqlen_k=8))
    assert (given_bounds.max_seqlen_q, given_bounds.max_seqlen_k) == (6, 8)
    assert (given_bounds.total_q, given_bounds.total_k) == (9, 13)
    tight = problem_of(dataclasses.replace(x, max_seqlen_k=5))
    assert (tight.max_seqlen_k, tight.total_k) == (5, 10)
    unknown = problem_of(dataclasses.replace(x, max_seqlen_q=None, max_seqlen_k=None))
    assert (unknown.max_seqlen_q, unknown.max_seqlen_k, unknown.total_k) == (9, 13, 13)
    loose = problem_of(dataclasses.replace(x, max_seqlen_q=10**9, max_seqlen_k=10**9))
    assert (loose.max_seqlen_q, loose.max_seqlen_k) == (9, 13)
    assert problem_of(dataclasses.replace(x, seqused_k=None)).lengths_on_device
    assert (unknown.q_layout, unknown.kv_layout) == ("ragged", "ragged")


def test_a_paged_problem_is_bounded_by_its_table() -> None:
    x = paged()
    p = problem_of(x)
    assert (p.kv_layout, p.page_size, p.max_seqlen_k, p.total_k) == ("paged", 4, 12, 24)
    assert p.lengths_on_device
    assert problem_of(dataclasses.replace(x, max_seqlen_k=6)).max_seqlen_k == 6
    by_offsets = dataclasses.replace(x, seqused_k=None, cu_seqlens_k=ints(0, 5, 11))
    check(by_offsets)
    assert problem_of(by_offsets).kv_layout == "paged"
    assert problem_of(by_offsets).lengths_on_device


@settings(max_examples=60)
@given(drawn_calls())
def test_the_bounds_of_a_problem_hold(drawn: tuple[Inputs, list[tuple[int, int]]]) -> None:
    x, lens = drawn
    check(x)
    p = problem_of(x)
    used_q = [reference.queries_of(x, i).shape[0] for i in range(x.batch)]
    used_k = [reference.keys_of(x, i)[0].shape[0] for i in range(x.batch)]
    assert p.batch == len(lens)
    assert p.max_seqlen_q >= max(used_q, default=0)
    assert p.max_seqlen_k >= max(used_k, default=0)
    assert p.total_q >= sum(used_q)
    assert p.total_k >= sum(used_k)
    if sum(used_q) and sum(used_k):
        assert not p.is_empty


@pytest.mark.parametrize(
    ("lens", "empty"),
    [(([], []), True), (([0, 0], [3, 3]), True), (([3, 3], [0, 0]), True), (([1, 1], [1, 1]), False)],
    ids=str,
)
def test_a_problem_is_empty_without_queries_or_without_keys(
    lens: tuple[list[int], list[int]], empty: bool
) -> None:
    assert problem_of(make(*lens, slack=0)).is_empty is empty


def test_scale_and_shapes_of_inputs() -> None:
    x = make([3, 3], [5, 5], dv=8)
    assert x.scale == 16**-0.5
    assert dataclasses.replace(x, softmax_scale=0.0).scale == 0.0
    assert (x.out_shape, x.lse_shape) == ((2, 3, 4, 8), (2, 4, 3))
    r = make([3, 3], [5, 5], dv=8, q_layout="ragged", slack=0)
    assert (r.out_shape, r.lse_shape) == ((6, 4, 8), (4, 6))


def test_alignment_counts_the_pointer_and_every_stride() -> None:
    t = torch.empty(64 * 8, dtype=torch.float16)
    assert t.data_ptr() % 16 == 0
    assert is_aligned(t.view(4, 8, 16))
    assert not is_aligned(t[1:129].view(8, 16))
    assert is_aligned(t[8:136].view(8, 16))
    assert not is_aligned(t[:60].view(5, 12))
    assert is_aligned(t[:12].view(1, 12))
    assert is_aligned(t.view(4, 8, 16)[..., :3])


def test_odd_strides_of_either_cache_make_it_unaligned() -> None:
    x = make([1], [5], d=16, slack=0)
    odd = torch.zeros(1, 5, 2, 17)[..., :16]
    assert problem_of(x).aligned
    assert not problem_of(dataclasses.replace(x, k=odd)).aligned
    assert not problem_of(dataclasses.replace(x, v=odd)).aligned
