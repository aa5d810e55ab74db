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
from headfold import append, backends, ops
from headfold.problem import MAX_SEQLEN, Inputs
from tests.cases import NAN, assert_accurate, make
from tests.conftest import CPU, Target

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
    "get_scheduler_metadata": """batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
        cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
        attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0""",
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


def bits(t: torch.Tensor) -> torch.Tensor:
    """A copy of every byte, which compares NaN too."""
    return t.detach().flatten().clone().view(torch.uint8)


Q, K, V = rand(2, 3, 4, 8), rand(2, 5, 2, 8), rand(2, 5, 2, 6)
PAGES_K, PAGES_V, TABLE = rand(4, 4, 2, 8), rand(4, 4, 2, 6), ints(0, 1, 2, 3).view(2, 2)
PAGED = {"k_cache": PAGES_K, "v_cache": PAGES_V, "page_table": TABLE}
# What an append needs besides: two new tokens a sequence, and room for them.
NEW_K, NEW_V, COS, SIN = rand(2, 2, 2, 8), rand(2, 2, 2, 6), rand(16, 3), rand(16, 3)
APPEND = {"k": NEW_K, "v": NEW_V, "cache_seqlens": ints(3, 1)}
RAGGED_NEW = {"k": NEW_K.flatten(0, 1), "v": NEW_V.flatten(0, 1), "cu_seqlens_k_new": ints(0, 1, 4)}
ROTARY = {"rotary_cos": COS, "rotary_sin": SIN, "cache_seqlens": ints(3, 1)}
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
    "get_scheduler_metadata": {
        "batch_size": 2,
        "max_seqlen_q": 1,
        "max_seqlen_k": 4096,
        "num_heads_q": 4,
        "num_heads_kv": 2,
        "headdim": 8,
        "cache_seqlens": ints(3, 4),
    },
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


def feature_tensor(name: str, t: torch.Tensor, dtypes: str, shapes: str, **others: Any) -> list[Bad]:
    """A tensor of one dimension that is checked beside the queries."""
    return [
        no_tensor(name, [0.5]),
        wrong(f"{name} has dtype torch.float64; it must be {dtypes}", **{**others, name: t.double()}),
        wrong(f"{name} is on meta; it must be on the queries' device cpu", **{**others, name: t.to("meta")}),
        wrong(
            f"{name} has shape ({len(t) + 1},); it must be {shapes}",
            **{**others, name: t.new_ones(len(t) + 1)},
        ),
        wrong(f"{name} has shape (); it must be {shapes}", **{**others, name: t[0]}),
        wrong(
            f"{name} has last stride 2; its last dimension must be contiguous",
            **{**others, name: t.repeat_interleave(2)[::2]},
        ),
    ]


def needs_gradient(name: str, t: torch.Tensor, **others: Any) -> Bad:
    message = f"{name} requires a gradient, and headfold has no backward yet; call it under torch.no_grad()"
    return wrong(message, NotImplementedError, **{**others, name: t.clone().requires_grad_()})


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


LONG_K, LONG_V = rand(2, 300, 2, 8), rand(2, 300, 2, 6)


def attention_errors(base: dict[str, Any], long: dict[str, Any]) -> dict[str, list[Bad]]:
    """The errors of the arguments that all attention functions share.

    Args:
        base: the function's valid call.
        long: what makes it one over 300 keys a sequence.
    """
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
        **not_yet("qv", "q_descale", "k_descale", "v_descale"),
        "learnable_sink": [
            *feature_tensor("learnable_sink", rand(4), "float16 or bfloat16 or float32", "(4,)"),
            needs_gradient("learnable_sink", rand(4)),
        ],
        "alibi_slopes": [
            *feature_tensor("alibi_slopes", rand(4), "float32", "(4,) or (2, 4)"),
            wrong("alibi_slopes has dtype torch.float16; it must be float32", alibi_slopes=rand(4).half()),
            wrong("alibi_slopes has shape (1, 4); it must be (4,) or (2, 4)", alibi_slopes=rand(1, 4)),
            needs_gradient("alibi_slopes", rand(2, 4)),
        ],
        "tokens_per_split": [
            *not_int("tokens_per_split"),
            *(
                wrong(f"tokens_per_split is {n}; it must be None or >= 1", tokens_per_split=n)
                for n in (0, -1)
            ),
            wrong(
                f"tokens_per_split is {MAX_SEQLEN + 1}; it must be None or 1 to {MAX_SEQLEN}",
                tokens_per_split=MAX_SEQLEN + 1,
            ),
            wrong(
                "tokens_per_split is 1 for up to 300 keys; at most 256 splits can be merged, so it must be >= 2",
                tokens_per_split=1,
                **long,
            ),
        ],
        "attention_chunk": [
            *not_int("attention_chunk"),
            *(
                wrong(
                    f"attention_chunk is {n}; it must be 0 (off) to {MAX_SEQLEN}",
                    attention_chunk=n,
                )
                for n in (-1, MAX_SEQLEN + 1)
            ),
        ],
        "softcap": [
            *(
                wrong(
                    f"softcap is {value!r}; it must be a number, 0.0 for none",
                    TypeError,
                    softcap=value,
                )
                for value in (None, "30", True, torch.tensor(30.0))
            ),
            *(
                wrong(f"softcap is {value}; it must be 0.0 (off) or a finite cap > 0", softcap=value)
                for value in (-1.0, NAN, float("inf"))
            ),
        ],
    }


def bound(name: str) -> list[Bad]:
    return [
        *not_int(name),
        wrong(f"{name} is -1; it must be None or an upper bound >= 0", **{name: -1}),
    ]


def with_append(**changes: Any) -> dict[str, Any]:
    return {**APPEND, **changes}


