"""The operators as PyTorch sees them: schema, fake, meta, torch.compile; and what importing headfold costs."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import headfold
from headfold import ops
from headfold.append import append
from headfold.problem import Inputs
from tests.cases import make, poisoned

ROOT = Path(__file__).parent.parent
LAYOUTS = [(q, k) for q in ("dense", "ragged") for k in ("dense", "ragged", "paged")]
FIELDS = [f.name for f in dataclasses.fields(Inputs)]


def as_kwargs(x: Inputs) -> dict[str, Any]:
    return {name: getattr(x, name) for name in FIELDS}


def odd_strides(t: torch.Tensor) -> torch.Tensor:
    """The same values inside rows that are longer, heads first."""
    wide = torch.nn.functional.pad(t, (1, 2)).movedim(-2, 0).contiguous().movedim(0, -2)
    return wide[..., 1:-2]


def inputs_of(q_layout: str, kv_layout: str, features: bool = False) -> Inputs:
    """Ragged lengths, every key finite: opcheck compares results, NaN included."""
    x = make([2, 3], [5, 7], heads=6, dv=8, q_layout=q_layout, kv_layout=kv_layout, page_size=4, causal=True)
    x = dataclasses.replace(
        x,
        q=odd_strides(x.q.nan_to_num()),
        k=odd_strides(x.k.nan_to_num()),
        v=odd_strides(x.v.nan_to_num()),
        seqused_q=None,
        num_splits=2,
        softmax_scale=0.5,
    )
    return with_features(x) if features else x


def with_features(x: Inputs) -> Inputs:
    """Everything that a dense or paged call may have besides; a tensor mask where that is allowed too."""
    g = torch.Generator().manual_seed(3)
    h = x.q.shape[-2]
    ragged = x.cu_seqlens_k is not None
    mask = None
    if x.q.dim() == 4 and x.page_table is None and not ragged:
        mask = torch.randn(x.batch, h, x.q.shape[1], x.k.shape[1], generator=g)
    return dataclasses.replace(
        x,
        softcap=2.0,
        attention_chunk=5,
        tokens_per_split=4,
        sink=torch.randn(h, generator=g).to(x.q.dtype),
        alibi_slopes=torch.rand(x.batch, h, generator=g),
        mask=mask,
        tree_mask=torch.ones(x.batch, 8, 8, dtype=torch.bool).tril(),
        cache_batch_idx=None if ragged else lengths(1, 0),
        cache_leftpad=None if ragged else lengths(1, 2),
        early_lengths=None if x.seqused_k is None else x.seqused_k - 1,
        early_new=0 if x.seqused_k is None else 1,
        rotary_cos=odd_strides(torch.rand(20, 3, generator=g)),
        rotary_sin=odd_strides(torch.rand(20, 3, generator=g)),
        rotary_positions=lengths(4, 9),
        rotary_interleaved=False,
    )


# Every layout as it is, and each layout of the keys with all that it may have besides.
FEATURED_LAYOUTS = [("dense", "dense"), ("dense", "paged"), ("ragged", "ragged")]
CASES = [(q, k, False) for q, k in LAYOUTS] + [(q, k, True) for q, k in FEATURED_LAYOUTS]


def results_like(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """An out with odd strides and an lse, both to be written."""
    return odd_strides(torch.zeros(x.out_shape)), torch.zeros(x.lse_shape)


def partials(ragged: bool, strided: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (3, 10, 4, 8) if ragged else (3, 2, 5, 4, 8)
    out_partial = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    lse_partial = torch.randn(shape[:-1], generator=torch.Generator().manual_seed(1))
    return odd_strides(out_partial) if strided else out_partial, lse_partial


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- schema -----------------------------------------------------------------------------------------------


def test_the_schema_lists_the_fields_of_inputs_in_order() -> None:
    for name in ("attention", "attention_out"):
        schema = getattr(torch.ops.headfold, name).default._schema
        assert [a.name for a in schema.arguments][: len(FIELDS)] == FIELDS


def test_schema_defaults_are_those_of_inputs() -> None:
    defaults = {p.name: p.default for p in inspect.signature(Inputs).parameters.values()}
    for argument in torch.ops.headfold.attention.default._schema.arguments[3:]:
        assert argument.default_value == defaults[argument.name], argument.name


@pytest.mark.parametrize(("q_layout", "kv_layout", "features"), CASES)
def test_opcheck_attention(q_layout: str, kv_layout: str, features: bool) -> None:
    torch.library.opcheck(ops.attention, (), as_kwargs(inputs_of(q_layout, kv_layout, features)))


@pytest.mark.parametrize(("q_layout", "kv_layout", "features"), CASES)
def test_opcheck_attention_out(q_layout: str, kv_layout: str, features: bool) -> None:
    x = inputs_of(q_layout, kv_layout, features)
    out, lse = results_like(x)
    torch.library.opcheck(ops.attention_out, (), {**as_kwargs(x), "out": out, "lse": lse})


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float16])
def test_opcheck_combine(ragged: bool, out_dtype: torch.dtype | None) -> None:
    out_partial, lse_partial = partials(ragged, strided=True)
    cu_seqlens = lengths(0, 4, 10) if ragged else None
    torch.library.opcheck(ops.combine, (out_partial, lse_partial, cu_seqlens, None, out_dtype))


@pytest.mark.parametrize("ragged", [False, True])
def test_opcheck_combine_out(ragged: bool) -> None:
    out_partial, lse_partial = partials(ragged, strided=True)
    args = (out_partial, lse_partial, lengths(0, 4, 10) if ragged else None, lengths(3, 5))
    out = odd_strides(torch.zeros(out_partial.shape[1:]))
    torch.library.opcheck(ops.combine_out, args, {"out": out, "lse": torch.zeros(lse_partial.shape[1:])})


# ---- fake and meta ----------------------------------------------------------------------------------------


def facts(tensors: tuple[torch.Tensor, ...]) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]


def moved(x: Inputs, move: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    return {n: move(v) if isinstance(v, torch.Tensor) else v for n, v in as_kwargs(x).items()}


def to_meta(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def test_every_field_has_a_value_in_opcheck() -> None:
    """Over the layouts no argument of the operator stays at its default, but for those that change no tensor."""
    defaults = {p.name: p.default for p in inspect.signature(Inputs).parameters.values()}
    given = {
        name
        for case in CASES
        for name, v in as_kwargs(inputs_of(*case)).items()
        if isinstance(v, torch.Tensor) or v != defaults[name]
    }
    assert set(FIELDS) - given == {
        "seqused_q",
        "bottom_right",
        "pack_gqa",
        "sm_margin",
        "rotary_advances",
        "window_left",
        "caller",
    }


@pytest.mark.parametrize(("q_layout", "kv_layout", "features"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_and_meta_results_are_those_of_a_real_call(
    q_layout: str, kv_layout: str, dtype: torch.dtype, features: bool
) -> None:
    x = inputs_of(q_layout, kv_layout, features)
    x = dataclasses.replace(x, q=x.q.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))
    real = facts(ops.attention(**as_kwargs(x)))
    assert [fact[:2] for fact in real] == [(x.out_shape, dtype), (x.lse_shape, torch.float32)]
    assert facts(ops.attention(**moved(x, to_meta))) == real
    with FakeTensorMode() as mode:
        assert facts(ops.attention(**moved(x, mode.from_tensor))) == real


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16])
def test_fake_and_meta_merges_are_those_of_a_real_call(ragged: bool, out_dtype: torch.dtype | None) -> None:
    args = partials(ragged, strided=True)
    real = facts(ops.combine(*args, out_dtype=out_dtype))
    assert facts(ops.combine(*(to_meta(t) for t in args), out_dtype=out_dtype)) == real
    with FakeTensorMode() as mode:
        assert facts(ops.combine(*(mode.from_tensor(t) for t in args), out_dtype=out_dtype)) == real


def test_fakes_read_no_values_under_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    x = with_features(make([2, 3], [5, 7], q_layout="ragged", kv_layout="paged"))
    out, lse = poisoned(x)
    ops.attention(**moved(x, to_meta))
    ops.attention_out(**moved(x, to_meta), out=to_meta(out), lse=to_meta(lse))


BAD_CALLS: list[tuple[str, Callable[[Inputs], dict[str, Any]]]] = [
    ("q dtype", lambda x: {"q": x.q.double()}),
    ("k dtype", lambda x: {"k": x.k.half()}),
    ("q dims", lambda x: {"q": x.q[0]}),
    ("v shape", lambda x: {"v": x.v[:, :2]}),
    ("k stride", lambda x: {"k": x.k.transpose(-1, -2).contiguous().transpose(-1, -2)}),
    ("heads", lambda x: {"q": x.q[:, :, :3]}),
    ("head dim", lambda x: {"k": x.k[..., :4]}),
    ("batch", lambda x: {"k": x.k[:1], "v": x.v[:1]}),
    ("lengths", lambda x: {"seqused_k": lengths(1, 2, 3)}),
    ("lengths dtype", lambda x: {"seqused_k": torch.tensor([1, 2])}),
    ("offsets", lambda x: {"q": x.q[0], "cu_seqlens_q": lengths()}),
    ("table", lambda x: {"page_table": lengths(1, 2)}),
    ("bound", lambda x: {"max_seqlen_q": -1}),
    ("window", lambda x: {"window_left": -2}),
    ("splits", lambda x: {"num_splits": 300}),
    ("margin", lambda x: {"sm_margin": -1}),
    ("scale", lambda x: {"softmax_scale": float("nan")}),
    ("gradient", lambda x: {"q": x.q.clone().requires_grad_()}),
    ("cap", lambda x: {"softcap": -1.0}),
    ("chunk", lambda x: {"attention_chunk": -1}),
    ("split", lambda x: {"tokens_per_split": -1}),
    ("sink", lambda x: {"sink": torch.ones(3)}),
    ("gradient of the sink", lambda x: {"sink": torch.ones(4, requires_grad=True)}),
    ("slopes", lambda x: {"alibi_slopes": torch.ones(4).half()}),
    ("mask", lambda x: {"mask": torch.ones(3, 5)}),
    ("tree", lambda x: {"tree_mask": torch.ones(2, 3, 2, dtype=torch.bool)}),
    ("rows", lambda x: {"cache_batch_idx": lengths(1)}),
    ("padding", lambda x: {"cache_leftpad": torch.tensor([1, 2])}),
    ("half of the angles", lambda x: {"rotary_cos": torch.ones(9, 4)}),
    ("no positions", lambda x: {"rotary_cos": torch.ones(9, 4), "rotary_sin": torch.ones(9, 4)}),
]


def error_of(call: Callable[..., Any], kwargs: dict[str, Any]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as error:
        call(**kwargs)
    return type(error.value), str(error.value)


@pytest.mark.parametrize("change", [c for _, c in BAD_CALLS], ids=[n for n, _ in BAD_CALLS])
def test_fakes_raise_what_real_calls_raise(change: Callable[[Inputs], dict[str, Any]]) -> None:
    x = make([3, 3], [5, 5], slack=0)
    out, lse = poisoned(x)
    bad = dataclasses.replace(x, **change(x))
    real = error_of(ops.attention, as_kwargs(bad))
    assert real[0] in (ValueError, NotImplementedError)
    assert error_of(ops.attention_out, {**as_kwargs(bad), "out": out, "lse": lse}) == real
    with FakeTensorMode() as mode:
        fake = moved(bad, mode.from_tensor)
        assert error_of(ops.attention, fake) == real
        results = {"out": mode.from_tensor(out), "lse": mode.from_tensor(lse)}
        assert error_of(ops.attention_out, {**fake, **results}) == real


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("out", torch.empty(2, 3, 4, 8), r"out has shape \(2, 3, 4, 8\); it must be \(2, 3, 4, 16\)"),
        ("out", torch.empty(2, 3, 4, 16).half(), "out has dtype torch.float16; it must be torch.float32"),
        ("lse", torch.empty(2, 3, 4), r"lse has shape \(2, 3, 4\); it must be \(2, 4, 3\)"),
        ("lse", torch.empty(2, 4, 3).double(), "lse has dtype torch.float64; it must be torch.float32"),
        ("lse", torch.empty(1, 4, 3).expand(2, 4, 3), "lse is expanded"),
    ],
)
def test_results_to_write_into_are_checked(name: str, bad: torch.Tensor, message: str) -> None:
    x = make([3, 3], [5, 5], slack=0)
    out, lse = poisoned(x)
    results = {"out": out, "lse": lse, name: bad}
    with pytest.raises(ValueError, match=message):
        ops.attention_out(**as_kwargs(x), **results)
    untouched = lse if name == "out" else out
    assert untouched.isnan().all()
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        ops.attention_out(
            **moved(x, mode.from_tensor), **{n: mode.from_tensor(t) for n, t in results.items()}
        )


@pytest.mark.parametrize(
    "change",
    [
        {"lse_partial": torch.zeros(3, 2, 5, 3)},
        {"lse_partial": torch.zeros(3, 2, 5, 4).half()},
        {"out_partial": torch.zeros(3, 2, 5, 4, 8).int()},
        {"seqused": lengths(1)},
        {"cu_seqlens": lengths(0, 5)},
        {"out": torch.zeros(2, 5, 4, 7)},
        {"lse": torch.zeros(2, 4, 5)},
    ],
    ids=lambda c: "".join(c),
)
def test_fake_merges_raise_what_real_merges_raise(change: dict[str, torch.Tensor]) -> None:
    out_partial, lse_partial = partials(ragged=False)
    tensors = {"out_partial": out_partial, "lse_partial": lse_partial}
    results = {"out": torch.zeros(2, 5, 4, 8), "lse": torch.zeros(2, 5, 4)}
    for op, arguments in (
        (ops.combine_out, {**tensors, **results, **change}),
        (ops.combine, {**tensors, **change}),
    ):
        if op is ops.combine and not change.keys().isdisjoint(results):
            continue
        real = error_of(op, arguments)
        assert real[0] is ValueError
        with FakeTensorMode() as mode:
            assert error_of(op, {n: mode.from_tensor(t) for n, t in arguments.items()}) == real


# ---- torch.compile ----------------------------------------------------------------------------------------

# (batch, queries, keys) of successive calls. Sizes that happen to be equal count as different ones (no duck shapes).
SIZES = [(3, 5, 7), (6, 9, 11), (2, 4, 8), (7, 12, 30)]
Case = tuple[Callable[..., Any], Callable[[int, int, int], tuple[Any, ...]]]


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def dense(b: int, sq: int, sk: int) -> tuple[torch.Tensor, ...]:
    return rand(b, sq, 4, 8), rand(b, sk, 2, 8), rand(b, sk, 2, 8)


def used(b: int, sk: int) -> torch.Tensor:
    return torch.randint(0, sk + 1, (b,), dtype=torch.int32)


def table(b: int, n: int) -> torch.Tensor:
    return torch.randint(0, 9, (b, n), dtype=torch.int32)


def ragged(b: int, sq: int, sk: int) -> tuple[Any, ...]:
    q_lens, k_lens = torch.randint(1, sq, (b,)), torch.randint(1, sk, (b,))

    def offsets(lens: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), lens.cumsum(0)]).int()

    total_q, total_k = int(q_lens.sum()), int(k_lens.sum())
    tensors = rand(total_q, 4, 8), rand(total_k, 2, 8), rand(total_k, 2, 8)
    return *tensors, offsets(q_lens), offsets(k_lens), sq, sk + 20


def decoding_step(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    n: int | torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append, rotate, attend."""
    return headfold.flash_attn_with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=n,
        causal=True,
        return_softmax_lse=True,
        **options,
    )


