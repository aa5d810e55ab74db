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


def inputs_of(q_layout: str, kv_layout: str) -> Inputs:
    """Ragged lengths, every key finite: opcheck compares results, NaN included."""
    x = make([2, 3], [5, 7], heads=6, dv=8, q_layout=q_layout, kv_layout=kv_layout, page_size=4, causal=True)
    return dataclasses.replace(
        x,
        q=odd_strides(x.q.nan_to_num()),
        k=odd_strides(x.k.nan_to_num()),
        v=odd_strides(x.v.nan_to_num()),
        seqused_q=None,
        num_splits=2,
        softmax_scale=0.5,
    )


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


@pytest.mark.parametrize(("q_layout", "kv_layout"), LAYOUTS)
def test_opcheck_attention(q_layout: str, kv_layout: str) -> None:
    torch.library.opcheck(ops.attention, (), as_kwargs(inputs_of(q_layout, kv_layout)))


@pytest.mark.parametrize(("q_layout", "kv_layout"), LAYOUTS)
def test_opcheck_attention_out(q_layout: str, kv_layout: str) -> None:
    x = inputs_of(q_layout, kv_layout)
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


@pytest.mark.parametrize(("q_layout", "kv_layout"), LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fake_and_meta_results_are_those_of_a_real_call(
    q_layout: str, kv_layout: str, dtype: torch.dtype
) -> None:
    x = inputs_of(q_layout, kv_layout)
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
    x = make([2, 3], [5, 7], q_layout="ragged", kv_layout="paged")
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


COMPILED: dict[str, Case] = {
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