def new_tensor(name: str, t: torch.Tensor, cache: str) -> list[Bad]:
    """The errors of new keys or values."""
    other = "v" if name == "k" else "k"
    return [
        no_tensor(name),
        wrong(f"{name} is None; new k and v come together", **with_append(**{name: None})),
        wrong(f"{name} has dtype torch.int32; it must be float16 or", **with_append(**{name: t.int()})),
        wrong(
            f"{name} has dtype torch.float16; it must have k_cache's dtype torch.float32",
            **with_append(**{name: t.half()}),
        ),
        wrong(
            f"{name} is on meta; it must be on k_cache's device cpu", **with_append(**{name: t.to("meta")})
        ),
        wrong(f"{name} has shape (); it must be (b, s_new, hk, d)", **with_append(**{name: t.sum()})),
        wrong(f"{name} has shape (2, 2, {t.shape[-1]}); it must be (b", **with_append(**{name: t[0]})),
        wrong(
            f"{name} has shape {tuple(t.shape)}; it must be (total_new, hk, d), since cu_seqlens_k_new is given",
            **with_append(**{**RAGGED_NEW, name: t}),
        ),
        wrong("k has batch 1; it must have the queries' batch 2", **with_append(k=NEW_K[:1], v=NEW_V[:1])),
        wrong(
            f"{name} has shape (2, 2, 2, 5); its heads and head dimension must equal {cache}'s",
            **with_append(**{name: t[..., :5]}),
        ),
        wrong(
            "k has shape (2, 2, 1, 8); its heads and head dimension must equal k_cache's",
            **with_append(k=NEW_K[:, :, :1], v=NEW_V[:, :, :1]),
        ),
        wrong(
            "k has 6 tokens a sequence; the cache has room for 5",
            **with_append(k=rand(2, 6, 2, 8), v=rand(2, 6, 2, 6)),
        ),
        Bad(contiguous(name, t).message, ValueError, with_append(**contiguous(name, t).changes)),
        wrong(
            "an input requires a gradient, and an append in place has none",
            NotImplementedError,
            **with_append(**{name: t.clone().requires_grad_()}),
        ),
        # The other one is fine, and everything else about the call is checked too.
        wrong("num_splits is 300; it must be", **APPEND, num_splits=300),
        wrong("q has 3 heads; that must be a multiple", **APPEND, q=Q[:, :, :3], out=None),
        wrong(f"{other} is None; new k and v come together", **with_append(**{other: None})),
    ]


def angles(name: str, t: torch.Tensor) -> list[Bad]:
    """The errors of rotary_cos or rotary_sin, with and without new keys."""
    other = "rotary_sin" if name == "rotary_cos" else "rotary_cos"
    return [
        no_tensor(name),
        *(
            bad
            for base in (ROTARY, {**APPEND, **ROTARY})
            for bad in (
                wrong(f"{name} is None; rotary_cos and rotary_sin come together", **{**base, name: None}),
                wrong(
                    f"{name} has dtype torch.float16; it must be torch.float32", **{**base, name: t.half()}
                ),
                wrong(
                    f"{name} is on meta; it must be on the queries' device cpu",
                    **{**base, name: t.to("meta")},
                ),
                *(
                    wrong(
                        f"{name} has shape {tuple(value.shape)}; it must be (max_len, rotary_dim / 2) "
                        "with rotary_dim <= 8",
                        **{**base, name: value},
                    )
                    for value in (t[0], t[:, :0], rand(16, 5), t[None])
                ),
                wrong(
                    f"{name} has last stride 16; its last dimension must be contiguous",
                    **{**base, name: inner_stride(t)},
                ),
            )
        ),
        needs_gradient(name, t, **ROTARY),
        wrong(f"{other} is None; rotary_cos and rotary_sin come together", **{**ROTARY, other: None}),
    ]


def sizes(name: str, least: int, most: int | None) -> list[Bad]:
    need = f">= {least}" if most is None else f"{least} to {most}"
    values = [least - 1] if most is None else [least - 1, most + 1]
    return [*not_int(name), *(wrong(f"{name} is {n}; it must be {need}", **{name: n}) for n in values)]


TREE = torch.ones(2, 3, 3, dtype=torch.bool)
LENGTHS = "it must be int32 of shape (2,)"
METADATA_ERRORS: dict[str, list[Bad]] = {
    "batch_size": [
        *sizes("batch_size", 0, None),
        wrong(f"cache_seqlens is torch.int32 of shape (2,); {LENGTHS.replace('2,', '3,')}", batch_size=3),
    ],
    "max_seqlen_q": sizes("max_seqlen_q", 0, MAX_SEQLEN),
    "max_seqlen_k": sizes("max_seqlen_k", 0, MAX_SEQLEN),
    "max_seqlen_k_new": [
        *sizes("max_seqlen_k_new", 0, MAX_SEQLEN),
        wrong(f"with max_seqlen_k it may be at most {MAX_SEQLEN}", max_seqlen_k_new=MAX_SEQLEN),
    ],
    "num_heads_q": [
        *sizes("num_heads_q", 1, None),
        wrong("num_heads_q is 5; it must be a multiple of the 2 KV heads", num_heads_q=5),
        wrong(
            "num_heads_q is 514; it must be a multiple of the 2 KV heads, at most 256 times", num_heads_q=514
        ),
    ],
    "num_heads_kv": sizes("num_heads_kv", 1, None),
    "headdim": sizes("headdim", 1, 256),
    "headdim_v": sizes("headdim_v", 1, 256),
    "page_size": sizes("page_size", 1, MAX_SEQLEN),
    "attention_chunk": sizes("attention_chunk", 0, MAX_SEQLEN),
    "num_splits": sizes("num_splits", 0, 256),
    "sm_margin": sizes("sm_margin", 0, None),
    "cache_seqlens": [
        no_tensor("cache_seqlens", 5, optional=False),
        no_tensor("cache_seqlens", None, optional=False),
        wrong(f"cache_seqlens is torch.int64 of shape (2,); {LENGTHS}", cache_seqlens=ints(3, 4).long()),
        wrong(f"cache_seqlens is torch.int32 of shape (3,); {LENGTHS}", cache_seqlens=ints(3, 4, 5)),
        wrong(f"cache_seqlens is torch.int32 of shape (); {LENGTHS}", cache_seqlens=ints(3)[0]),
    ],
    "qkv_dtype": [
        *(
            wrong(f"qkv_dtype is {value!r}; it must be a torch.dtype", TypeError, qkv_dtype=value)
            for value in ("float16", None)
        ),
        wrong(f"qkv_dtype is torch.float64; it must be {FLOATS}", qkv_dtype=torch.float64),
    ],
    "cu_seqlens_q": [no_tensor("cu_seqlens_q", [0, 1])],
    "cu_seqlens_k_new": [no_tensor("cu_seqlens_k_new", 0)],
    "cache_leftpad": [no_tensor("cache_leftpad", (0, 1))],
    "causal": flag("causal"),
    "has_softcap": flag("has_softcap"),
    "window_size": [
        wrong(f"window_size is 5; {SIDES}", TypeError, window_size=5),
        wrong("window_size has 3 entries; it must have two", window_size=(1, 2, 3)),
        wrong("window_size is 1.5; it must be an int", TypeError, window_size=(1.5, 2)),
        wrong("window_size has left side -2; a side is None or -1 (open), or >= 0", window_size=(-2, 0)),
        wrong("window_size has right side -3; a side is None or -1 (open), or >= 0", window_size=(0, -3)),
        wrong("it must hold two integers on the CPU", window_size=torch.ones(2)),
    ],
    "pack_gqa": [
        wrong(f"pack_gqa is {value!r}; it must be None, True or False", TypeError, pack_gqa=value)
        for value in (1, "auto")
    ],
}

