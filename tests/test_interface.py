"""The public functions: their signatures, every argument's error, and their results on every target."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import headfold
from headfold import backends, ops
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate, make
from tests.conftest import Target

# ---- signatures -------------------------------------------------------------------------------------------

# Positional order, names and defaults that callers of FlashAttention-3 rely on; then headfold's own.
SIGNATURES = {
    "flash_attn_func": """q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0, pack_gqa=None,
        deterministic=False, sm_margin=0, return_attn_probs=False, *, learnable_sink=None, alibi_slopes=None,
        tokens_per_split=None, out=None, return_lse=False""",
    "flash_attn_varlen_func": """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False, *, page_table=None, learnable_sink=None, alibi_slopes=None,
        tokens_per_split=None, out=None, return_lse=False""",
    "flash_attn_with_kvcache": """q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False, *, learnable_sink=None, alibi_slopes=None, tree_mask=None,
        tokens_per_split=None, out=None""",
    "flash_attn_combine": """out_partial, lse_partial, out=None, out_dtype=None, *, cu_seqlens=None, seqused=None,
        return_lse=True""",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {name: getattr(headfold, name) for name in SIGNATURES}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_one_callers_know(name: str) -> None:
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None".replace("\n", " ")))
    found = inspect.signature(FUNCTIONS[name])

    def facts(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert facts(found) == facts(expected)


# ---- every argument's error -------------------------------------------------------------------------------


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


Q, K, V = rand(2, 3, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 6)
PAGES_K, PAGES_V, TABLE = rand(4, 4, 2, 8), rand(4, 4, 2, 6), ints(0, 1, 2, 3).view(2, 2)
PAGED = {"k_cache": PAGES_K, "v_cache": PAGES_V, "page_table": TABLE}
BASES: dict[str, dict[str, Any]] = {
    "flash_attn_func": {"q": Q, "k": K, "v": V},
    "flash_attn_varlen_func": {
        "q": Q.flatten(0, 1),
        "k": K.flatten(0, 1),
        "v": V.flatten(0, 1),
        "cu_seqlens_q": ints(0, 3, 6),
        "cu_seqlens_k": ints(0, 5, 10),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
    },
    "flash_attn_with_kvcache": {"q": Q, "k_cache": K, "v_cache": V},
    "flash_attn_combine": {"out_partial": rand(3, 2, 5, 4, 8), "lse_partial": rand(3, 2, 5, 4)},
}
OUT_SHAPES = {
    "flash_attn_func": (2, 3, 4, 6),
    "flash_attn_varlen_func": (6, 4, 6),
    "flash_attn_with_kvcache": (2, 3, 4, 6),
    "flash_attn_combine": (2, 5, 4, 8),
}


@dataclass(frozen=True)
class Bad:
    """Arguments that replace those of the function's base call, and what must come of them."""

    message: str
    kind: type[Exception]
    changes: dict[str, Any]


def wrong(message: str, kind: type[Exception] = ValueError, **changes: Any) -> Bad:
    return Bad(message, kind, changes)


def no_tensor(name: str, value: Any = "nonsense", optional: bool = True) -> Bad:
    kind = type(value).__name__
    need = "None or a torch.Tensor" if optional else "a torch.Tensor"
    return wrong(f"{name} is a {kind}; it must be {need}", TypeError, **{name: value})


def not_yet(*names: str, value: Any = Q) -> dict[str, list[Bad]]:
    return {
        name: [
            wrong(
                f"{name} is not available yet; leave it at its default", NotImplementedError, **{name: value}
            )
        ]
        for name in names
    }


def flag(name: str) -> list[Bad]:
    return [
        wrong(f"{name} is {value!r}; it must be True or False", TypeError, **{name: value})
        for value in (None, 1, "yes", torch.tensor(True))
    ]


def not_int(name: str) -> list[Bad]:
    return [
        wrong(f"{name} is {value!r}; it must be an int", TypeError, **{name: value})
        for value in (1.0, True, "1", [1], torch.tensor([1, 2]))
    ] + [wrong(f"{name} is {2**63}; it must fit 64 bits", **{name: 2**63})]


