"""scaled_dot_product_attention against PyTorch's own."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

from headfold import scaled_dot_product_attention
from headfold.problem import Inputs
from headfold.sdpa import MaskError
from tests.conftest import CPU, Target
from tests.recording import run_instead

NAN = float("nan")


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(q, k, v, **options)


def assert_like_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """Torch's shape, and no more than twice the error of torch's math in the same precision."""
    got = scaled_dot_product_attention(q, k, v, **options)
    mask = options.pop("attn_mask", None)
    if isinstance(mask, CausalBias):
        mask = mask._materialize(q.device)
    wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
    ref = torchs(q.double(), k.double(), v.double(), attn_mask=wide, **options)
    plain = torchs(q, k, v, attn_mask=mask, **options)
    assert (got.shape, got.dtype, got.device) == (plain.shape, plain.dtype, plain.device)
    if got.numel() == 0:
        return
    error = (got.double() - ref).abs().max().item()
    plain_error = (plain.double() - ref).abs().max().item()
    allowed = 2 * plain_error + 2 * torch.finfo(q.dtype).eps * max(1.0, ref.abs().max().item())
    assert error <= allowed, f"error {error:.3e} > {allowed:.3e} (plain {plain_error:.3e})"


# ---- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (2, 2, 1, 3)], ids=str)
def test_inputs_of_two_to_six_dimensions(target: Target, lead: tuple[int, ...], is_causal: bool) -> None:
    q, k, v = rand(*lead, 4, 16), rand(*lead, 6, 16, seed=1), rand(*lead, 6, 16, seed=2)
    assert_like_torch(*(t.to(target.device) for t in (q, k, v)), is_causal=is_causal)


def test_every_dtype(target: Target) -> None:
    for dtype in target.dtypes:
        q, k, v = (rand(2, 3, n, 16, dtype=dtype, seed=n).to(target.device) for n in (5, 9, 9))
        assert_like_torch(q, k, v)


@pytest.mark.parametrize(("sq", "sk"), [(1, 7), (3, 7), (7, 3), (5, 1), (4, 4)])
def test_is_causal_starts_top_left(target: Target, sq: int, sk: int) -> None:
    q, k, v = rand(1, 2, sq, 16), rand(1, 2, sk, 16, seed=1), rand(1, 2, sk, 16, seed=2)
    assert_like_torch(*(t.to(target.device) for t in (q, k, v)), is_causal=True)


def test_the_first_query_sees_the_first_key_alone(target: Target) -> None:
    q, k, v = (rand(1, 2, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])


def test_values_that_causal_queries_do_not_see_may_be_nan(target: Target) -> None:
    q, k, v = (rand(1, 2, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    expected = scaled_dot_product_attention(q, k, v, is_causal=True)
    k[:, :, 3:], v[:, :, 3:] = NAN, NAN
    assert torch.equal(scaled_dot_product_attention(q, k, v, is_causal=True), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (6, 2), (5, 1), (3, 3)])
def test_enable_gqa(target: Target, heads: int, kv_heads: int) -> None:
    q, k, v = rand(2, heads, 3, 16), rand(2, kv_heads, 8, 16, seed=1), rand(2, kv_heads, 8, 16, seed=2)
    assert_like_torch(*(t.to(target.device) for t in (q, k, v)), enable_gqa=True, is_causal=True)


@pytest.mark.parametrize("scale", [0.0, 1, 0.3, -0.7])
def test_scale(target: Target, scale: float) -> None:
    q, k, v = (rand(1, 2, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    assert_like_torch(q, k, v, scale=scale)


BROADCASTS = [
    ((2, 4), (1, 4), (2, 4)),
    ((1, 4), (3, 4), (1, 4)),
    ((3, 1), (3, 4), (3, 4)),
    ((3, 4), (1, 1), (3, 4)),
    ((3, 4), (3, 4), (1, 1)),
    ((4,), (3, 4), (3, 4)),
    ((3, 4), (), (4,)),
    ((), (3, 2), ()),
    ((2, 1, 4), (3, 1), (1, 1, 4)),
]


@pytest.mark.parametrize(("q_lead", "k_lead", "v_lead"), BROADCASTS, ids=str)
def test_batches_and_heads_broadcast(
    target: Target, q_lead: tuple[int, ...], k_lead: tuple[int, ...], v_lead: tuple[int, ...]
) -> None:
    q, k, v = rand(*q_lead, 3, 16), rand(*k_lead, 5, 16, seed=1), rand(*v_lead, 5, 16, seed=2)
    assert_like_torch(*(t.to(target.device) for t in (q, k, v)))


def test_values_of_another_width(target: Target) -> None:
    for dv in (1, 8, 40):
        q, k, v = rand(2, 2, 3, 16), rand(2, 2, 5, 16, seed=1), rand(2, 2, 5, dv, seed=2)
        assert_like_torch(*(t.to(target.device) for t in (q, k, v)))


def test_inputs_of_any_strides(target: Target) -> None:
    def stored_as(t: torch.Tensor, *order: int) -> torch.Tensor:
        inverse = [order.index(i) for i in range(t.dim())]
        return t.permute(order).contiguous().permute(inverse)

    q, k, v = (rand(2, 4, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    length_first = [stored_as(t, 0, 2, 1, 3) for t in (q, k, v)]
    batch_inside = [stored_as(t, 2, 1, 0, 3) for t in (q, k, v)]
    padded = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (q, k, v)]
    expanded = [q, k[:, :1].expand_as(k), v[:1].expand_as(v)]
    every_other = [t.repeat_interleave(2, 2)[:, :, ::2] for t in (q, k, v)]
    for inputs in (length_first, batch_inside, padded, expanded, every_other):
        assert not all(t.is_contiguous() for t in inputs)
        assert_like_torch(*inputs)


def test_leading_dimensions_that_do_not_fold_into_one(target: Target) -> None:
    q, k, v = (rand(2, 3, 2, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    assert_like_torch(q, k.transpose(0, 1).contiguous().transpose(0, 1), v[:1].expand_as(v))


@pytest.mark.parametrize(
    ("q_shape", "kv_shape"),
    [((0, 2, 3, 8), (0, 2, 5, 8)), ((2, 2, 0, 8), (2, 2, 5, 8)), ((2, 2, 3, 8), (2, 2, 0, 8))],
    ids=["batch", "queries", "keys"],
)
def test_empty_inputs(target: Target, q_shape: tuple[int, ...], kv_shape: tuple[int, ...]) -> None:
    q, k, v = (rand(*shape).to(target.device) for shape in (q_shape, kv_shape, kv_shape))
    assert_like_torch(q, k, v)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shapes_that_torch_takes(data: st.DataObject) -> None:
    draw = data.draw
    lead = draw(st.lists(st.integers(1, 3), max_size=2))
    kv_heads = draw(st.integers(1, 3))
    enable_gqa = draw(st.booleans())
    heads = kv_heads * draw(st.integers(1, 3)) if enable_gqa else kv_heads
    sq, sk, d, dv = (draw(st.integers(1, 9)) for _ in range(4))

    def shape(h: int, length: int, dim: int) -> list[int]:
        ones = [draw(st.sampled_from([n, 1])) for n in lead]
        return [*ones[draw(st.integers(0, len(ones))) :], h, length, dim]

    q, k, v = (
        rand(*shape(heads, sq, d)),
        rand(*shape(kv_heads, sk, d), seed=1),
        rand(*shape(kv_heads, sk, dv), seed=2),
    )
    with CPU.running():
        assert_like_torch(q, k, v, is_causal=draw(st.booleans()), enable_gqa=enable_gqa)


# ---- masks ------------------------------------------------------------------------------------------------


def keep(*shape: int, p: float = 0.6) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(7)) < p


def added(*shape: int) -> torch.Tensor:
    """A bias with some keys masked by -inf."""
    return rand(*shape, seed=8).masked_fill(~keep(*shape, p=0.8), float("-inf"))


MASKS: dict[str, torch.Tensor] = {
    "bool": keep(2, 4, 3, 7),
    "bool for all": keep(3, 7),
    "bool per batch": keep(2, 1, 3, 7),
    "bool per head": keep(4, 3, 7),
    "bool per head alone": keep(1, 4, 3, 7),
    "bool padding": keep(2, 1, 1, 7),
    "bool per query": keep(2, 4, 3, 1),
    "bool expanded": keep(3, 1, 7)[:1].expand(2, 4, 3, 7),
    "bool heads last": keep(2, 3, 7, 4).movedim(-1, 1),
    "bool keys first": keep(2, 4, 7, 3).transpose(2, 3),
    "bool, no row": keep(2, 4, 3, 7) & torch.tensor([True, False, True]).view(3, 1),
    "bool, nothing": torch.zeros(3, 7, dtype=torch.bool),
    "added": added(2, 4, 3, 7),
    "added for all": added(3, 7),
    "added per batch": added(2, 1, 3, 7),
    "added per head": added(4, 3, 7),
    "added to keys": added(7),
    "added in half precision": rand(2, 4, 3, 7).half(),
    "added, expanded": rand(2, 4, 1, 1).expand(2, 4, 3, 7),
    "added, every other": rand(2, 4, 3, 14)[..., ::2],
    "added, off by one": rand(2, 4, 3, 8)[..., 1:],
    "added, a row of -inf": rand(3, 7).index_fill(0, torch.tensor([1]), float("-inf")),
    "added, all -inf": torch.full((3, 7), float("-inf")),
    "added, the lowest number": keep(2, 1, 3, 7).float().sub(1).mul(torch.finfo(torch.float32).max),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attn_mask(target: Target, mask: torch.Tensor) -> None:
    q, k, v = (t.to(target.device) for t in (rand(2, 4, 3, 16), rand(2, 2, 7, 16), rand(2, 2, 7, 8)))
    place = target.device
    mask = mask if mask.device.type == place else mask.to(place)
    if mask.dtype == torch.half:
        q, k, v = q.half(), k.half(), v.half()
    assert_like_torch(q, k, v, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize(
    ("lead", "mask_shape"),
    [
        ((), (3, 7)),
        ((4,), (3, 7)),
        ((4,), (4, 1, 7)),
        ((2, 3, 2), (2, 3, 2, 3, 7)),
        ((2, 3, 2), (2, 1, 1, 3, 7)),
        ((2, 3, 2), (3, 1, 3, 7)),
        ((2, 1, 3, 2), (2, 1, 3, 1, 1, 7)),
    ],
    ids=str,
)
def test_attn_mask_for_inputs_of_two_to_six_dimensions(
    target: Target, lead: tuple[int, ...], mask_shape: tuple[int, ...]
) -> None:
    q, k, v = (rand(*lead, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    for mask in (keep(*mask_shape), added(*mask_shape)):
        assert_like_torch(q, k, v, attn_mask=mask.to(target.device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attn_mask_in_half_precision(target: Target, dtype: torch.dtype) -> None:
    if dtype not in target.dtypes:
        pytest.skip(f"{target.name} does not compute {dtype} right")
    q, k, v = (rand(1, 2, n, 16, dtype=dtype, seed=n).to(target.device) for n in (3, 7, 7))
    for mask in (keep(3, 7), added(3, 7).to(dtype)):
        assert_like_torch(q, k, v, attn_mask=mask.to(target.device))


def test_a_float32_mask_may_be_added_to_half_precision(target: Target) -> None:
    q, k, v = (rand(1, 2, n, 16, dtype=torch.float16, seed=n).to(target.device) for n in (3, 7, 7))
    mask = added(3, 7).to(target.device)
    got = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    ref = torchs(q.float(), k.float(), v.float(), attn_mask=mask)
    torch.testing.assert_close(got.float(), ref, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [0.0, 2.0, -0.7])
def test_attn_mask_with_a_scale(target: Target, scale: float) -> None:
    q, k, v = (rand(1, 2, n, 16, seed=n).to(target.device) for n in (3, 7, 7))
    for mask in (keep(3, 7), added(3, 7)):
        assert_like_torch(q, k, v, attn_mask=mask.to(target.device), scale=scale)


@pytest.mark.parametrize(("sq", "sk"), [(1, 7), (3, 7), (7, 3), (4, 4)])
@pytest.mark.parametrize("bias", [causal_lower_right, causal_upper_left])
def test_causal_biases(target: Target, bias: Callable[[int, int], torch.Tensor], sq: int, sk: int) -> None:
    q, k, v = (t.to(target.device) for t in (rand(1, 4, sq, 16), rand(1, 2, sk, 16), rand(1, 2, sk, 8)))
    assert_like_torch(q, k, v, attn_mask=bias(sq, sk), enable_gqa=True)


@pytest.mark.parametrize(
    "shapes",
    [((2, 2, 0, 8), (2, 2, 5, 8)), ((2, 2, 3, 8), (2, 2, 0, 8)), ((0, 2, 3, 8), (0, 2, 5, 8))],
    ids=["queries", "keys", "batch"],
)
def test_attn_mask_over_nothing(target: Target, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    q, k = (rand(*shape).to(target.device) for shape in shapes)
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=target.device)
    assert_like_torch(q, k, k, attn_mask=mask)


@pytest.mark.parametrize("which", range(3))
def test_a_last_dimension_of_any_stride(target: Target, which: int) -> None:
    tensors = [rand(2, 4, n, 16, seed=n).to(target.device) for n in (3, 7, 7)]
    for view in (
        lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda t: t.repeat_interleave(2, -1)[..., ::2],
        lambda t: t[..., :1].expand_as(t),
    ):
        changed = list(tensors)
        changed[which] = view(tensors[which])
        assert_like_torch(*changed)


@settings(max_examples=60)
@given(data=st.data())
def test_any_mask_that_torch_takes(data: st.DataObject) -> None:
    draw = data.draw
    b, h, sq, sk = (
        draw(st.integers(1, 3)),
        2 * draw(st.integers(1, 2)),
        *(draw(st.integers(1, 9)) for _ in "qk"),
    )
    shape = [draw(st.sampled_from([n, 1])) for n in (b, h, sq, sk)][draw(st.integers(0, 2)) :]
    g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    mask = torch.rand(shape, generator=g) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    if draw(st.booleans()):
        mask = torch.randn(shape, generator=g).masked_fill(~mask, float("-inf"))
    if draw(st.booleans()):
        mask = mask.expand(b, h, sq, sk)
    q, k, v = rand(b, h, sq, 8), rand(b, 2, sk, 8, seed=1), rand(b, 2, sk, 4, seed=2)
    with CPU.running():
        assert_like_torch(q, k, v, attn_mask=mask, enable_gqa=True)


# ---- errors -----------------------------------------------------------------------------------------------


def test_signature_is_torchs() -> None:
    found = inspect.signature(scaled_dot_product_attention).parameters.values()
    assert [(p.name, p.default) for p in found] == [
        ("query", inspect.Parameter.empty),
        ("key", inspect.Parameter.empty),
        ("value", inspect.Parameter.empty),
        ("attn_mask", None),
        ("dropout_p", 0.0),
        ("is_causal", False),
        ("scale", None),
        ("enable_gqa", False),
    ]


@dataclass(frozen=True)
class Bad:
    message: str
    kind: type[Exception]
    changes: dict[str, Any]


def wrong(message: str, kind: type[Exception] = ValueError, **changes: Any) -> Bad:
    return Bad(message, kind, changes)


Q, K, V = rand(2, 4, 3, 8), rand(2, 4, 5, 8), rand(2, 4, 5, 6)
KEEP = torch.ones(3, 5, dtype=torch.bool)
GRAD = "an input requires a gradient, and headfold has no backward yet; call it under torch.no_grad()"
FLOATS = "it must be float16, bfloat16 or float32"


def tensor_errors(name: str, t: torch.Tensor) -> list[Bad]:
    return [
        wrong(f"{name} is a list; it must be a torch.Tensor", TypeError, **{name: [1.0]}),
        wrong(f"{name} has shape (); it must be (..., length, dim)", **{name: t.sum()}),
        wrong(f"{name} has shape (8,); it must be (..., length, dim)", **{name: rand(8)}),
        wrong(f"{name} has dtype torch.int64; {FLOATS}", **{name: t.long()}),
        wrong(GRAD, NotImplementedError, **{name: t.clone().requires_grad_()}),
        wrong("their batches must broadcast", **{name: t.repeat_interleave(2, 0)[:3]}),
    ]


ERRORS: dict[str, list[Bad]] = {
    "query": [
        *tensor_errors("query", Q),
        wrong(
            "query has 5 heads; that must be a multiple of the 2 KV heads",
            query=rand(2, 5, 3, 8),
            key=K[:, :2],
            value=V[:, :2],
            enable_gqa=True,
        ),
        wrong(
            "query has 1 heads; that must be a multiple of the 4 KV heads",
            query=Q[:, :1],
            enable_gqa=True,
        ),
        wrong(
            "query has head dimension 257; it must be 1 to 256",
            query=rand(2, 4, 3, 257),
            key=rand(2, 4, 5, 257),
        ),
    ],
    "key": [
        *tensor_errors("key", K),
        wrong("key has dtype torch.float16; it must have the queries' dtype torch.float32", key=K.half()),
        wrong("key is on meta; it must be on the queries' device cpu", key=K.to("meta")),
        wrong("key has 2 heads; without enable_gqa it must have query's 4", key=K[:, :2]),
        wrong("key has head dimension 4; it must equal the queries' head dimension 8", key=K[..., :4]),
    ],
    "value": [
        *tensor_errors("value", V),
        wrong("value has dtype torch.float16; it must have the queries' dtype torch.float32", value=V.half()),
        wrong("value is on meta; it must be on the queries' device cpu", value=V.to("meta")),
        wrong("value has 2 heads; without enable_gqa it must have query's 4", value=V[:, :2]),
        wrong("value has 2 heads; without enable_gqa it must have query's 4", key=K[:, :1], value=V[:, :2]),
        wrong("value has 2 heads; it must have key's 4", value=V[:, :2], enable_gqa=True),
        wrong("value has length 4; it must have key's 5", value=V[:, :, :4]),
        wrong("value has head dimension 257; it must be 1 to 256", value=rand(2, 4, 5, 257)),
    ],
    "attn_mask": [
        wrong("attn_mask is a list; it must be None or a torch.Tensor", TypeError, attn_mask=[True]),
        wrong("attn_mask has dtype torch.int32; it must be bool or floating point", attn_mask=KEEP.int()),
        wrong(
            "attn_mask has dtype torch.float64; it must be bool, float16, bfloat16", attn_mask=KEEP.double()
        ),
        wrong("attn_mask is on meta; it must be on query's cpu", attn_mask=KEEP.to("meta")),
        *(
            wrong(
                f"attn_mask has shape {tuple(mask.shape)}; it must broadcast to (2, 4, 3, 5)",
                attn_mask=mask,
            )
            for mask in (
                KEEP.T,
                KEEP[:, :4],
                KEEP[:2],
                KEEP.expand(3, 4, 3, 5),
                KEEP.expand(2, 2, 3, 5),
                KEEP.expand(1, 2, 4, 3, 5),
            )
        ),
        *(
            wrong(
                "attn_mask is given with is_causal=True; it must be None then",
                MaskError,
                is_causal=True,
                attn_mask=m,
            )
            for m in (KEEP, KEEP.float(), causal_lower_right(3, 5))
        ),
        *(
            wrong(
                "attn_mask is a causal bias for lengths (3, 6); it must be for (3, 5)",
                attn_mask=bias(3, 6),
            )
            for bias in (causal_lower_right, causal_upper_left)
        ),
        wrong(
            "attn_mask requires a gradient, and headfold has no backward yet; call it under torch.no_grad()",
            NotImplementedError,
            attn_mask=KEEP.float().requires_grad_(),
        ),
    ],
    "dropout_p": [
        wrong(
            f"dropout_p is {p}; attention here has no dropout, it must be 0.0",
            NotImplementedError,
            dropout_p=p,
        )
        for p in (0.1, 1, "none")
    ],
    "is_causal": [
        wrong(f"is_causal is {value!r} and enable_gqa False; both must be bool", TypeError, is_causal=value)
        for value in (None, 1)
    ],
    "scale": [
        *(
            wrong(f"scale is {value!r}; it must be None or a number", TypeError, scale=value)
            for value in ("1", True, torch.tensor(1.0))
        ),
        *(
            wrong(f"scale is {value}; it must be None or a finite number", scale=value)
            for value in (NAN, float("inf"))
        ),
    ],
    "enable_gqa": [
        wrong(f"is_causal is False and enable_gqa {value!r}; both must be bool", TypeError, enable_gqa=value)
        for value in (None, "yes")
    ],
}


def test_every_argument_has_an_error_test() -> None:
    assert set(ERRORS) == set(inspect.signature(scaled_dot_product_attention).parameters)


@pytest.mark.parametrize(
    "bad",
    list(itertools.chain(*ERRORS.values())),
    ids=[f"{name}-{i}" for name, cases in ERRORS.items() for i in range(len(cases))],
)
def test_bad_argument_is_refused_before_a_launch(bad: Bad, monkeypatch: pytest.MonkeyPatch) -> None:
    run_instead(monkeypatch, lambda *a: pytest.fail("a kernel was launched"))
    with pytest.raises(bad.kind) as error:
        scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, **bad.changes})
    assert type(error.value) is bad.kind
    assert str(error.value).startswith("scaled_dot_product_attention: ")
    assert bad.message in str(error.value)


@pytest.mark.parametrize("inputs", [(Q[:, :3], K, V), (Q, K[:, :, :4], V), (Q, K[:, :2], V[:, :2])])
def test_torch_refuses_what_headfold_refuses(inputs: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(RuntimeError):
        torchs(*inputs)
    with pytest.raises(ValueError, match="scaled_dot_product_attention: "):
        scaled_dot_product_attention(*inputs)


@pytest.mark.parametrize(
    "options",
    [
        {"attn_mask": KEEP, "is_causal": True},
        {"attn_mask": KEEP[:, :4]},
        {"attn_mask": KEEP.int()},
        {"attn_mask": KEEP.expand(2, 2, 3, 5)},
    ],
)
def test_torch_refuses_the_masks_that_headfold_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError):
        torchs(Q, K, V, **options)
    with pytest.raises(ValueError, match="scaled_dot_product_attention: attn_mask "):
        scaled_dot_product_attention(Q, K, V, **options)


def test_causal_with_a_mask_is_the_error_that_torch_raises() -> None:
    assert issubclass(MaskError, RuntimeError)
    assert issubclass(MaskError, ValueError)
    for mask in (KEEP, causal_lower_right(3, 5)):
        with pytest.raises(RuntimeError):
            scaled_dot_product_attention(Q, K, V, attn_mask=mask, is_causal=True)


def test_gradients_come_to_nothing_without_grad_mode(target: Target) -> None:
    q, k, v = (t.to(target.device) for t in (Q, K, V))
    with torch.no_grad():
        assert_like_torch(q.clone().requires_grad_(), k, v)
        mask = torch.zeros(3, 5, device=target.device, requires_grad=True)
        assert_like_torch(q, k, v, attn_mask=mask)


# ---- copies -----------------------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    calls: list[Inputs] = []
    run_instead(monkeypatch, lambda x, out, lse: calls.append(x))
    return calls


@pytest.mark.parametrize(
    "view",
    [lambda t: t, lambda t: t[0], lambda t: t[:1].expand_as(t), lambda t: t[:, :1].expand_as(t)],
    ids=["4-D", "3-D", "expanded batch", "expanded heads"],
)
def test_no_input_is_copied(view: Callable[[torch.Tensor], torch.Tensor], seen: list[Inputs]) -> None:
    q, k, v = (view(t) for t in (Q, K, V))
    scaled_dot_product_attention(q, k, v)
    (x,) = seen
    assert [t.data_ptr() for t in (x.q, x.k, x.v)] == [t.data_ptr() for t in (q, k, v)]


def test_broadcast_kv_heads_are_read_once(seen: list[Inputs]) -> None:
    """One KV head for all query heads is a group of them, not as many copies of the head."""
    scaled_dot_product_attention(Q, K[:, :1], V[:, :1])
    (x,) = seen
    assert (x.q.shape[2], x.k.shape[2], x.v.shape[2]) == (4, 1, 1)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(3, 5, dtype=torch.bool),
        torch.zeros(2, 1, 3, 5),
        torch.zeros(4, 3, 1),
        torch.zeros(2, 4, 5, 3).transpose(2, 3),
    ],
    ids=["2-D", "per batch", "per query", "keys first"],
)
def test_no_mask_is_copied(mask: torch.Tensor, seen: list[Inputs]) -> None:
    scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    (x,) = seen
    assert x.mask is not None
    assert x.mask.data_ptr() == mask.data_ptr()
    assert x.mask.shape == (2, 4, 3, 5)


def test_a_causal_bias_is_no_mask_in_memory(seen: list[Inputs]) -> None:
    scaled_dot_product_attention(Q, K, V, attn_mask=causal_lower_right(3, 5))
    scaled_dot_product_attention(Q, K, V, attn_mask=causal_upper_left(3, 5))
    assert [(x.mask, x.window_left, x.window_right, x.bottom_right) for x in seen] == [
        (None, -1, 0, True),
        (None, -1, 0, False),
    ]