VARLEN = BASES["flash_attn_varlen_func"]
COMBINE = BASES["flash_attn_combine"]
PARTIALS, LSES = COMBINE["out_partial"], COMBINE["lse_partial"]
RAGGED_PARTIALS = {"out_partial": PARTIALS.flatten(1, 2), "lse_partial": LSES.flatten(1, 2), "out": None}

ERRORS: dict[str, dict[str, list[Bad]]] = {
    "flash_attn_func": {
        **attention_errors(BASES["flash_attn_func"], {"k": LONG_K, "v": LONG_V}),
        "deterministic": flag("deterministic"),
        "return_attn_probs": flag("return_attn_probs"),
        "return_lse": flag("return_lse"),
    },
    "flash_attn_varlen_func": {
        **attention_errors(
            VARLEN,
            {
                "k": LONG_K.flatten(0, 1),
                "v": LONG_V.flatten(0, 1),
                "cu_seqlens_k": ints(0, 300, 600),
                "max_seqlen_k": 300,
            },
        ),
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
        **attention_errors(BASES["flash_attn_with_kvcache"], {"k_cache": LONG_K, "v_cache": LONG_V}),
        "k": new_tensor("k", NEW_K, "k_cache"),
        "v": [
            *new_tensor("v", NEW_V, "v_cache"),
            wrong(
                "v has shape (2, 1, 2, 6); all but its last size must equal k's",
                **with_append(v=NEW_V[:, :1]),
            ),
        ],
        "cu_seqlens_k_new": [
            no_tensor("cu_seqlens_k_new", [0, 1]),
            wrong("cu_seqlens_k_new is given without k; it holds", cu_seqlens_k_new=ints(0, 1, 4)),
            *(
                wrong(
                    f"cu_seqlens_k_new {message}",
                    **{**RAGGED_NEW, "cu_seqlens_k_new": offsets},
                    cache_seqlens=2,
                )
                for message, offsets in (
                    ("has dtype torch.int64; it must be int32", ints(0, 1, 4).long()),
                    ("is on meta; it must be on k_cache's device cpu", ints(0, 1, 4).to("meta")),
                    ("has shape (2); it must be (3) for this batch", ints(0, 4)),
                    ("has shape (0); it must be (3) for this batch", ints()),
                    ("has shape (); it must be (b + 1,)", ints(0)[0]),
                    ("has shape (3, 1); it must be (b + 1,)", ints(0, 1, 4)[:, None]),
                    (
                        "has last stride 2; its last dimension must be contiguous",
                        ints(0, 0, 1, 1, 4, 4)[::2],
                    ),
                )
            ),
        ],
        "rotary_cos": angles("rotary_cos", COS),
        "rotary_sin": [
            *angles("rotary_sin", SIN),
            wrong(
                "rotary_sin is (15, 3) torch.float32 with strides (3, 1); it must be laid out as rotary_cos",
                **{**ROTARY, "rotary_sin": SIN[1:]},
            ),
            wrong(
                "rotary_sin is (16, 3) torch.float32 with strides (4, 1); it must be laid out as rotary_cos",
                **{**ROTARY, "rotary_sin": rand(16, 4)[:, :3]},
            ),
        ],
        "rotary_seqlens": [
            *index_tensor("rotary_seqlens", ints(2, 0), **ROTARY),
            *index_tensor("rotary_seqlens", ints(2, 0), **ROTARY, k=NEW_K, v=NEW_V)[1:],
            wrong("rotary_seqlens has shape (3,); it must be (2,)", **ROTARY, rotary_seqlens=ints(1, 2, 3)),
            wrong("rotary_seqlens is given without rotary_cos and rotary_sin", rotary_seqlens=ints(1, 2)),
            wrong(
                "rotary_seqlens is None; rotary_cos needs the position of every sequence",
                rotary_cos=COS,
                rotary_sin=SIN,
            ),
        ],
        "cache_batch_idx": [
            *index_tensor("cache_batch_idx", ints(1, 0)),
            *index_tensor("cache_batch_idx", ints(1, 0), **APPEND)[1:],
            wrong("cache_batch_idx has shape (3,); it must be (2,)", cache_batch_idx=ints(0, 1, 1)),
        ],
        "cache_leftpad": [
            *index_tensor("cache_leftpad", ints(1, 0)),
            *index_tensor("cache_leftpad", ints(1, 0), cache_seqlens=2)[1:],
            wrong("cache_leftpad has shape (1,); it must be (2,)", cache_leftpad=ints(0)),
        ],
        "scheduler_metadata": [
            wrong(
                f"scheduler_metadata is a {type(value).__name__}; it must be what get_scheduler_metadata returned",
                TypeError,
                scheduler_metadata=value,
            )
            for value in (ints(1, 2), 4, {})
        ],
        "tree_mask": [
            no_tensor("tree_mask", [[True]]),
            wrong("tree_mask has dtype torch.float32; it must be bool (or packed", tree_mask=TREE.float()),
            wrong("tree_mask is on meta; it must be on the queries' device cpu", tree_mask=TREE.to("meta")),
            *(
                wrong(
                    f"tree_mask has shape {tuple(tree.shape)}; it must be (b, sq, sq) = (2, 3, 3)",
                    tree_mask=tree,
                )
                for tree in (TREE[:1], TREE[0], TREE[:, :2, :2], TREE[:, :2], TREE[..., None])
            ),
            contiguous("tree_mask", TREE),
            *(
                wrong(
                    f"tree_mask has shape {shape}; packed bits must be (b, sq, ceil(sq / 8)) with b = 2 and sq >= 3",
                    tree_mask=torch.ones(shape, dtype=torch.uint8),
                )
                for shape in ((2, 3, 3), (2, 2, 1), (1, 3, 1), (3, 1), (2, 9, 1), ())
            ),
            # The queries are wrong, and packed bits must not hide it.
            wrong("q has shape (8); it must be (", q=Q[0, 0, 0], tree_mask=TREE.byte()[..., :1]),
        ],
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
            wrong("cache_seqlens is None; appending needs to know where", k=NEW_K, v=NEW_V),
            *(
                wrong(message, **{**APPEND, **more, "cache_seqlens": length})
                for message, more, length in (
                    ("cache_seqlens is -1; there is room for 0 to 5 keys", {}, -1),
                    ("cache_seqlens is 4; there is room for 0 to 5 keys, 2 of them new", {}, 4),
                    ("cache_seqlens is 7; there is room for 0 to 8 keys, 2 of them new", PAGED, 7),
                    ("cache_seqlens is 6; there is room for 0 to 5 keys", RAGGED_NEW, 6),
                    ("cache_seqlens has dtype torch.int64; it must be int32", {}, ints(3, 1).long()),
                    ("cache_seqlens has shape (3); it must be (2) for this batch", {}, ints(1, 2, 3)),
                )
            ),
            *(
                wrong(
                    f"cache_seqlens is {n}; there is room for 0 to 5 keys",
                    cache_leftpad=ints(0, 0),
                    cache_seqlens=n,
                )
                for n in (-1, 6)
            ),
            wrong("q has shape (); it must be (", q=Q.sum(), **{**ROTARY, "cache_seqlens": 2}),
            wrong("q has shape (); it must be (", q=Q.sum(), **PAGED, cache_seqlens=2),
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
    "get_scheduler_metadata": METADATA_ERRORS,
}
# Caches that cannot be appended to, or not beside these queries.
for _cache, _t in (("k_cache", K), ("v_cache", V)):
    ERRORS["flash_attn_with_kvcache"][_cache] += [
        wrong(f"{_cache} is expanded (a stride is 0)", **with_append(**{_cache: _t[:1].expand_as(_t)})),
        wrong(GRAD, NotImplementedError, **with_append(**{_cache: _t.clone().requires_grad_()})),
    ]


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
    for module, launch in ((backends, "run"), (ops, "run_combine"), (append, "append_on_cpu")):
        monkeypatch.setattr(module, launch, lambda *a: pytest.fail("a kernel was launched"))
    out = {"out": torch.full(OUT_SHAPES[name], NAN)} if name in OUT_SHAPES else {}
    arguments = {**BASES[name], **out, **bad.changes}
    tensors = [t for t in arguments.values() if isinstance(t, torch.Tensor) and not t.is_meta]
    before = [bits(t) for t in tensors]
    with pytest.raises(bad.kind) as error:
        FUNCTIONS[name](**arguments)
    assert type(error.value) is bad.kind
    assert str(error.value).startswith(f"{name}: ")
    assert bad.message in str(error.value)
    assert all(torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True))
    if out and "out" not in bad.changes and "with out given" not in bad.message:
        with pytest.raises(bad.kind) as without_out:
            FUNCTIONS[name](**{**BASES[name], **bad.changes})
        assert bad.message in str(without_out.value)


