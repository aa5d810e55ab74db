"""Wrong calls: a valid call of each function, and the errors that many arguments share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tests.interface.tensors import ints, rand

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