def step(b: int, sq: int, sk: int) -> tuple[torch.Tensor, ...]:
    """sq new tokens for a cache with sk before them and some room."""
    q, k_cache, v_cache = dense(b, sq, sk + sq + 1)
    cos, sin = rand(sk + sq + 2, 3), rand(sk + sq + 2, 3)
    return q, k_cache, v_cache, rand(b, sq, 2, 8), rand(b, sq, 2, 8), cos, sin, used(b, sk)


def paged_step(b: int, sq: int, sk: int) -> tuple[torch.Tensor, ...]:
    """The same over pages of three keys, of which no two sequences share one."""
    q, _, _, k, v, cos, sin, n = step(b, sq, sk)
    per = (sk + sq) // 3 + 1
    pages = torch.randperm(b * per, dtype=torch.int32).view(b, per)
    return q, rand(b * per, 3, 2, 8), rand(b * per, 3, 2, 8), k, v, cos, sin, n, pages


PLANNED = headfold.get_scheduler_metadata(
    9, 16, 64, 4, 2, 8, torch.zeros(9, dtype=torch.int32), torch.float32
)
SLOPES = torch.rand(4)

COMPILED: dict[str, Case] = {
    "decoding step": (decoding_step, step),
    "decoding step, one length, scheduled": (
        lambda *a: decoding_step(*a, scheduler_metadata=PLANNED, rotary_interleaved=False),
        lambda b, sq, sk: (*step(b, sq, sk)[:-1], sk - 2),
    ),
    "decoding step, paged": (
        lambda q, kc, vc, k, v, cos, sin, n, t: decoding_step(q, kc, vc, k, v, cos, sin, n, page_table=t),
        paged_step,
    ),
    "decoding step, ragged": (
        lambda q, kc, vc, k, v, cos, sin, n, cu: decoding_step(
            q, kc, vc, k.flatten(0, 1), v.flatten(0, 1), cos, sin, n, cu_seqlens_k_new=cu
        ),
        lambda b, sq, sk: (
            *step(b, sq, sk),
            torch.cat([torch.zeros(1), torch.randint(0, sq, (b,)).cumsum(0)]).int(),
        ),
    ),
    "decoding step with everything": (
        lambda q, kc, vc, k, v, cos, sin, n, rows, pads, tree: headfold.flash_attn_with_kvcache(
            q,
            kc,
            vc,
            k,
            v,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=n,
            cache_batch_idx=rows,
            cache_leftpad=pads,
            tree_mask=tree,
            softcap=3.0,
            tokens_per_split=16,
            learnable_sink=SLOPES,
            alibi_slopes=SLOPES,
        ),
        lambda b, sq, sk: (
            *step(b, sq, sk)[:-1],
            torch.full((b,), sk, dtype=torch.int32),
            torch.randperm(b, dtype=torch.int32),
            used(b, sk),
            torch.rand(b, sq, sq) < 0.5,
        ),
    ),
    "decoding step with a packed tree": (
        lambda q, kc, vc, n, tree: headfold.flash_attn_with_kvcache(
            q, kc, vc, cache_seqlens=n, tree_mask=tree
        ),
        lambda b, sq, sk: (
            *dense(b, sq, sk),
            used(b, sk),
            torch.randint(0, 256, (b, sq + 8, -(-sq // 8) + 1), dtype=torch.uint8),
        ),
    ),
    "func with features": (
        lambda q, k, v: headfold.flash_attn_func(
            q, k, v, causal=True, softcap=3.0, attention_chunk=4, learnable_sink=SLOPES, alibi_slopes=SLOPES
        ),
        dense,
    ),
    "sdpa with a mask": (
        lambda q, k, v, mask: headfold.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
        lambda b, sq, sk: (
            *(t.transpose(1, 2) for t in dense(b, sq, sk)),
            torch.rand(b, 1, sq, sk) < 0.7,
        ),
    ),
    "func": (lambda q, k, v: headfold.flash_attn_func(q, k, v, causal=True, return_lse=True), dense),
    "func out=": (
        lambda q, k, v, out: headfold.flash_attn_func(q, k, v, out=out, return_lse=True),
        lambda b, sq, sk: (*dense(b, sq, sk), torch.zeros(b, sq, 4, 8)),
    ),
    "func with a window": (
        lambda q, k, v, n: headfold.flash_attn_func(q, k, v, window_size=(n, None)),
        lambda b, sq, sk: (*dense(b, sq, sk), sk - 4),
    ),
    "kvcache with a tensor": (
        lambda q, k, v, n: headfold.flash_attn_with_kvcache(
            q, k, v, cache_seqlens=n, causal=True, return_softmax_lse=True
        ),
        lambda b, sq, sk: (*dense(b, sq, sk), used(b, sk)),
    ),
    "kvcache with an int": (
        lambda q, k, v, n: headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, causal=True),
        lambda b, sq, sk: (*dense(b, sq, sk), sk - 3),
    ),
    "paged kvcache with a tensor": (
        lambda q, k, v, n, t: headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, page_table=t),
        lambda b, sq, sk: (
            rand(b, sq, 4, 8),
            rand(9, 3, 2, 8),
            rand(9, 3, 2, 8),
            used(b, sk * 3),
            table(b, sk),
        ),
    ),
    "paged kvcache with an int": (
        lambda q, k, v, n, t: headfold.flash_attn_with_kvcache(q, k, v, cache_seqlens=n, page_table=t),
        lambda b, sq, sk: (rand(b, sq, 4, 8), rand(9, 3, 2, 8), rand(9, 3, 2, 8), sk * 2, table(b, sk)),
    ),
    "varlen": (headfold.flash_attn_varlen_func, ragged),
    "sdpa": (
        lambda q, k, v: headfold.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        lambda b, sq, sk: tuple(t.transpose(1, 2) for t in dense(b, sq, sk)),
    ),
    "combine": (
        headfold.flash_attn_combine,
        lambda b, sq, sk: (rand(sk, b, sq, 4, 8), rand(sk, b, sq, 4)),
    ),
}


@pytest.mark.parametrize(("function", "arguments"), COMPILED.values(), ids=COMPILED)
def test_compiles_once_for_changing_lengths(
    function: Callable[..., Any], arguments: Callable[[int, int, int], tuple[Any, ...]]
) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    distinct = torch.fx.experimental._config.patch(use_duck_shape=False)
    with torch._dynamo.config.patch(error_on_recompile=True), distinct:
        for sizes in SIZES:
            args = arguments(*sizes)
            twin = [a.clone() if isinstance(a, torch.Tensor) and a.is_contiguous() else a for a in args]
            got, expected = compiled(*args), function(*twin)
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(args, tuple(twin), rtol=0, atol=0)  # what an append wrote
    torch._dynamo.reset()


class Exported(torch.nn.Module):
    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(args) == 9:
            return decoding_step(*args[:8], page_table=args[8])
        return decoding_step(*args)


@pytest.mark.parametrize("arguments", [step, paged_step], ids=["dense", "paged"])
def test_an_exported_decoding_step_mutates_the_caches_alone(
    arguments: Callable[[int, int, int], tuple[torch.Tensor, ...]],
) -> None:
    torch.manual_seed(0)
    auto = torch.export.Dim.AUTO
    args = arguments(3, 5, 17)
    dynamic = tuple({0: auto} if t.dim() < 4 else {0: auto, 1: auto} for t in args)
    if arguments is paged_step:  # pages keep their size
        dynamic = tuple({0: auto} if i in (1, 2) else d for i, d in enumerate(dynamic))
        dynamic = (*dynamic[:8], {0: auto, 1: auto})
    program = torch.export.export(Exported(), args, dynamic_shapes=(dynamic,), strict=False)
    called = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in called if "headfold" in str(t)] == [append, ops.attention]
    functional = program.run_decompositions({})
    mutated = functional.graph_signature.user_inputs_to_mutate
    inputs = functional.graph_signature.user_inputs
    assert sorted(mutated.values()) == sorted(inputs[1:3])
    for sizes in ((3, 5, 17), (6, 2, 31)):
        real = arguments(*sizes)
        exported, twin = ([t.clone() for t in real] for _ in range(2))
        got, expected = (
            functional.module()(*exported),
            decoding_step(*twin[:8], page_table=twin[8] if len(twin) == 9 else None),
        )
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(exported, twin, rtol=0, atol=0)
        assert not torch.equal(twin[1], real[1])