@pytest.mark.parametrize(
    "more", [{}, APPEND, {**APPEND, **ROTARY}, {**APPEND, **RAGGED_NEW}, {**APPEND, **PAGED}]
)
def test_appends_of_the_error_tests_are_valid(more: dict[str, Any]) -> None:
    more = {n: t.clone() if "cache" in n else t for n, t in more.items()}
    out = headfold.flash_attn_with_kvcache(**{"q": Q, "k_cache": K.clone(), "v_cache": V.clone(), **more})
    assert not out.isnan().any()


@pytest.mark.parametrize("name", OUT_SHAPES)
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


# ---- features through every function ----------------------------------------------------------------------

# Fields of Inputs, by the name that the public functions give the argument.
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "attention_chunk": {"attention_chunk": 5},
    "tokens_per_split": {"tokens_per_split": 16},
    "learnable_sink": {"sink": rand(4)},
    "learnable_sink in half precision": {"sink": rand(4).half()},
    "alibi_slopes": {"alibi_slopes": rand(4).abs()},
    "alibi_slopes of each sequence": {"alibi_slopes": rand(2, 4).abs()},
    "all": {
        "softcap": 1.5,
        "attention_chunk": 16,
        "tokens_per_split": 16,
        "sink": rand(4),
        "alibi_slopes": rand(2, 4).abs(),
    },
}


