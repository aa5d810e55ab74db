"""Results of every function in every layout, whatever the options that change no meaning."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import headfold
from tests.cases import NAN, assert_accurate, make
from tests.conftest import Target
from tests.interface.functions import Run, call, func, kvcache


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sq", [1, 5])
def test_flash_attn_func(target: Target, sq: int, causal: bool) -> None:
    for dtype in target.dtypes:
        x = make([sq, sq], [19, 19], heads=6, dv=8, dtype=dtype, causal=causal, slack=0, device=target.device)
        out, lse = headfold.flash_attn_func(x.q, x.k, x.v, causal=causal, return_lse=True)
        assert (out.dtype, lse.dtype, out.shape, lse.shape) == (
            dtype,
            torch.float32,
            x.out_shape,
            x.lse_shape,
        )
        assert_accurate(x, out, lse)


@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("q_layout", ["dense", "ragged"])
@pytest.mark.parametrize("lens", [([1, 1], [19, 3]), ([5, 2], [4, 23]), ([0, 3], [7, 0])], ids=str)
def test_flash_attn_varlen_func_in_every_layout(
    target: Target, lens: tuple[list[int], list[int]], q_layout: str, kv_layout: str
) -> None:
    x = make(
        *lens, heads=6, q_layout=q_layout, kv_layout=kv_layout, page_size=5, causal=True, device=target.device
    )
    assert_accurate(x, *call(x))


def test_max_seqlens_are_only_bounds(target: Target) -> None:
    x = make([2, 5], [9, 17], q_layout="ragged", kv_layout="ragged", causal=True, device=target.device)
    expected = call(x)
    for bounds in (
        {"max_seqlen_q": None, "max_seqlen_k": None},
        {"max_seqlen_q": 999, "max_seqlen_k": 10**6},
    ):
        y = dataclasses.replace(x, **bounds)
        assert_accurate(y, *call(y))
    assert_accurate(x, *expected)


def test_lengths_of_a_paged_cache_may_come_as_cu_seqlens_k(target: Target) -> None:
    x = make(
        [1, 2], [9, 17], q_layout="ragged", kv_layout="paged", page_size=4, slack=0, device=target.device
    )
    lengths = torch.tensor([0, 9, 26], dtype=torch.int32, device=target.device)
    y = dataclasses.replace(x, seqused_k=None, cu_seqlens_k=lengths)
    assert_accurate(x, *call(y))


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
@pytest.mark.parametrize("q_layout", ["dense", "ragged"])
@pytest.mark.parametrize("sq", [1, 4])
def test_flash_attn_with_kvcache_with_a_tensor_of_lengths(
    target: Target, sq: int, q_layout: str, kv_layout: str
) -> None:
    x = make(
        [sq, sq],
        [17, 6],
        heads=6,
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=3,
        causal=True,
        slack=0 if q_layout == "ragged" else 2,
        device=target.device,
    )
    assert_accurate(x, *kvcache(x, causal=True))


@pytest.mark.parametrize("kv_layout", ["dense", "paged"])
@pytest.mark.parametrize("q_layout", ["dense", "ragged"])
@pytest.mark.parametrize("length", [0, 1, 10])
def test_flash_attn_with_kvcache_with_one_length_for_all(
    target: Target, length: int, q_layout: str, kv_layout: str
) -> None:
    x = make(
        [2, 2],
        [length, length],
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=4,
        causal=True,
        slack=3 if q_layout == "dense" else 0,
        device=target.device,
    )
    assert_accurate(x, *kvcache(x, causal=True, cache_seqlens=length))


def test_flash_attn_with_kvcache_with_queries_of_several_lengths(target: Target) -> None:
    x = make(
        [1, 5, 0],
        [8, 20, 4],
        q_layout="ragged",
        kv_layout="paged",
        causal=True,
        slack=0,
        device=target.device,
    )
    assert_accurate(x, *kvcache(x, causal=True))
    assert_accurate(x, *kvcache(x, causal=True, max_seqlen_q=None))


def test_a_cache_without_lengths_is_full(target: Target) -> None:
    x = make([1, 1], [9, 9], slack=0, device=target.device)
    assert x.seqused_k is None
    assert_accurate(x, *kvcache(x))


@pytest.mark.parametrize("window", [(3, 2), (3, -1), (-1, 2), (0, 0), (2**62, 2**31)], ids=str)
def test_window_size(target: Target, window: tuple[int, int]) -> None:
    x = make([4, 4], [9, 9], slack=0, window=window, device=target.device)
    assert_accurate(x, *func(x, window_size=window))


def test_causal_closes_the_right_side_of_a_window(target: Target) -> None:
    x = make([4, 4], [9, 9], slack=0, window=(3, 0), device=target.device)
    assert_accurate(x, *func(x, causal=True, window_size=(3, 5)))


@pytest.mark.parametrize("pack_gqa", [None, True, False])
@pytest.mark.parametrize("num_splits", [0, 1, 3])
@pytest.mark.parametrize("sq", [1, 5])
def test_pack_gqa_and_num_splits_keep_the_meaning(
    target: Target, sq: int, num_splits: int, pack_gqa: bool | None
) -> None:
    x = make([sq], [60], heads=3, kv_heads=1, causal=True, slack=0, device=target.device)
    assert_accurate(x, *func(x, causal=True, num_splits=num_splits, pack_gqa=pack_gqa))


@pytest.mark.parametrize("scale", [0.0, 0, 0.7, 2, -0.3])
def test_softmax_scale(target: Target, scale: float) -> None:
    x = make([3, 3], [9, 9], slack=0, scale=scale, device=target.device)
    assert_accurate(x, *func(x, softmax_scale=scale))


def test_softmax_scale_of_zero_is_the_mean_of_the_values(target: Target) -> None:
    x = make([1], [8], slack=0, device=target.device)
    out = headfold.flash_attn_func(x.q, x.k, x.v, softmax_scale=0.0)
    mean = x.v.mean(1, keepdim=True).repeat_interleave(2, dim=2)
    torch.testing.assert_close(out, mean)


@pytest.mark.parametrize("sm_margin", [1, 10**6])
def test_sm_margin_keeps_the_meaning(target: Target, sm_margin: int) -> None:
    x = make([1, 1], [60, 60], slack=0, device=target.device)
    assert_accurate(x, *func(x, sm_margin=sm_margin))


def test_arguments_at_their_neutral_values_change_nothing(target: Target) -> None:
    x = make([2, 2], [9, 9], slack=0, device=target.device)
    plain = headfold.flash_attn_func(x.q, x.k, x.v)
    neutral = headfold.flash_attn_func(x.q, x.k, x.v, attention_chunk=0, softcap=0, deterministic=True)
    assert torch.equal(plain, neutral)


def test_the_lse_comes_only_when_asked_for(target: Target) -> None:
    x = make([2, 2], [9, 9], slack=0, device=target.device)
    plain = headfold.flash_attn_func(x.q, x.k, x.v)
    assert isinstance(plain, torch.Tensor)
    for name in ("return_lse", "return_attn_probs"):
        for out, lse in (
            headfold.flash_attn_func(x.q, x.k, x.v, **{name: True}),
            headfold.flash_attn_varlen_func(x.q, x.k, x.v, None, None, None, None, **{name: True}),
        ):
            assert torch.equal(out, plain)
            assert_accurate(x, out, lse)
    varlen = headfold.flash_attn_varlen_func(x.q, x.k, x.v, None, None, None, None)
    cached = headfold.flash_attn_with_kvcache(x.q, x.k, x.v)
    assert torch.equal(varlen, plain)
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    ("run", "q_layout"),
    [(func, "dense"), (call, "ragged"), (kvcache, "ragged")],
    ids=["func", "varlen", "kvcache"],
)
def test_out_is_written_in_place_whatever_its_strides(
    target: Target, run: Run, q_layout: str, num_splits: int
) -> None:
    x = make([2], [60], kv_heads=1, dv=8, q_layout=q_layout, slack=0, device=target.device)
    padded = torch.full((*x.out_shape[:-1], 8 + 5), NAN, device=target.device)
    inside = padded[..., 2:10]
    heads_first = torch.full((x.out_shape[-2], *x.out_shape[:-2], 8), NAN, device=target.device).movedim(
        0, -2
    )
    for out in (inside, heads_first):
        got, lse = run(x, out=out, num_splits=num_splits)
        assert got is out
        assert_accurate(x, out, lse)
    assert padded[..., :2].isnan().all()
    assert padded[..., 10:].isnan().all()


def test_out_alone_is_returned_without_the_lse(target: Target) -> None:
    x = make([2, 2], [9, 9], slack=0, device=target.device)
    out = torch.full(x.out_shape, NAN, device=target.device)
    assert headfold.flash_attn_func(x.q, x.k, x.v, out=out) is out
    assert torch.equal(out, headfold.flash_attn_func(x.q, x.k, x.v))


def test_out_is_written_when_there_is_nothing_to_attend_to(target: Target) -> None:
    x = make([2, 2], [0, 0], slack=0, device=target.device)
    out = torch.full(x.out_shape, NAN, device=target.device)
    _, lse = headfold.flash_attn_func(x.q, x.k, x.v, out=out, return_lse=True)
    assert_accurate(x, out, lse)


@pytest.mark.parametrize("lens", [([], []), ([0, 0], [4, 4])], ids=str)
@pytest.mark.parametrize("q_layout", ["dense", "ragged"])
def test_an_empty_call_is_an_empty_result(
    target: Target, q_layout: str, lens: tuple[list[int], list[int]]
) -> None:
    x = make(*lens, q_layout=q_layout, slack=0, device=target.device)
    out, lse = call(x)
    assert (out.shape, lse.shape) == (x.out_shape, x.lse_shape)


def test_inputs_may_have_any_strides_and_alignment(target: Target) -> None:
    """Odd row lengths, a base pointer off by one element, heads first, and a stride-0 cache."""
    x = make([2, 2], [11, 11], slack=0, device=target.device)

    def odd(t: torch.Tensor) -> torch.Tensor:
        wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), NAN, device=t.device)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    def heads_first(t: torch.Tensor) -> torch.Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    for view in (odd, heads_first):
        y = dataclasses.replace(x, q=view(x.q), k=view(x.k), v=view(x.v))
        assert_accurate(y, *func(y))
    y = dataclasses.replace(x, k=x.k[:1].expand_as(x.k), v=x.v[:1].expand_as(x.v))
    assert_accurate(y, *func(y))
    y = dataclasses.replace(x, k=x.k[:, :, :1].expand_as(x.k), v=x.v[:, :1].expand_as(x.v))
    assert_accurate(y, *func(y))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_with_grad_mode_and_results_come_without(target: Target, name: str) -> None:
    x = make([2, 2], [9, 9], slack=0, device=target.device)
    y = dataclasses.replace(x, **{name: getattr(x, name).clone().requires_grad_()})
    for run in (func, call, kvcache):
        with pytest.raises(NotImplementedError, match="requires a gradient"):
            run(y)
        with torch.no_grad():
            out, lse = run(y)
        assert not out.requires_grad
        assert_accurate(x, out, lse)


def test_same_inputs_give_the_same_bits(target: Target) -> None:
    x = make([2], [60], kv_heads=1, slack=0, device=target.device)
    (out, lse), (again, lse_again) = func(x, num_splits=3), func(x, num_splits=3)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