def inner_stride(t: torch.Tensor) -> torch.Tensor:
    """The same values, last dimension not contiguous."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def contiguous(name: str, t: torch.Tensor) -> Bad:
    bad = inner_stride(t)
    return wrong(
        f"{name} has last stride {bad.stride(-1)}; its last dimension must be contiguous", **{name: bad}
    )


def index_tensor(name: str, t: torch.Tensor, device: str = "the queries' device", **others: Any) -> list[Bad]:
    return [
        no_tensor(name, [0, 1]),
        wrong(f"{name} has dtype torch.int64; it must be int32", **{name: t.long()}, **others),
        wrong(f"{name} is on meta; it must be on {device} cpu", **{name: t.to("meta")}, **others),
        wrong(f"{name} has shape ({len(t)}, 1); it must be (", **{name: t.unsqueeze(1)}, **others),
        wrong(f"{name} has shape (); it must be (", **{name: t[0]}, **others),
        wrong(
            f"{name} has last stride 2; its last dimension must be contiguous",
            **{name: t.repeat_interleave(2)[::2]},
            **others,
        ),
    ]


FLOATS = "float16, bfloat16 or float32"
GRAD = "an input requires a gradient, and headfold has no backward yet; call it under torch.no_grad()"
SIDES = "it must be two of int or None, (left, right)"


def attention_errors(base: dict[str, Any]) -> dict[str, list[Bad]]:
    """The errors of the arguments that all attention functions share."""
    q, k, v = (base[name] for name in list(base)[:3])
    key, val = list(base)[1:3]
    out = torch.full((*q.shape[:-1], v.shape[-1]), NAN)
    return {
        "q": [
            no_tensor("q", None, optional=False),
            wrong(f"q has dtype torch.float64; it must be {FLOATS}", q=q.double()),
            wrong(f"q has dtype torch.int32; it must be {FLOATS}", q=q.int()),
            wrong("q has shape (); it must be (", q=q.sum()),
            wrong("q has shape (8); it must be (", q=q.flatten()[:8]),
            wrong("q has shape (1, 8); it must be (", q=q.flatten()[None, :8]),
            wrong("q has 3 heads; that must be a multiple of the 2 KV heads", q=q[..., :3, :]),
            wrong(
                "q has head dimension 257; it must be 1 to 256",
                **{"q": q[..., :1].repeat_interleave(257, -1), key: k[..., :1].repeat_interleave(257, -1)},
            ),
            contiguous("q", q),
            wrong(GRAD, NotImplementedError, q=q.clone().requires_grad_()),
        ],
        key: [
            no_tensor(key, 0, optional=False),
            wrong(f"{key} has dtype torch.float8_e4m3fn; it must be", **{key: k.to(torch.float8_e4m3fn)}),
            wrong(f"{key} has dtype torch.float16; it must have the queries' dtype", **{key: k.half()}),
            wrong(f"{key} is on meta; it must be on the queries' device cpu", **{key: k.to("meta")}),
            wrong(f"{key} has shape (); it must be (", **{key: k.sum()}),
            wrong(
                f"{key} has head dimension 4; it must equal the queries' head dimension 8",
                **{key: k[..., :4]},
            ),
            contiguous(key, k),
            wrong(GRAD, NotImplementedError, **{key: k.clone().requires_grad_()}),
        ],
        val: [
            no_tensor(val, (1, 2), optional=False),
            wrong(f"{val} has dtype torch.bfloat16; it must have the queries' dtype", **{val: v.bfloat16()}),
            wrong(f"{val} is on meta; it must be on the queries' device cpu", **{val: v.to("meta")}),
            wrong(f"{val} has shape (2, 6); it must be (", **{val: v.flatten()[:12].view(2, 6)}),
            wrong(f"all but its last size must equal {key}'s {tuple(k.shape)}", **{val: v[..., :1, :]}),
            wrong(
                f"{val} has head dimension 257; it must be 1 to 256",
                **{val: v[..., :1].repeat_interleave(257, -1)},
            ),
            contiguous(val, v),
            wrong(GRAD, NotImplementedError, **{val: v.clone().requires_grad_()}),
        ],
        "softmax_scale": [
            *(
                wrong(
                    f"softmax_scale is {value!r}; it must be None or a number", TypeError, softmax_scale=value
                )
                for value in ("1.0", True, torch.tensor(1.0))
            ),
            *(
                wrong(f"softmax_scale is {value}; it must be None or a finite number", softmax_scale=value)
                for value in (NAN, float("inf"), -float("inf"))
            ),
        ],
        "causal": flag("causal"),
        "window_size": [
            wrong(f"window_size is 5; {SIDES}", TypeError, window_size=5),
            wrong(f"window_size is None; {SIDES}", TypeError, window_size=None),
            wrong(f"window_size is '12'; {SIDES}", TypeError, window_size="12"),
            wrong("window_size has 3 entries; it must have two", window_size=(1, 2, 3)),
            wrong("window_size has 0 entries; it must have two", window_size=[]),
            wrong("window_size is 1.0; it must be an int", TypeError, window_size=(1.0, 2)),
            wrong("window_size is True; it must be an int", TypeError, window_size=(2, True)),
            wrong("window_size has left side -2; a side is None or -1 (open), or >= 0", window_size=(-2, 0)),
            wrong("window_size has right side -3; a side is None or -1 (open), or >= 0", window_size=(0, -3)),
            *(
                wrong("it must hold two integers on the CPU", window_size=value)
                for value in (torch.ones(2), ints(1), ints(1, 2, 3), ints(1, 2).to("meta"))
            ),
        ],
        "num_splits": [
            *not_int("num_splits"),
            wrong("num_splits is None; it must be an int", TypeError, num_splits=None),
            wrong("num_splits is -1; it must be 0 (automatic) to 256", num_splits=-1),
            wrong("num_splits is 257; it must be 0 (automatic) to 256", num_splits=257),
        ],
        "pack_gqa": [
            wrong(f"pack_gqa is {value!r}; it must be None, True or False", TypeError, pack_gqa=value)
            for value in (1, "auto")
        ],
        "sm_margin": [
            *not_int("sm_margin"),
            wrong("sm_margin is -1; it must be >= 0", sm_margin=-1),
        ],
        "out": [
            no_tensor("out"),
            wrong(f"out has shape {tuple(out[:1].shape)}; it must be {tuple(out.shape)}", out=out[:1]),
            wrong("out has dtype torch.float16; it must be torch.float32", out=out.half()),
            wrong("out is on meta; it must be on the queries' device cpu", out=out.to("meta")),
            contiguous("out", out),
            wrong(
                "out is expanded (a stride is 0); every element needs its own place",
                out=out[:1].expand_as(out),
            ),
        ],
        **not_yet("qv", "q_descale", "k_descale", "v_descale", "learnable_sink", "alibi_slopes"),
        **not_yet("tokens_per_split", value=16),
        "attention_chunk": [
            bad for value in (4, Q) for bad in not_yet("attention_chunk", value=value)["attention_chunk"]
        ],
        "softcap": [bad for value in (30.0, Q) for bad in not_yet("softcap", value=value)["softcap"]],
    }


def bound(name: str) -> list[Bad]:
    return [
        *not_int(name),
        wrong(f"{name} is -1; it must be None or an upper bound >= 0", **{name: -1}),
    ]


VARLEN = BASES["flash_attn_varlen_func"]
COMBINE = BASES["flash_attn_combine"]
PARTIALS, LSES = COMBINE["out_partial"], COMBINE["lse_partial"]
RAGGED_PARTIALS = {"out_partial": PARTIALS.flatten(1, 2), "lse_partial": LSES.flatten(1, 2), "out": None}

ERRORS: dict[str, dict[str, list[Bad]]] = {
    "flash_attn_func": {
        **attention_errors(BASES["flash_attn_func"]),
        "deterministic": flag("deterministic"),
        "return_attn_probs": flag("return_attn_probs"),
        "return_lse": flag("return_lse"),
    },
    "flash_attn_varlen_func": {
        **attention_errors(VARLEN),
        "deterministic": flag("deterministic"),
        "return_attn_probs": flag("return_attn_probs"),
        "return_lse": flag("return_lse"),
        "cu_seqlens_q": [
            *index_tensor("cu_seqlens_q", ints(0, 3, 6)),
            wrong("cu_seqlens_q is empty; it must hold batch + 1 offsets", cu_seqlens_q=ints()),
            wrong("q has shape (6, 4, 8); it must be (b, sq, h, d)", cu_seqlens_q=None),
        ],
        "cu_seqlens_k": [
            *index_tensor("cu_seqlens_k", ints(0, 5, 10)),
            wrong("cu_seqlens_k has shape (2); it must be (3) for this batch", cu_seqlens_k=ints(0, 10)),
            wrong("k has shape (10, 2, 8); it must be (b, sk, hk, d)", cu_seqlens_k=None),
        ],
        "seqused_q": [
            *index_tensor("seqused_q", ints(3, 3)),
            wrong("seqused_q has shape (3); it must be (2) for this batch", seqused_q=ints(1, 2, 3)),
        ],
        "seqused_k": [
            *index_tensor("seqused_k", ints(5, 5)),
            wrong("seqused_k has shape (1); it must be (2) for this batch", seqused_k=ints(1)),
            wrong(
                "seqused_k is None; a paged cache needs the length of every sequence",
                k=PAGES_K,
                v=PAGES_V,
                page_table=TABLE,
                cu_seqlens_k=None,
                seqused_k=None,
            ),
        ],
        "max_seqlen_q": [
            *bound("max_seqlen_q"),
            wrong(
                "max_seqlen_q is 2; every sequence has length 3, and it must bound them all",
                q=Q,
                cu_seqlens_q=None,
                max_seqlen_q=2,
                out=None,
            ),
        ],
        "max_seqlen_k": [
            *bound("max_seqlen_k"),
            wrong(
                "max_seqlen_k is 4; every sequence has length 5, and it must bound them all",
                k=K,
                v=V,
                cu_seqlens_k=None,
                max_seqlen_k=4,
            ),
        ],
        "page_table": [
            no_tensor("page_table", [[0]]),
            wrong("k has shape (10, 2, 8); it must be (pages, page_size, hk, d)", page_table=TABLE),
            *(
                wrong(message, k=PAGES_K, v=PAGES_V, page_table=table)
                for message, table in (
                    ("page_table has dtype torch.int64; it must be int32", TABLE.long()),
                    ("page_table is on meta; it must be on the queries' device cpu", TABLE.to("meta")),
                    ("page_table has shape (2); it must be (2, max_pages) for this batch", TABLE[0]),
                    ("page_table has shape (1, 2); it must be (2, max_pages) for this batch", TABLE[:1]),
                    (
                        "page_table has last stride 2; its last dimension must be contiguous",
                        inner_stride(TABLE),
                    ),
                )
            ),
        ],
    },
    "flash_attn_with_kvcache": {
        **attention_errors(BASES["flash_attn_with_kvcache"]),
        **not_yet(
            "k",
            "v",
            "rotary_cos",
            "rotary_sin",
            "cache_batch_idx",
            "cache_leftpad",
            "cu_seqlens_k_new",
            "rotary_seqlens",
            "scheduler_metadata",
            "tree_mask",
        ),
        "rotary_interleaved": flag("rotary_interleaved"),
        "return_softmax_lse": flag("return_softmax_lse"),
        "cache_seqlens": [
            *index_tensor("cache_seqlens", ints(5, 5))[1:],
            *(
                wrong(f"cache_seqlens is {value!r}; it must be an int", TypeError, cache_seqlens=value)
                for value in (2.0, True, [1, 2], "2")
            ),
            wrong("cache_seqlens has shape (3); it must be (2) for this batch", cache_seqlens=ints(1, 2, 3)),
            wrong("cache_seqlens is -1; the cache holds 0 to 5 keys", cache_seqlens=-1),
            wrong("cache_seqlens is 6; the cache holds 0 to 5 keys", cache_seqlens=6),
            wrong("cache_seqlens is -1; the page table has room for 0 to 8 keys", **PAGED, cache_seqlens=-1),
            wrong("cache_seqlens is 9; the page table has room for 0 to 8 keys", **PAGED, cache_seqlens=9),
            wrong("cache_seqlens is None; a paged cache needs the length of every sequence", **PAGED),
            # Other arguments are wrong, and an int length must not hide it.
            no_tensor("k_cache", None, optional=False),
            wrong(
                "k_cache is a NoneType; it must be a torch.Tensor", TypeError, k_cache=None, cache_seqlens=2
            ),
            wrong("k_cache has shape (2, 5, 16); it must be", k_cache=K.flatten(2), cache_seqlens=2),
            wrong("k_cache has shape (8); it must be", k_cache=K[0, 0, 0], cache_seqlens=-1),
            wrong("v_cache has shape (5, 2, 6); it must be", v_cache=V[0], cache_seqlens=2),
            wrong("v_cache has shape (2, 4, 2, 6); all but", v_cache=V[:, :4], cache_seqlens=2),
        ],
        "page_table": [
            no_tensor("page_table", [[0]]),
            wrong(
                "page_table is a list; it must be None or",
                TypeError,
                **{**PAGED, "page_table": [0]},
                cache_seqlens=2,
            ),
            *(
                wrong(message, **{**PAGED, "page_table": table}, cache_seqlens=length)
                for length in (2, ints(2, 2))
                for message, table in (
                    ("page_table has dtype torch.int64; it must be int32", TABLE.long()),
                    ("page_table is on meta; it must be on the queries' device cpu", TABLE.to("meta")),
                    ("page_table has shape (2); it must be (2, max_pages) for this batch", TABLE[0]),
                    ("page_table has shape (1, 2); it must be (2, max_pages) for this batch", TABLE[:1]),
                    (
                        "page_table has last stride 2; its last dimension must be contiguous",
                        inner_stride(TABLE),
                    ),
                )
            ),
        ],
        "cu_seqlens_q": [
            *index_tensor("cu_seqlens_q", ints(0, 3, 6), q=Q.flatten(0, 1), out=None),
            wrong(
                "q has shape (2, 3, 4, 8); it must be (total_q, h, d), since cu_seqlens_q is given",
                cu_seqlens_q=ints(0, 3, 6),
            ),
            wrong(
                "k_cache has batch 2; it must have the queries' batch 1",
                q=Q.flatten(0, 1),
                cu_seqlens_q=ints(0, 6),
                out=None,
            ),
        ],
        "max_seqlen_q": [
            *bound("max_seqlen_q"),
            wrong(
                "max_seqlen_q is 2; every sequence has length 3, and it must bound them all", max_seqlen_q=2
            ),
        ],
    },
    "flash_attn_combine": {
        "out_partial": [
            no_tensor("out_partial", [1.0], optional=False),
            wrong("out_partial has dtype torch.int32; it must be", out_partial=PARTIALS.int()),
            wrong("out_partial has dtype torch.float64; it must be", out_partial=PARTIALS.double()),
            wrong("out_partial has shape (5, 4, 8); it must be (splits, b", out_partial=PARTIALS[0, 0]),
            wrong(
                "out_partial has shape (3, 2, 5, 4, 8); it must be (splits, total, h, d)",
                cu_seqlens=ints(0, 2),
            ),
            wrong("out_partial has 0 splits; 1 to 256 can be merged", out_partial=PARTIALS[:0]),
            wrong(
                "out_partial has 257 splits; 1 to 256 can be merged",
                out_partial=PARTIALS[:1].repeat_interleave(257, 0),
            ),
            wrong(
                "out_partial has head dimension 257; it must be 1 to 256",
                out_partial=PARTIALS[..., :1].repeat_interleave(257, -1),
            ),
            wrong("out_partial has head dimension 0; it must be 1 to 256", out_partial=PARTIALS[..., :0]),
            contiguous("out_partial", PARTIALS),
            wrong(GRAD, NotImplementedError, out_partial=PARTIALS.clone().requires_grad_()),
        ],
        "lse_partial": [
            no_tensor("lse_partial", None, optional=False),
            wrong("lse_partial has dtype torch.float16; it must be float32", lse_partial=LSES.half()),
            wrong(
                "lse_partial is on meta; it must be on out_partial's device cpu", lse_partial=LSES.to("meta")
            ),
            wrong(
                "lse_partial has shape (3, 2, 4, 5); it must be out_partial's without its last size, (3, 2, 5, 4)",
                lse_partial=LSES.transpose(2, 3),
            ),
            wrong(GRAD, NotImplementedError, lse_partial=LSES.clone().requires_grad_()),
        ],
        "out": [
            no_tensor("out"),
            wrong("out has shape (2, 5, 4, 7); it must be (2, 5, 4, 8)", out=PARTIALS[0, ..., :7].clone()),
            wrong(
                "out has dtype torch.float64; it must be float16 or bfloat16 or float32",
                out=PARTIALS[0].double(),
            ),
            wrong("out is on meta; it must be on out_partial's device cpu", out=PARTIALS[0].to("meta")),
            contiguous("out", PARTIALS[0]),
            wrong("out is expanded (a stride is 0)", out=PARTIALS[0, :1].clone().expand(2, 5, 4, 8)),
        ],
        "out_dtype": [
            wrong("out_dtype is 'float16'; it must be None or a torch.dtype", TypeError, out_dtype="float16"),
            wrong("out_dtype is torch.int32; it must be None, float16", out_dtype=torch.int32, out=None),
            wrong("out_dtype is torch.float64; it must be None, float16", out_dtype=torch.float64, out=None),
            wrong(
                "out_dtype is torch.float16; with out given it must be None or torch.float32",
                out_dtype=torch.float16,
            ),
        ],
        "cu_seqlens": [
            *index_tensor("cu_seqlens", ints(0, 5, 10), "out_partial's device", **RAGGED_PARTIALS)[:3],
            wrong(
                "cu_seqlens has shape (); it must be (batch + 1,)", **RAGGED_PARTIALS, cu_seqlens=ints(0)[0]
            ),
            wrong("cu_seqlens has shape (0,); it must be (batch + 1,)", **RAGGED_PARTIALS, cu_seqlens=ints()),
            wrong(
                "cu_seqlens has last stride 2; its last dimension must be contiguous",
                **RAGGED_PARTIALS,
                cu_seqlens=ints(0, 0, 5, 5, 10, 10)[::2],
            ),
        ],
        "seqused": [
            no_tensor("seqused", [5, 5]),
            wrong("seqused has dtype torch.int64; it must be int32", seqused=ints(5, 5).long()),
            wrong(
                "seqused is on meta; it must be on out_partial's device cpu", seqused=ints(5, 5).to("meta")
            ),
            wrong("seqused has shape (3,); it must be (2,)", seqused=ints(5, 5, 5)),
            wrong("seqused has last stride 2; its last dimension", seqused=ints(5, 5, 5, 5)[::2]),
            wrong("seqused is given without cu_seqlens", **RAGGED_PARTIALS, seqused=ints(5, 5)),
        ],
        "return_lse": flag("return_lse"),
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_argument_has_an_error_test(name: str) -> None:
    assert set(ERRORS[name]) == set(inspect.signature(FUNCTIONS[name]).parameters)
    assert all(ERRORS[name].values())


@pytest.mark.parametrize(
    ("name", "bad"),
    [(name, bad) for name, errors in ERRORS.items() for bad in itertools.chain(*errors.values())],
    ids=[
        f"{name}-{argument}-{i}"
        for name, errors in ERRORS.items()
        for argument, cases in errors.items()
        for i in range(len(cases))
    ],
)
def test_bad_argument_is_refused_before_anything_is_written(
    name: str, bad: Bad, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, launch in ((backends, "run"), (ops, "run_combine")):
        monkeypatch.setattr(module, launch, lambda *a: pytest.fail("a kernel was launched"))
    out = torch.full(OUT_SHAPES[name], NAN)
    with pytest.raises(bad.kind) as error:
        FUNCTIONS[name](**{**BASES[name], "out": out, **bad.changes})
    assert type(error.value) is bad.kind
    assert str(error.value).startswith(f"{name}: ")
    assert bad.message in str(error.value)
    assert out.isnan().all()
    if "out" not in bad.changes and "with out given" not in bad.message:
        with pytest.raises(bad.kind) as without_out:
            FUNCTIONS[name](**{**BASES[name], **bad.changes})
        assert bad.message in str(without_out.value)


@pytest.mark.parametrize("name", SIGNATURES)
def test_base_call_of_the_error_tests_is_valid(name: str) -> None:
    out = torch.full(OUT_SHAPES[name], NAN)
    FUNCTIONS[name](**BASES[name], out=out)
    assert not out.isnan().any()


# ---- what reaches the operator ----------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The checked inputs of every call, which go no further."""
    calls: list[Inputs] = []
    monkeypatch.setattr(backends, "run", lambda x, out, lse: calls.append(x))
    return calls


ATTENTION = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


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


# ---- results ----------------------------------------------------------------------------------------------


def func(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return headfold.flash_attn_func(x.q, x.k, x.v, return_lse=True, **options)


def call(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_varlen_func, which takes every layout."""
    options = {"causal": x.window_right == 0 and x.window_left < 0, **options}
    if not options["causal"] and "window_size" not in options:
        options["window_size"] = (x.window_left, x.window_right)
    return headfold.flash_attn_varlen_func(
        x.q,
        x.k,
        x.v,
        x.cu_seqlens_q,
        x.cu_seqlens_k,
        x.max_seqlen_q,
        x.max_seqlen_k,
        x.seqused_q,
        x.seqused_k,
        x.softmax_scale,
        page_table=x.page_table,
        return_lse=True,
        **options,
    )


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


def kvcache(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return headfold.flash_attn_with_kvcache(
        x.q,
        x.k,
        x.v,
        **{
            "cache_seqlens": x.seqused_k,
            "page_table": x.page_table,
            "cu_seqlens_q": x.cu_seqlens_q,
            "max_seqlen_q": x.max_seqlen_q,
            "return_softmax_lse": True,
            **options,
        },
    )


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


Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]


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