def given(x: Inputs) -> dict[str, Any]:
    """The feature arguments of x, as the public functions call them."""
    values = {
        "softcap": x.softcap or None,
        "attention_chunk": x.attention_chunk or None,
        "tokens_per_split": x.tokens_per_split or None,
        "learnable_sink": x.sink,
        "alibi_slopes": x.alibi_slopes,
    }
    return {name: value for name, value in values.items() if value is not None}


def placed(fields: dict[str, Any], device: str) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize(
    ("run", "q_layout", "kv_layout"),
    [
        (func, "dense", "dense"),
        (call, "ragged", "ragged"),
        (call, "dense", "paged"),
        (kvcache, "dense", "paged"),
    ],
    ids=["func", "varlen", "varlen paged", "kvcache"],
)
def test_features(target: Target, run: Run, q_layout: str, kv_layout: str, fields: dict[str, Any]) -> None:
    x = make(
        [2, 2],
        [23, 23] if run is func else [23, 4],
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=5,
        causal=True,
        slack=0,
        device=target.device,
    )
    x = dataclasses.replace(x, **placed(fields, target.device))
    factor = 3.0 if x.softcap else 2.0
    out = torch.full(x.out_shape, NAN, device=target.device) if len(fields) > 1 else None
    got, lse = run(x, causal=True, out=out, **given(x))
    assert_accurate(x, got, lse, factor)


