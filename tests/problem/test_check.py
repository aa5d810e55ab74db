"""What check() and check_out() refuse, and how they say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from headfold.problem import (
    MAX_SEQLEN,
    Inputs,
    check,
    check_out,
)
from tests.cases import NAN, make
from tests.problem.calls import (
    LAYOUTS,
    NO_LAST_STRIDE,
    Change,
    cast,
    check_all,
    dense,
    featured,
    ints,
    on_meta,
    paged,
    swapped,
    value,
)
from tests.problem.option_errors import ERRORS


@pytest.mark.parametrize(
    ("base", "change", "kind", "message"),
    [case for cases in ERRORS.values() for case in cases],
    ids=[f"{name}-{i}" for name, cases in ERRORS.items() for i in range(len(cases))],
)
def test_check_says_what_came_and_what_is_needed(
    base: Callable[[], Inputs], change: Change, kind: type[Exception], message: str
) -> None:
    x = base()
    check_all(x)
    with pytest.raises(kind) as error:
        check_all(dataclasses.replace(x, **change(x)))
    assert type(error.value) is kind
    assert str(error.value) == f"attention: {message}"


def test_every_input_has_an_error_test() -> None:
    """Flags and the caller's name come from headfold itself or are typed by the operator's schema."""
    untested = {f.name for f in dataclasses.fields(Inputs)} - set(ERRORS)
    assert untested == {"bottom_right", "pack_gqa", "rotary_interleaved", "rotary_advances", "caller"}


@pytest.mark.parametrize(("q_layout", "kv_layout"), LAYOUTS)
@pytest.mark.parametrize("lens", [([3, 3], [5, 5]), ([0, 4], [7, 0]), ([], [])], ids=str)
def test_valid_inputs_pass(q_layout: str, kv_layout: str, lens: tuple[list[int], list[int]]) -> None:
    check_all(make(*lens, q_layout=q_layout, kv_layout=kv_layout, causal=True))


def test_valid_features_pass_in_their_other_forms() -> None:
    x = featured()
    half = {"q": x.q.half(), "k": x.k.half(), "v": x.v.half()}
    for change in (
        {"sink": x.sink.half(), "alibi_slopes": x.alibi_slopes[0]},
        {"mask": torch.ones(1, dtype=torch.bool).expand(2, 4, 3, 5)},
        {"tree_mask": torch.ones(2, 8, 8, dtype=torch.bool)},
        {"rotary_cos": torch.ones(9, 20)[:, 1:9], "rotary_sin": torch.ones(9, 20)[:, 8:16]},
        {**half, "rotary_cos": x.rotary_cos.half(), "rotary_sin": x.rotary_sin.half()},
        half,
        {"cache_batch_idx": ints(6, 6), "k": x.k[:1].expand(7, 5, 2, 16), "v": x.v[:1].expand(7, 5, 2, 16)},
    ):
        check_all(dataclasses.replace(x, **change))


def test_a_page_table_may_not_address_more_keys_than_positions_hold() -> None:
    x = on_meta(paged())
    x.page_table = torch.empty(2, 2**28 + 1, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=f"page_table allows {2**30 + 4} keys; .* at most {MAX_SEQLEN}"):
        check(x)


def test_a_last_dimension_of_one_element_may_have_any_stride() -> None:
    x = make([2], [3], d=1, slack=0)
    check(dataclasses.replace(x, q=x.q.as_strided(x.q.shape, (8, 4, 1, 7))))


def test_inputs_that_require_a_gradient_pass_without_grad_mode() -> None:
    x = dense()
    x.q = x.q.requires_grad_()
    with torch.no_grad():
        check(x)


@pytest.mark.parametrize(
    ("caller", "change", "message"),
    [
        ("flash_attn_with_kvcache", swapped("k"), "flash_attn_with_kvcache: k_cache has last stride"),
        ("flash_attn_with_kvcache", swapped("v"), "flash_attn_with_kvcache: v_cache has last stride"),
        (
            "flash_attn_with_kvcache",
            value(seqused_k=ints(1)),
            "flash_attn_with_kvcache: cache_seqlens has shape",
        ),
        (
            "flash_attn_with_kvcache",
            lambda x: {"v": x.v[:, :2]},
            r"flash_attn_with_kvcache: v_cache has shape .* must equal k_cache's \(2, 5",
        ),
        ("scaled_dot_product_attention", swapped("q"), "scaled_dot_product_attention: query has last stride"),
        ("scaled_dot_product_attention", swapped("k"), "scaled_dot_product_attention: key has last stride"),
        ("scaled_dot_product_attention", swapped("v"), "scaled_dot_product_attention: value has last stride"),
        (
            "scaled_dot_product_attention",
            value(softmax_scale=NAN),
            "scaled_dot_product_attention: scale is nan",
        ),
        ("flash_attn_func", swapped("k"), "flash_attn_func: k has last stride"),
        (
            "flash_attn_with_kvcache",
            cast("rotary_positions", torch.int64),
            "flash_attn_with_kvcache: rotary_seqlens has dtype",
        ),
        (
            "scaled_dot_product_attention",
            cast("mask", torch.float64),
            "scaled_dot_product_attention: attn_mask has dtype",
        ),
    ],
)
def test_messages_use_the_callers_own_names(caller: str, change: Change, message: str) -> None:
    x = featured()
    with pytest.raises(ValueError, match=message):
        check_all(dataclasses.replace(x, **change(x), caller=caller))


@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        (None, TypeError, "attention: out is a NoneType; it must be a torch.Tensor"),
        (
            torch.empty(2, 3, 4, 8),
            ValueError,
            "attention: out has shape (2, 3, 4, 8); it must be (2, 3, 4, 16)",
        ),
        (
            torch.empty(2, 3, 4, 16, dtype=torch.float16),
            ValueError,
            "attention: out has dtype torch.float16; it must be torch.float32",
        ),
        (
            torch.empty(2, 3, 4, 16, device="meta"),
            ValueError,
            "attention: out is on meta; it must be on the queries' device cpu",
        ),
        (
            torch.empty(2, 3, 16, 4).transpose(-1, -2),
            ValueError,
            f"attention: out has last stride 4; {NO_LAST_STRIDE}",
        ),
        (
            torch.empty(1, 3, 4, 16).expand(2, 3, 4, 16),
            ValueError,
            "attention: out is expanded (a stride is 0); every element needs its own place",
        ),
    ],
)
def test_check_out_refuses(bad: Any, kind: type[Exception], message: str) -> None:
    x = dense()
    with pytest.raises(kind) as error:
        check_out(x, "out", bad, x.out_shape, x.q.dtype)
    assert str(error.value) == message


def test_check_out_takes_any_strides_that_do_not_overlap() -> None:
    x = dense()
    check_out(x, "out", torch.empty(4, 3, 2, 20).transpose(0, 2)[..., 2:18], x.out_shape, x.q.dtype)
    one = dataclasses.replace(x, q=x.q[:1], k=x.k[:1], v=x.v[:1])
    check_out(one, "out", torch.empty(3, 4, 16).expand(1, 3, 4, 16), one.out_shape, one.q.dtype)