def test_a_bad_append_is_named_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(decoding_step, fullgraph=True, dynamic=True, backend="aot_eager")
    args = list(step(3, 5, 17))
    args[3] = args[3][:2]
    with pytest.raises(
        Exception, match=r"flash_attn_with_kvcache: k has batch .*; it must have the queries' batch"
    ):
        compiled(*args)
    torch._dynamo.reset()


def test_bad_arguments_are_named_under_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(headfold.flash_attn_func, fullgraph=True, dynamic=True, backend="aot_eager")
    with pytest.raises(
        Exception, match=r"flash_attn_func: q has .* heads; that must be a multiple of the .* KV heads"
    ):
        compiled(rand(2, 4, 3, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 8))
    torch._dynamo.reset()


# ---- importing headfold -----------------------------------------------------------------------------------

_IMPORT = """
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import headfold
seconds = time.perf_counter() - start
added = sorted(set(sys.modules) - before)
print(seconds)
print("triton" in sys.modules or any(m.startswith("triton.") for m in added))
print(torch.cuda.is_initialized())
print([m for m in added if m.startswith("headfold.backends.") or m.startswith("headfold.kernels")])
"""


def test_importing_headfold_is_quick_and_brings_neither_triton_nor_cuda() -> None:
    best = float("inf")
    for _ in range(5):
        run = subprocess.run(
            [sys.executable, "-c", _IMPORT], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
        )
        seconds, triton, cuda, device_code = run.stdout.strip().splitlines()
        assert (triton, cuda, device_code) == ("False", "False", "[]")
        best = min(best, float(seconds))
        if best < 0.3:
            break
    assert best < 0.3, f"importing headfold took {best:.2f} s beyond torch"