def test_every_feature_argument_has_a_result_test() -> None:
    x = make([1], [1])
    tested = {name for fields in FEATURES.values() for name in given(dataclasses.replace(x, **fields))}
    for function in ATTENTION:
        keyword_only = {
            p.name
            for p in inspect.signature(FUNCTIONS[function]).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        assert keyword_only - {"out", "return_lse", "page_table", "tree_mask"} <= tested


def test_a_sequence_of_fixed_splits_has_the_same_bits_in_any_batch(target: Target) -> None:
    x = make([1, 1, 1], [60, 33, 7], kv_layout="paged", page_size=4, device=target.device)
    out, lse = kvcache(x, tokens_per_split=16)
    assert x.seqused_k is not None
    assert x.page_table is not None
    for i in range(3):
        alone = dataclasses.replace(
            x, q=x.q[i : i + 1], page_table=x.page_table[i : i + 1], seqused_k=x.seqused_k[i : i + 1]
        )
        one, one_lse = kvcache(alone, tokens_per_split=16)
        assert torch.equal(one[0], out[i])
        assert torch.equal(one_lse[0], lse[i])


def test_a_row_without_a_key_gives_zero_and_the_sink(target: Target) -> None:
    x = make([2, 2], [0, 0], slack=0, device=target.device)
    sink = rand(4).to(target.device)
    out, lse = func(x, learnable_sink=sink)
    assert not out.any()
    assert torch.equal(lse, sink.view(1, 4, 1).expand(2, 4, 2))


# ---- a cache that is appended to, rotated, picked from, padded and masked ---------------------------------


@dataclass
class Step:
    """A decoding step: what flash_attn_with_kvcache gets, over caches whose unused bytes are NaN."""

    tensors: dict[str, torch.Tensor]
    counts: list[int]
    rotary: dict[str, Any]
    options: dict[str, Any]

    @property
    def lengths(self) -> torch.Tensor:
        """Keys of each sequence after the append."""
        seqlens = self.tensors["cache_seqlens"]
        return (seqlens + torch.tensor(self.counts, device=seqlens.device)).int()

    def caches(self) -> dict[str, torch.Tensor]:
        return {n: self.tensors[n].clone() for n in ("k_cache", "v_cache")}

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**self.tensors, **self.rotary, **self.options, "return_softmax_lse": True, **changes}
        return headfold.flash_attn_with_kvcache(**arguments)

    def run_after(self, caches: dict[str, torch.Tensor], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The same attention where the new keys are in the caches already."""
        positions = self.rotary.get("rotary_seqlens", self.tensors["cache_seqlens"]) if self.rotary else None
        new = {"k": None, "v": None, "cu_seqlens_k_new": None, "cache_seqlens": self.lengths}
        return self.run(**{**caches, **new, "rotary_seqlens": positions, **changes})

    def inputs(self, caches: dict[str, torch.Tensor]) -> Inputs:
        """That attention as the reference takes it."""
        t, o = self.tensors, self.options
        rotary = {}
        if self.rotary:
            rotary = {
                "rotary_cos": self.rotary["rotary_cos"],
                "rotary_sin": self.rotary["rotary_sin"],
                "rotary_positions": self.rotary.get("rotary_seqlens", t["cache_seqlens"]),
                "rotary_interleaved": self.rotary["rotary_interleaved"],
                "rotary_advances": o.get("causal", False) or "window_size" in o,
            }
        left, right = o.get("window_size", (-1, -1))
        return Inputs(
            t["q"],
            caches["k_cache"],
            caches["v_cache"],
            cu_seqlens_q=t.get("cu_seqlens_q"),
            seqused_k=self.lengths,
            page_table=t.get("page_table"),
            window_left=left,
            window_right=0 if o.get("causal") else right,
            tree_mask=o.get("tree_mask"),
            cache_batch_idx=t.get("cache_batch_idx"),
            cache_leftpad=t.get("cache_leftpad"),
            **rotary,
        )


def step(
    starts: list[int],
    counts: list[int],
    device: str,
    *,
    page_size: int = 0,
    ragged_new: bool = False,
    ragged_q: bool = False,
    rotary_dim: int = 0,
    interleaved: bool = True,
    rotary_at: list[int] | None = None,
    rows: list[int] | None = None,
    leftpad: list[int] | None = None,
    sq: int = 2,
    capacity: int = 24,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Step:
    g = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, d, dv = len(starts), 4, 2, 16, 8
    at = list(range(batch)) if rows is None else rows
    there = max(at) + 1
    tensors: dict[str, torch.Tensor] = {}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if page_size:
        per = capacity // page_size
        tensors["page_table"] = torch.randperm(there * per, generator=g, dtype=torch.int32).view(there, per)
        shape = (there * per, page_size)
    else:
        shape = (there, capacity)
    k_cache, v_cache = (torch.full((*shape, kv_heads, n), NAN, dtype=dtype) for n in (d, dv))
    for i, row in enumerate(at):
        for j in range(leftpad[i] if leftpad else 0, starts[i]):
            place = (tensors["page_table"][row, j // page_size], j % page_size) if page_size else (row, j)
            k_cache[place], v_cache[place] = randn(kv_heads, d), randn(kv_heads, dv)
    new = (sum(counts),) if ragged_new else (batch, counts[0])
    tensors |= {
        "q": randn(batch, sq, heads, d),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": randn(*new, kv_heads, d),
        "v": randn(*new, kv_heads, dv),
        "cache_seqlens": ints(*starts),
    }
    if ragged_q:
        tensors |= {"q": tensors["q"].flatten(0, 1), "cu_seqlens_q": ints(*range(0, batch * sq + 1, sq))}
        options["max_seqlen_q"] = sq
    if ragged_new:
        tensors["cu_seqlens_k_new"] = ints(*itertools.accumulate(counts, initial=0))
    if rows is not None:
        tensors["cache_batch_idx"] = ints(*rows)
    if leftpad is not None:
        tensors["cache_leftpad"] = ints(*leftpad)
    rotary: dict[str, Any] = {}
    if rotary_dim:
        angles = torch.rand(40, rotary_dim // 2, generator=g) * 6.3
        rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
        if rotary_at is not None:
            rotary["rotary_seqlens"] = ints(*rotary_at)
    return Step(placed(tensors, device), counts, placed(rotary, device), placed(options, device))


STEPS: dict[str, dict[str, Any]] = {
    "dense": {"starts": [5, 17], "counts": [2, 2], "causal": True},
    "dense, empty cache": {"starts": [0, 3], "counts": [3, 3], "causal": True, "rotary_dim": 16},
    "dense, rotated": {"starts": [5, 17], "counts": [2, 2], "causal": True, "rotary_dim": 12},
    "dense, rotated halves": {
        "starts": [5, 17],
        "counts": [2, 2],
        "causal": True,
        "rotary_dim": 12,
        "interleaved": False,
    },
    "no causal: all queries rotate at one position": {"starts": [5, 17], "counts": [2, 2], "rotary_dim": 16},
    "window": {"starts": [5, 17], "counts": [2, 2], "rotary_dim": 16, "window_size": (6, 0)},
    "rotary_seqlens": {
        "starts": [5, 17],
        "counts": [2, 2],
        "rotary_dim": 16,
        "rotary_at": [30, 0],
        "causal": True,
    },
    "paged": {
        "starts": [5, 17],
        "counts": [2, 2],
        "page_size": 4,
        "rotary_dim": 16,
        "interleaved": False,
        "causal": True,
    },
    "ragged new": {"starts": [5, 17], "counts": [4, 1], "ragged_new": True, "rotary_dim": 12, "causal": True},
    "paged, ragged new and ragged queries": {
        "starts": [3, 17],
        "counts": [0, 6],
        "page_size": 3,
        "ragged_new": True,
        "ragged_q": True,
        "rotary_dim": 12,
        "causal": True,
    },
    "rows": {"starts": [5, 17], "counts": [2, 2], "rows": [3, 1], "causal": True, "rotary_dim": 16},
    "rows of a table": {"starts": [5, 17], "counts": [2, 2], "rows": [2, 0], "page_size": 4, "causal": True},
    "left padding": {
        "starts": [5, 17],
        "counts": [2, 2],
        "leftpad": [2, 11],
        "causal": True,
        "rotary_dim": 12,
    },
    "left padding of pages": {
        "starts": [5, 17],
        "counts": [2, 2],
        "leftpad": [0, 11],
        "page_size": 4,
        "causal": True,
        "rotary_dim": 12,
    },
    "tree": {
        "starts": [5, 17],
        "counts": [3, 3],
        "sq": 3,
        "tree_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool().expand(2, 3, 3),
        "rotary_dim": 16,
    },
    "everything": {
        "starts": [5, 17],
        "counts": [4, 3],
        "sq": 3,
        "page_size": 4,
        "ragged_new": True,
        "rows": [2, 0],
        "leftpad": [1, 6],
        "rotary_dim": 12,
        "interleaved": False,
        "rotary_at": [9, 2],
        "tree_mask": torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]]).bool().expand(2, 3, 3),
        "window_size": (20, 5),
    },
}


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_an_append_then_attends_to_what_it_wrote(target: Target, case: dict[str, Any]) -> None:
    s = step(device=target.device, **case)
    caches, expected = s.caches(), s.caches()
    new = {n: s.tensors.get(n) for n in ("cu_seqlens_k_new", "page_table", "cache_batch_idx")}
    t = s.tensors
    append.reference_append(
        append.AppendInputs(
            **expected, k=t["k"], v=t["v"], cache_seqlens=t["cache_seqlens"], **new, **s.rotary
        )
    )
    untouched = {n: x.clone() for n, x in t.items()}
    out, lse = s.run(**caches)
    torch.testing.assert_close(caches, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(bits(caches["v_cache"]), bits(expected["v_cache"]))
    for name, value in untouched.items():
        assert torch.equal(bits(t[name]), bits(value)), f"{name} was written"
    assert_accurate(s.inputs(caches), out, lse)
    after, lse_after = s.run_after(caches)
    assert torch.equal(out, after)
    assert torch.equal(lse, lse_after)


def test_an_append_writes_into_out(target: Target) -> None:
    s = step([5, 17], [2, 2], target.device, causal=True)
    expected, _ = s.run(**s.caches())
    out = torch.full_like(expected, NAN)
    got, _ = s.run(**s.caches(), out=out)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(s.run(**s.caches(), return_softmax_lse=False), expected)


@pytest.mark.parametrize("page_size", [0, 4])
def test_one_length_for_all_is_as_good_as_a_tensor_of_it(target: Target, page_size: int) -> None:
    s = step([7, 7], [2, 2], target.device, page_size=page_size, rotary_dim=16, leftpad=[0, 3], causal=True)
    caches, again = s.caches(), s.caches()
    out, lse = s.run(**caches)
    one, one_lse = s.run(**again, cache_seqlens=7)
    assert torch.equal(out, one)
    assert torch.equal(lse, one_lse)
    assert all(torch.equal(bits(caches[n]), bits(again[n])) for n in caches)
    # Without new keys too, where a dense cache may be a shorter view: another plan, the same meaning.
    for rotary in (s.rotary, {}):
        read = dataclasses.replace(s, rotary=rotary)
        assert_accurate(read.inputs(caches), *read.run_after(caches, cache_seqlens=9))


def pack(tree: torch.Tensor) -> torch.Tensor:
    """Bits of the last dimension, least significant first."""
    padded = torch.nn.functional.pad(tree.byte(), (0, -tree.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=tree.device)).sum(-1, dtype=torch.uint8)


@pytest.mark.parametrize("ragged_q", [False, True])
@pytest.mark.parametrize("sq", [1, 3, 8, 9])
def test_a_tree_of_bits_is_a_tree_of_bools(target: Target, sq: int, ragged_q: bool) -> None:
    tree = torch.rand(2, sq, sq, generator=torch.Generator().manual_seed(1)) < 0.5
    s = step([4, 11], [sq, sq], target.device, sq=sq, ragged_q=ragged_q, tree_mask=tree)
    caches = s.caches()
    out, lse = s.run(**caches)
    assert_accurate(s.inputs(caches), out, lse)
    packed, packed_lse = s.run(**s.caches(), tree_mask=pack(s.options["tree_mask"]))
    assert torch.equal(out, packed)
    assert torch.equal(lse, packed_lse)


def test_a_tree_over_all_keys_there_are(target: Target) -> None:
    """More queries than keys: the first queries of the tree have none of their own."""
    tree = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    s = step([0, 1], [1, 1], target.device, sq=3, tree_mask=tree)
    caches = s.caches()
    assert_accurate(s.inputs(caches), *s.run(**caches))


def test_a_window_of_an_append_may_be_a_tensor(target: Target) -> None:
    s = step([5, 17], [2, 2], target.device, rotary_dim=16, window_size=(6, 1))
    out, lse = s.run(**s.caches())
    again, lse_again = s.run(**s.caches(), window_size=torch.tensor([6, 1]))
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("length", [9, None])
def test_a_padded_cache_without_a_tensor_of_lengths(target: Target, length: int | None) -> None:
    x = make([2, 2], [9, 9], slack=0, causal=True, device=target.device)
    pads = torch.tensor([3, 9], dtype=torch.int32, device=target.device)
    padded = dataclasses.replace(x, cache_leftpad=pads)
    assert_accurate(padded, *kvcache(x, causal=True, cache_seqlens=length, cache_leftpad=pads))


def test_several_sequences_may_read_one_row(target: Target) -> None:
    x = make([1, 1], [9, 9], slack=0, device=target.device)
    rows = torch.tensor([1, 1], dtype=torch.int32, device=target.device)
    out, lse = kvcache(x, cache_batch_idx=rows)
    assert_accurate(dataclasses.replace(x, cache_batch_idx=rows), out, lse)


def test_a_call_without_new_keys_rotates_the_queries_alone(target: Target) -> None:
    s = step([5, 17], [0, 0], target.device, rotary_dim=12, interleaved=False, causal=True)
    caches = s.caches()
    out, lse = s.run(**caches, k=None, v=None)
    assert_accurate(s.inputs(caches), out, lse)
    assert all(torch.equal(bits(caches[n]), bits(s.tensors[n])) for n in caches)


# (message, how the step is made, what is then wrong with it)
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no room": (r"cache_seqlens \[1\] is 23; sequence 1 gets 2", {"starts": [5, 23]}, {}),
    "no page": (
        r"page_table \[0, 1\] is 77; a page index must be 0 to 11",
        {"page_size": 4},
        {"page_table": ints(0, 77, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11).view(2, 6)},
    ),
    "one page for two": (
        r"page_table \[1, 4\] is 1; sequence 0 is appended to the same page",
        {"page_size": 4},
        {"page_table": ints(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 11).view(2, 6)},
    ),
    "one row for two": (r"cache_batch_idx \[1\] is 0; sequence 0 is appended to", {"rows": [0, 0]}, {}),
    "no row": (
        r"cache_batch_idx \[0\] is 9; a row must be 0 to 1",
        {"rows": [0, 1]},
        {"cache_batch_idx": ints(9, 0)},
    ),
    "no angle": (
        r"rotary_cos has 18 positions; the queries of sequence 1 are rotated at 17 to 18",
        {"rotary_dim": 16},
        {"rotary_cos": rand(18, 8), "rotary_sin": rand(18, 8)},
    ),
    "no angle for new keys": (
        r"rotary_cos has 18 positions; sequence 1 is rotated at 17 to 18",
        {"rotary_dim": 16, "sq": 1},
        {"rotary_cos": rand(18, 8), "rotary_sin": rand(18, 8)},
    ),
    "padding": (
        r"cache_leftpad \[0\] is 6; that sequence has room for 0 to 5",
        {},
        {"cache_leftpad": ints(6, 0)},
    ),
    "offsets": (
        r"cu_seqlens_k_new \[2\] is 5; k has 4 tokens",
        {"ragged_new": True},
        {"cu_seqlens_k_new": ints(0, 2, 5)},
    ),
}


@pytest.mark.parametrize(("message", "case", "changes"), REFUSED.values(), ids=REFUSED)
def test_an_append_refused_for_its_values_changes_no_byte(
    target: Target,
    message: str,
    case: dict[str, Any],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    s = step(**{"starts": [5, 17], "counts": [2, 2], "causal": True, **case}, device=target.device)
    caches = s.caches()
    out = torch.full((*s.tensors["q"].shape[:-1], 8), NAN, device=target.device)
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"):
        s.run(**{**caches, **placed(changes, target.device), "out": out})
    assert all(torch.equal(bits(caches[n]), bits(s.tensors[n])) for n in caches)
    assert out.isnan().all()


@pytest.mark.parametrize("case", ["paged, ragged new and ragged queries", "everything"])
def test_valid_appends_run_under_value_checks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    s = step(device="cpu", **STEPS[case])
    with CPU.running():
        out, _ = s.run(**s.caches())
    assert not out.isnan().any()


# ---- scheduler metadata -----------------------------------------------------------------------------------


def metadata(s: Step, longest: int, **options: Any) -> Any:
    t = s.tensors
    b, sq, h, d = t["q"].shape
    return headfold.get_scheduler_metadata(
        b,
        sq,
        longest,
        h,
        t["k_cache"].shape[2],
        d,
        t["cache_seqlens"],
        t["q"].dtype,
        t["v_cache"].shape[3],
        **options,
    )


@pytest.mark.parametrize("page_size", [None, 16])
def test_scheduler_metadata_serves_every_step_within_its_bounds(
    target: Target, page_size: int | None
) -> None:
    s = step([3, 40], [1, 1], target.device, sq=1, capacity=96, page_size=page_size or 0, causal=True)
    lengths = s.tensors["cache_seqlens"]
    planned = metadata(s, 95, max_seqlen_k_new=1, page_size=page_size, causal=True)
    caches = s.caches()
    for i in range(2):
        s.tensors["cache_seqlens"] = lengths + i
        out, lse = s.run(**caches, scheduler_metadata=planned)
        assert_accurate(s.inputs(caches), out, lse)
    # Without it the call plans from its capacity. Planned from the lengths that there are, it means the same.
    exact = metadata(s, int(s.lengths.max()), page_size=page_size, causal=True)
    for plan in (None, exact):
        assert_accurate(s.inputs(caches), *s.run_after(caches, scheduler_metadata=plan))


@pytest.mark.parametrize("paged", [False, True])
def test_scheduler_metadata_plans_what_the_call_would(
    kernels: Target, paged: bool, seen: list[Inputs]
) -> None:
    q = torch.zeros(2, 1, 8, 64, dtype=torch.float16)
    cache = q.new_zeros(1024, 16, 2, 64) if paged else q.new_zeros(2, 8192, 2, 64)
    table = {"page_table": torch.arange(1024, dtype=torch.int32).view(2, 512)} if paged else {}
    planned = headfold.get_scheduler_metadata(
        2, 1, 8192, 8, 2, 64, ints(0, 0), torch.float16, page_size=16 if paged else None, causal=True
    )
    headfold.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=ints(9, 300), causal=True, **table)
    assert backends.plan_of(seen[0])[1].num_splits == planned.num_splits > 1


def test_scheduler_metadata_decides_the_splits_unless_the_call_forces_them(seen: list[Inputs]) -> None:
    lengths = ints(3, 1)
    planned = headfold.get_scheduler_metadata(2, 3, 5, 4, 2, 8, lengths, torch.float32, num_splits=7)
    assert planned.num_splits == 7
    for options in ({}, {"num_splits": 3}):
        headfold.flash_attn_with_kvcache(
            Q, K, V, cache_seqlens=lengths, scheduler_metadata=planned, **options
        )
    assert [x.num_splits for x in seen] == [7, 3]


def test_scheduler_metadata_reads_nothing_from_the_device(kernels: Target) -> None:
    meta = ints(3, 4).to("meta")
    on_meta = headfold.get_scheduler_metadata(
        2, 1, 8192, 8, 2, 64, meta, cu_seqlens_q=meta, cu_seqlens_k_new=meta, cache_leftpad=meta
    )
    real = headfold.get_scheduler_metadata(2, 1, 8192, 8, 2, 64, ints(9, 99), cu_seqlens_q=ints(0, 1, 2))
    assert on_meta.num_splits == real.num_splits > 1


def test_scheduler_metadata_follows_its_bounds(kernels: Target) -> None:
    def splits(**changes: Any) -> int:
        arguments = {
            "batch_size": 1,
            "max_seqlen_q": 1,
            "max_seqlen_k": 8192,
            "num_heads_q": 8,
            "num_heads_kv": 2,
            "headdim": 64,
            "cache_seqlens": ints(5),
        }
        return headfold.get_scheduler_metadata(**{**arguments, **changes}).num_splits

    long = splits()
    assert long > 1
    assert splits(max_seqlen_k=64) < long
    assert splits(max_seqlen_k=0, max_seqlen_k_new=8192) == long
    assert splits(window_size=(32, 0)) < long
    assert splits(window_size=torch.tensor([32, 0])) < long
    assert splits(attention_chunk=32) < long
    assert splits(batch_size=64, cache_seqlens=torch.zeros(64, dtype=torch.int32)) < long
    assert splits(sm_margin=10**6) < long
    assert splits(num_splits=5) == 5
    assert splits(max_seqlen_q=4096, causal=True) == 0  # nothing to split: left to the call
    assert splits(max_seqlen_k=0) == 0
    for same in ({"has_softcap": True}, {"headdim_v": 64}, {"pack_gqa": True}, {"qkv_dtype": torch.float16}):
        assert splits(**same) == long
