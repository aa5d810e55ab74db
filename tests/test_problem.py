"""What check() refuses and how it says it, what problem_of keeps, and what HEADFOLD_CHECK=1 reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headfold import ops, reference
from headfold.features import check_features
from headfold.problem import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    MAX_SEQLEN,
    Inputs,
    check,
    check_out,
    is_aligned,
    problem_of,
)
from headfold.values import check_values, value_checks_enabled
from tests.cases import NAN, make, poisoned

LAYOUTS = [(q, k) for q in ("dense", "ragged") for k in ("dense", "ragged", "paged")]


def dense() -> Inputs:
    """q (2, 3, 4, 16), k and v (2, 5, 2, 16)."""
    return make([3, 3], [5, 5], slack=0)


def ragged() -> Inputs:
    """q (9, 4, 16) in slots of 3 and 6, k and v (13, 2, 16) in slots of 8 and 5; with seqused."""
    return make([3, 3], [5, 5], q_layout="ragged", kv_layout="ragged")


def paged() -> Inputs:
    """q (2, 3, 4, 16), pages of 4 keys, a table (2, 3)."""
    return make([3, 3], [5, 6], kv_layout="paged", page_size=4)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_meta(x: Inputs) -> Inputs:
    return dataclasses.replace(
        x,
        **{
            f.name: getattr(x, f.name).to("meta")
            for f in dataclasses.fields(x)
            if isinstance(getattr(x, f.name), torch.Tensor)
        },
    )


# ---- check: every argument, every error -------------------------------------------------------------------

Change = Callable[[Inputs], dict[str, Any]]
NO_LAST_STRIDE = "its last dimension must be contiguous"


def swapped(name: str) -> Change:
    """The tensor with its last two dimensions stored in the other order."""
    return lambda x: {name: getattr(x, name).transpose(-1, -2).contiguous().transpose(-1, -2)}


def cast(name: str, dtype: torch.dtype) -> Change:
    return lambda x: {name: getattr(x, name).to(dtype)}


def moved(name: str) -> Change:
    return lambda x: {name: getattr(x, name).to("meta")}


def value(**changes: Any) -> Change:
    return lambda x: changes


FLOATS = "it must be float16 or bfloat16 or float32"


def featured() -> Inputs:
    """The dense call with everything that a dense call may have: 4 heads, rotary over 6 of 16 columns."""
    g = torch.Generator().manual_seed(0)
    return dataclasses.replace(
        dense(),
        sink=torch.randn(4, generator=g),
        alibi_slopes=torch.rand(2, 4, generator=g),
        mask=torch.zeros(2, 4, 3, 5),
        tree_mask=torch.ones(2, 3, 3, dtype=torch.bool),
        cache_batch_idx=ints(1, 0),
        cache_leftpad=ints(0, 1),
        rotary_cos=torch.rand(9, 3, generator=g),
        rotary_sin=torch.rand(9, 3, generator=g),
        rotary_positions=ints(5, 2),
    )


def grown() -> Inputs:
    """The dense call behind an append of two keys a sequence."""
    return dataclasses.replace(dense(), seqused_k=ints(5, 2), early_lengths=ints(4, 0), early_new=2)


def repeated(name: str) -> Change:
    """The tensor with every other element of its last dimension."""
    return lambda x: {name: getattr(x, name).repeat_interleave(2, -1)[..., ::2]}


INT32 = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")

# (layout, change, exception, the whole message after the caller's name)
ERRORS: dict[str, list[tuple[Callable[[], Inputs], Change, type[Exception], str]]] = {
    "q": [
        (dense, value(q=None), TypeError, "q is a NoneType; it must be a torch.Tensor"),
        (
            dense,
            cast("q", torch.int32),
            ValueError,
            "q has dtype torch.int32; it must be float16, bfloat16 or float32",
        ),
        (
            dense,
            cast("q", torch.float64),
            ValueError,
            "q has dtype torch.float64; it must be float16, bfloat16 or float32",
        ),
        (dense, swapped("q"), ValueError, f"q has last stride 4; {NO_LAST_STRIDE}"),
        (dense, value(q=torch.tensor(1.0)), ValueError, "q has shape (); it must be (b, sq, h, d)"),
        (
            dense,
            lambda x: {"q": x.q.flatten(0, 1)},
            ValueError,
            "q has shape (6, 4, 16); it must be (b, sq, h, d)",
        ),
        (
            ragged,
            lambda x: {"q": x.q[None]},
            ValueError,
            "q has shape (1, 9, 4, 16); it must be (total_q, h, d), since cu_seqlens_q is given",
        ),
        (dense, lambda x: {"q": x.q[:, :, :0]}, ValueError, "q has no heads; at least one head is needed"),
        (
            dense,
            lambda x: {"q": x.q[:, :, :3]},
            ValueError,
            "q has 3 heads; that must be a multiple of the 2 KV heads",
        ),
        (
            ragged,
            lambda x: {"q": x.q[:, :1]},
            ValueError,
            "q has 1 heads; that must be a multiple of the 2 KV heads",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 2 * MAX_GROUP + 2, 16)),
            ValueError,
            f"q has {MAX_GROUP + 1} heads per KV head; at most {MAX_GROUP} are supported",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 4, 0), k=torch.empty(2, 5, 2, 0)),
            ValueError,
            f"q has head dimension 0; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 4, 257), k=torch.empty(2, 5, 2, 257)),
            ValueError,
            f"q has head dimension 257; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            value(
                q=torch.empty(16).expand(2, MAX_SEQLEN + 1, 4, 16),
            ),
            ValueError,
            f"q has shape (2, {MAX_SEQLEN + 1}, 4, 16); a sequence may have at most {MAX_SEQLEN} queries",
        ),
        (
            ragged,
            value(
                q=torch.empty(16).expand(MAX_SEQLEN + 1, 4, 16),
            ),
            ValueError,
            f"q has shape ({MAX_SEQLEN + 1}, 4, 16); a sequence may have at most {MAX_SEQLEN} queries",
        ),
        (
            dense,
            lambda x: {"q": x.q.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "k": [
        (dense, value(k=[1.0]), TypeError, "k is a list; it must be a torch.Tensor"),
        (
            dense,
            cast("k", torch.float64),
            ValueError,
            "k has dtype torch.float64; it must be float16, bfloat16 or float32",
        ),
        (
            paged,
            cast("k", torch.float16),
            ValueError,
            "k has dtype torch.float16; it must have the queries' dtype torch.float32",
        ),
        (ragged, moved("k"), ValueError, "k is on meta; it must be on the queries' device cpu"),
        (dense, swapped("k"), ValueError, f"k has last stride 2; {NO_LAST_STRIDE}"),
        (
            dense,
            lambda x: {"k": x.k[0]},
            ValueError,
            "k has shape (5, 2, 16); it must be (b, sk, hk, d)",
        ),
        (
            ragged,
            lambda x: {"k": x.k[None]},
            ValueError,
            "k has shape (1, 13, 2, 16); it must be (total_k, hk, d), since cu_seqlens_k is given",
        ),
        (
            paged,
            lambda x: {"k": x.k[0]},
            ValueError,
            "k has shape (4, 2, 16); it must be (pages, page_size, hk, d), since page_table is given",
        ),
        (
            paged,
            lambda x: {"k": x.k[:, :0], "v": x.v[:, :0]},
            ValueError,
            "k has shape (6, 0, 2, 16); page_size must be at least 1",
        ),
        (
            dense,
            lambda x: {"k": x.k[:1], "v": x.v[:1]},
            ValueError,
            "k has batch 1; it must have the queries' batch 2",
        ),
        (
            dense,
            lambda x: {"k": x.k[:, :, :0], "v": x.v[:, :, :0]},
            ValueError,
            "k has no heads; at least one head is needed",
        ),
        (
            dense,
            lambda x: {"k": x.k[..., :8]},
            ValueError,
            "k has head dimension 8; it must equal the queries' head dimension 16",
        ),
        (
            dense,
            value(
                k=torch.empty(16).expand(2, MAX_SEQLEN + 1, 2, 16),
                v=torch.empty(16).expand(2, MAX_SEQLEN + 1, 2, 16),
            ),
            ValueError,
            f"k allows {MAX_SEQLEN + 1} keys; a sequence may have at most {MAX_SEQLEN}",
        ),
        (
            ragged,
            value(
                k=torch.empty(16).expand(MAX_SEQLEN + 1, 2, 16),
                v=torch.empty(16).expand(MAX_SEQLEN + 1, 2, 16),
            ),
            ValueError,
            f"k allows {MAX_SEQLEN + 1} keys; a sequence may have at most {MAX_SEQLEN}",
        ),
        (
            dense,
            lambda x: {"k": x.k.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "v": [
        (dense, value(v=3), TypeError, "v is a int; it must be a torch.Tensor"),
        (
            dense,
            cast("v", torch.bool),
            ValueError,
            "v has dtype torch.bool; it must be float16, bfloat16 or float32",
        ),
        (
            dense,
            cast("v", torch.bfloat16),
            ValueError,
            "v has dtype torch.bfloat16; it must have the queries' dtype torch.float32",
        ),
        (paged, moved("v"), ValueError, "v is on meta; it must be on the queries' device cpu"),
        (ragged, swapped("v"), ValueError, f"v has last stride 2; {NO_LAST_STRIDE}"),
        (
            dense,
            lambda x: {"v": x.v[0, 0]},
            ValueError,
            "v has shape (2, 16); it must be (b, sk, hk, d)",
        ),
        (
            ragged,
            lambda x: {"v": x.v[:5]},
            ValueError,
            "v has shape (5, 2, 16); all but its last size must equal k's (13, 2, 16)",
        ),
        (
            dense,
            lambda x: {"v": x.v[:, :, :1]},
            ValueError,
            "v has shape (2, 5, 1, 16); all but its last size must equal k's (2, 5, 2, 16)",
        ),
        (
            dense,
            value(v=torch.empty(2, 5, 2, 257)),
            ValueError,
            f"v has head dimension 257; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            lambda x: {"v": x.v[..., :0]},
            ValueError,
            f"v has head dimension 0; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            lambda x: {"v": x.v.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "cu_seqlens_q": [
        (
            ragged,
            value(cu_seqlens_q=torch.tensor(3, dtype=torch.int32)),
            ValueError,
            "cu_seqlens_q has shape (); it must be (batch + 1) for this batch",
        ),
        (
            ragged,
            value(cu_seqlens_q=ints()),
            ValueError,
            "cu_seqlens_q is empty; it must hold batch + 1 offsets",
        ),
        (
            lambda: make([3, 3], [5, 5], q_layout="ragged", slack=0),
            value(cu_seqlens_q=ints(0, 3)),
            ValueError,
            "k has batch 2; it must have the queries' batch 1",
        ),
    ],
    "cu_seqlens_k": [
        (
            ragged,
            value(cu_seqlens_k=ints(0, 13)),
            ValueError,
            "cu_seqlens_k has shape (2); it must be (3) for this batch",
        ),
        (
            ragged,
            value(cu_seqlens_k=ints()),
            ValueError,
            "cu_seqlens_k has shape (0); it must be (3) for this batch",
        ),
    ],
    "seqused_q": [
        (
            ragged,
            value(seqused_q=ints(1)),
            ValueError,
            "seqused_q has shape (1); it must be (2) for this batch",
        ),
        (
            dense,
            value(seqused_q=ints(1, 2)[None]),
            ValueError,
            "seqused_q has shape (1, 2); it must be (2) for this batch",
        ),
    ],
    "seqused_k": [
        (
            paged,
            value(seqused_k=ints(1, 2, 3)),
            ValueError,
            "seqused_k has shape (3); it must be (2) for this batch",
        ),
        (
            paged,
            value(seqused_k=None),
            ValueError,
            "seqused_k is None; a paged cache needs the length of every sequence",
        ),
    ],
    "page_table": [
        (paged, value(page_table=[[0]]), TypeError, "page_table is a list; it must be an int32 tensor"),
        (
            paged,
            cast("page_table", torch.int64),
            ValueError,
            "page_table has dtype torch.int64; it must be int32",
        ),
        (
            paged,
            moved("page_table"),
            ValueError,
            "page_table is on meta; it must be on the queries' device cpu",
        ),
        (
            paged,
            lambda x: {"page_table": x.page_table[0]},
            ValueError,
            "page_table has shape (3); it must be (2, max_pages) for this batch",
        ),
        (
            paged,
            lambda x: {"page_table": x.page_table[:1]},
            ValueError,
            "page_table has shape (1, 3); it must be (2, max_pages) for this batch",
        ),
        (paged, swapped("page_table"), ValueError, f"page_table has last stride 2; {NO_LAST_STRIDE}"),
    ],
    "max_seqlen_q": [
        (
            ragged,
            value(max_seqlen_q=-1),
            ValueError,
            "max_seqlen_q is -1; it must be None or an upper bound >= 0",
        ),
        (
            dense,
            value(max_seqlen_q=2),
            ValueError,
            "max_seqlen_q is 2; every sequence has length 3, and it must bound them all",
        ),
    ],
    "max_seqlen_k": [
        (
            paged,
            value(max_seqlen_k=-7),
            ValueError,
            "max_seqlen_k is -7; it must be None or an upper bound >= 0",
        ),
        (
            dense,
            value(max_seqlen_k=4),
            ValueError,
            "max_seqlen_k is 4; every sequence has length 5, and it must bound them all",
        ),
    ],
    "softmax_scale": [
        (
            dense,
            value(softmax_scale=bad),
            ValueError,
            f"softmax_scale is {bad}; it must be None or a finite number",
        )
        for bad in (NAN, float("inf"), float("-inf"))
    ],
    "window_left": [
        (
            dense,
            value(window_left=-2),
            ValueError,
            "window_size has left side -2; a side is None or -1 (open), or >= 0",
        )
    ],
    "window_right": [
        (
            dense,
            value(window_right=-9),
            ValueError,
            "window_size has right side -9; a side is None or -1 (open), or >= 0",
        )
    ],
    "num_splits": [
        (dense, value(num_splits=n), ValueError, f"num_splits is {n}; it must be 0 (automatic) to 256")
        for n in (-1, 257)
    ],
    "sm_margin": [(dense, value(sm_margin=-1), ValueError, "sm_margin is -1; it must be >= 0")],
    "softcap": [
        (dense, value(softcap=n), ValueError, f"softcap is {n}; it must be 0.0 (off) or a finite cap > 0")
        for n in (-1.0, NAN, float("inf"))
    ],
    "attention_chunk": [
        (
            dense,
            value(attention_chunk=n),
            ValueError,
            f"attention_chunk is {n}; it must be 0 (off) to {MAX_SEQLEN}",
        )
        for n in (-1, MAX_SEQLEN + 1)
    ],
    "tokens_per_split": [
        *(
            (
                dense,
                value(tokens_per_split=n),
                ValueError,
                f"tokens_per_split is {n}; it must be None or 1 to {MAX_SEQLEN}",
            )
            for n in (-1, MAX_SEQLEN + 1)
        ),
        (
            lambda: make([1], [513], slack=0),
            value(tokens_per_split=2),
            ValueError,
            "tokens_per_split is 2 for up to 513 keys; at most 256 splits can be merged, so it must be >= 3",
        ),
    ],
    "alibi_slopes": [
        (
            featured,
            lambda x: {"alibi_slopes": x.alibi_slopes[:1]},
            ValueError,
            "alibi_slopes has shape (1, 4); it must be (4,) or (2, 4)",
        ),
        (
            featured,
            cast("alibi_slopes", torch.bfloat16),
            ValueError,
            "alibi_slopes has dtype torch.bfloat16; it must be float32",
        ),
    ],
    "sink": [
        (
            featured,
            value(sink=torch.ones(2)),
            ValueError,
            "learnable_sink has shape (2,); it must be (4,)",
        ),
        (
            featured,
            cast("sink", torch.float64),
            ValueError,
            f"learnable_sink has dtype torch.float64; {FLOATS}",
        ),
    ],
    "mask": [
        (featured, value(mask=[0.0]), TypeError, "mask is a list; it must be a torch.Tensor"),
        (
            featured,
            cast("mask", torch.int32),
            ValueError,
            "mask has dtype torch.int32; it must be bool, float16, bfloat16 or float32",
        ),
        (featured, moved("mask"), ValueError, "mask is on meta; it must be on the queries' device cpu"),
        (
            featured,
            lambda x: {"mask": x.mask[:, :1]},
            ValueError,
            "mask has shape (2, 1, 3, 5); it must be (b, h, sq, sk) = (2, 4, 3, 5)",
        ),
        *(
            (
                base,
                value(mask=torch.zeros(2, 4, 3, 5)),
                ValueError,
                "mask is given for a ragged or paged call; q, k and v must be dense",
            )
            for base in (ragged, paged)
        ),
    ],
    "tree_mask": [
        (featured, value(tree_mask=True), TypeError, "tree_mask is a bool; it must be a torch.Tensor"),
        (
            featured,
            cast("tree_mask", torch.uint8),
            ValueError,
            "tree_mask has dtype torch.uint8; it must be bool (or packed bits, uint8)",
        ),
        (
            featured,
            moved("tree_mask"),
            ValueError,
            "tree_mask is on meta; it must be on the queries' device cpu",
        ),
        (
            featured,
            lambda x: {"tree_mask": x.tree_mask[:, :2, :2]},
            ValueError,
            "tree_mask has shape (2, 2, 2); it must be (b, sq, sq) = (2, 3, 3)",
        ),
        (featured, swapped("tree_mask"), ValueError, f"tree_mask has last stride 3; {NO_LAST_STRIDE}"),
    ],
    "cache_batch_idx": [
        (
            featured,
            value(cache_batch_idx=ints(1)),
            ValueError,
            "cache_batch_idx has shape (1,); it must be (2,)",
        ),
        (
            ragged,
            value(cache_batch_idx=ints(1, 0)),
            ValueError,
            "cache_batch_idx is given with cu_seqlens_k; it belongs to a dense or paged cache",
        ),
    ],
    "cache_leftpad": [
        (
            featured,
            value(cache_leftpad=ints(1, 1, 1)),
            ValueError,
            "cache_leftpad has shape (3,); it must be (2,)",
        ),
        (
            ragged,
            value(cache_leftpad=ints(1, 0)),
            ValueError,
            "cache_leftpad is given with cu_seqlens_k; it belongs to a dense or paged cache",
        ),
    ],
    "early_lengths": [
        (
            grown,
            value(early_lengths=ints(1, 1, 1)),
            ValueError,
            "early_lengths has shape (3,); it must be (2,)",
        ),
        (
            grown,
            value(seqused_k=None),
            ValueError,
            "early_lengths is given without seqused_k; it tells what that will hold",
        ),
    ],
    "early_new": [
        (grown, value(early_new=-1), ValueError, f"early_new is -1; it must be 0 to {MAX_SEQLEN}"),
        (grown, value(early_lengths=None), ValueError, "early_new is 2; it is added to early_lengths"),
    ],
    "rotary_cos": [],
    "rotary_sin": [
        (
            featured,
            lambda x: {"rotary_sin": x.rotary_sin[1:]},
            ValueError,
            "rotary_sin is (8, 3) torch.float32 with strides (3, 1); it must be laid out as rotary_cos, "
            "(9, 3) torch.float32",
        ),
        (
            lambda: dataclasses.replace(
                featured(), q=dense().q.half(), k=dense().k.half(), v=dense().v.half()
            ),
            cast("rotary_sin", torch.float16),
            ValueError,
            "rotary_sin is (9, 3) torch.float16 with strides (3, 1); it must be laid out as rotary_cos, "
            "(9, 3) torch.float32",
        ),
    ],
    "rotary_positions": [
        (
            featured,
            value(rotary_positions=None),
            ValueError,
            "rotary_positions is None; rotary_cos needs the position of every sequence",
        ),
        (
            featured,
            value(rotary_positions=ints(1)),
            ValueError,
            "rotary_positions has shape (1,); it must be (2,)",
        ),
    ],
}
for _name in ("rotary_cos", "rotary_sin"):
    ERRORS[_name] += [
        (
            featured,
            value(**{_name: None}),
            ValueError,
            f"{_name} is None; rotary_cos and rotary_sin come together",
        ),
        (featured, value(**{_name: 1.0}), TypeError, f"{_name} is a float; it must be a torch.Tensor"),
        (
            featured,
            cast(_name, torch.float16),
            ValueError,
            f"{_name} has dtype torch.float16; it must be torch.float32",
        ),
        (
            lambda: dataclasses.replace(
                featured(), q=dense().q.half(), k=dense().k.half(), v=dense().v.half()
            ),
            cast(_name, torch.bfloat16),
            ValueError,
            f"{_name} has dtype torch.bfloat16; it must be torch.float16 or torch.float32",
        ),
        (featured, moved(_name), ValueError, f"{_name} is on meta; it must be on the queries' device cpu"),
        (
            featured,
            lambda x, name=_name: {name: torch.ones(9, 9)},
            ValueError,
            f"{_name} has shape (9, 9); it must be (max_len, rotary_dim / 2) with rotary_dim <= 16",
        ),
        (featured, swapped(_name), ValueError, f"{_name} has last stride 9; {NO_LAST_STRIDE}"),
    ]
for _name in ("sink", "alibi_slopes", "cache_batch_idx", "cache_leftpad", "rotary_positions"):
    _called = "learnable_sink" if _name == "sink" else _name
    ERRORS[_name] += [
        (featured, value(**{_name: 7}), TypeError, f"{_called} is a int; it must be a torch.Tensor"),
        (featured, moved(_name), ValueError, f"{_called} is on meta; it must be on the queries' device cpu"),
        (featured, repeated(_name), ValueError, f"{_called} has last stride 2; {NO_LAST_STRIDE}"),
    ]
for _name in ("cache_batch_idx", "cache_leftpad", "rotary_positions"):
    ERRORS[_name].append(
        (featured, cast(_name, torch.int64), ValueError, f"{_name} has dtype torch.int64; it must be int32")
    )
ERRORS["early_lengths"] += [
    (grown, value(early_lengths=7), TypeError, "early_lengths is a int; it must be a torch.Tensor"),
    (
        grown,
        moved("early_lengths"),
        ValueError,
        "early_lengths is on meta; it must be on the queries' device cpu",
    ),
    (grown, repeated("early_lengths"), ValueError, f"early_lengths has last stride 2; {NO_LAST_STRIDE}"),
    (
        grown,
        cast("early_lengths", torch.int64),
        ValueError,
        "early_lengths has dtype torch.int64; it must be int32",
    ),
]
for _name in ("sink", "alibi_slopes", "mask", "rotary_cos", "rotary_sin"):
    ERRORS[_name].append(
        (
            featured,
            lambda x, name=_name: {name: getattr(x, name).clone().requires_grad_()},
            NotImplementedError,
            f"{'learnable_sink' if _name == 'sink' else _name} requires a gradient, and headfold has no backward "
            "yet; call it under torch.no_grad() or detach the inputs",
        )
    )
for _name in INT32:
    ERRORS[_name] += [
        (ragged, value(**{_name: [0, 3]}), TypeError, f"{_name} is a list; it must be an int32 tensor"),
        (ragged, cast(_name, torch.int64), ValueError, f"{_name} has dtype torch.int64; it must be int32"),
        (ragged, moved(_name), ValueError, f"{_name} is on meta; it must be on the queries' device cpu"),
        (
            ragged,
            lambda x, name=_name: {name: getattr(x, name).repeat_interleave(2)[::2]},
            ValueError,
            f"{_name} has last stride 2; {NO_LAST_STRIDE}",
        ),
    ]


def check_all(x: Inputs) -> None:
    check(x)
    check_features(x)


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


# ---- check_out --------------------------------------------------------------------------------------------


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


# ---- problem_of -------------------------------------------------------------------------------------------


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
@given(
    lens=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    layouts=st.sampled_from(LAYOUTS),
    slack=st.sampled_from([0, 3]),
    page_size=st.sampled_from([1, 4]),
)
def test_the_bounds_of_a_problem_hold(
    lens: list[tuple[int, int]], layouts: tuple[str, str], slack: int, page_size: int
) -> None:
    x = make(
        [q for q, _ in lens],
        [k for _, k in lens],
        q_layout=layouts[0],
        kv_layout=layouts[1],
        slack=slack,
        page_size=page_size,
    )
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


# ---- HEADFOLD_CHECK=1 -------------------------------------------------------------------------------------


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")


def page(i: int, j: int, entry: int) -> Change:
    def change(x: Inputs) -> dict[str, Any]:
        table = x.page_table.clone()
        table[i, j] = entry
        return {"page_table": table}

    return change


BAD_VALUES: list[tuple[Callable[[], Inputs], Change, str]] = [
    (ragged, value(cu_seqlens_q=ints(1, 3, 9)), "cu_seqlens_q [0] is 1; the first offset must be 0"),
    (ragged, value(cu_seqlens_k=ints(-1, 8, 13)), "cu_seqlens_k [0] is -1; the first offset must be 0"),
    (
        ragged,
        value(cu_seqlens_q=ints(0, 6, 3)),
        "cu_seqlens_q [2] is 3, below [1] = 6; offsets must not decrease",
    ),
    (
        ragged,
        value(cu_seqlens_k=ints(0, -8, 13)),
        "cu_seqlens_k [1] is -8, below [0] = 0; offsets must not decrease",
    ),
    (ragged, value(cu_seqlens_q=ints(0, 3, 10)), "cu_seqlens_q [2] is 10; only 9 rows are there"),
    (ragged, value(cu_seqlens_k=ints(0, 8, 14)), "cu_seqlens_k [2] is 14; only 13 rows are there"),
    (ragged, value(seqused_q=ints(4, 3)), "seqused_q [0] is 4; that sequence has room for 0 to 3"),
    (ragged, value(seqused_q=ints(3, -1)), "seqused_q [1] is -1; that sequence has room for 0 to 6"),
    (ragged, value(seqused_k=ints(5, 6)), "seqused_k [1] is 6; that sequence has room for 0 to 5"),
    (dense, value(seqused_q=ints(3, 4)), "seqused_q [1] is 4; that sequence has room for 0 to 3"),
    (dense, value(seqused_k=ints(6, 5)), "seqused_k [0] is 6; that sequence has room for 0 to 5"),
    (dense, value(seqused_k=ints(5, -2)), "seqused_k [1] is -2; that sequence has room for 0 to 5"),
    (paged, value(seqused_k=ints(5, 13)), "seqused_k [1] is 13; that sequence has room for 0 to 12"),
    (
        paged,
        value(seqused_k=None, cu_seqlens_k=ints(0, 5, 18)),
        "cu_seqlens_k gives sequence 1 13 keys; its row of page_table has room for 12",
    ),
    (
        ragged,
        value(seqused_q=None, max_seqlen_q=5),
        "max_seqlen_q is 5; sequence 1 has length 6, and it must bound them all",
    ),
    (
        ragged,
        value(seqused_k=None, max_seqlen_k=7),
        "max_seqlen_k is 7; sequence 0 has length 8, and it must bound them all",
    ),
    (
        dense,
        value(seqused_q=ints(1, 2), max_seqlen_q=1),
        "max_seqlen_q is 1; sequence 1 has length 2, and it must bound them all",
    ),
    (
        paged,
        value(max_seqlen_k=5),
        "max_seqlen_k is 5; sequence 1 has length 6, and it must bound them all",
    ),
    (paged, page(0, 1, 6), "page_table [0, 1] is 6; a page index must be 0 to 5"),
    (paged, page(1, 0, -1), "page_table [1, 0] is -1; a page index must be 0 to 5"),
    (
        paged,
        lambda x: {"seqused_k": None, "cu_seqlens_k": ints(0, 5, 11), **page(1, 1, 2**31 - 1)(x)},
        f"page_table [1, 1] is {2**31 - 1}; a page index must be 0 to 5",
    ),
]


def rotated(rows: int, *positions: int, advances: bool = True) -> Change:
    """Angles for positions 0 to rows - 1, and each sequence rotated from its own on."""
    return value(
        rotary_cos=torch.ones(rows, 3),
        rotary_sin=torch.ones(rows, 3),
        rotary_positions=ints(*positions),
        rotary_advances=advances,
    )


BAD_VALUES += [
    (dense, value(cache_batch_idx=ints(0, 2)), "cache_batch_idx [1] is 2; a row must be 0 to 1"),
    (paged, value(cache_batch_idx=ints(-1, 0)), "cache_batch_idx [0] is -1; a row must be 0 to 1"),
    (
        paged,
        lambda x: {"cache_batch_idx": ints(1, 0), "seqused_k": ints(5, 5), **page(0, 1, 9)(x)},
        "page_table [0, 1] is 9; a page index must be 0 to 5",
    ),
    (dense, value(cache_leftpad=ints(0, 6)), "cache_leftpad [1] is 6; that sequence has room for 0 to 5"),
    (
        dense,
        value(seqused_k=ints(4, 2), cache_leftpad=ints(4, 3)),
        "cache_leftpad [1] is 3; that sequence has room for 0 to 2",
    ),
    (
        grown,
        value(early_lengths=ints(3, 1)),
        "early_lengths [1] is 1; with early_new it must be what seqused_k holds, 2",
    ),
    (paged, value(cache_leftpad=ints(-1, 0)), "cache_leftpad [0] is -1; that sequence has room for 0 to 5"),
    (
        dense,
        rotated(9, 0, 7),
        "rotary_cos has 9 positions; the queries of sequence 1 are rotated at 7 to 9",
    ),
    (
        dense,
        rotated(9, 9, 0, advances=False),
        "rotary_cos has 9 positions; the queries of sequence 0 are rotated at 9 to 9",
    ),
    (
        ragged,
        rotated(9, -1, 0),
        "rotary_cos has 9 positions; the queries of sequence 0 are rotated at -1 to 1",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), BAD_VALUES, ids=[m[:30] for _, _, m in BAD_VALUES])
@pytest.mark.usefixtures("reading")
def test_check_values_names_the_entry_and_leaves_out_untouched(
    base: Callable[[], Inputs], change: Change, message: str
) -> None:
    x = base()
    x = dataclasses.replace(x, **change(x))
    check(x)
    out, lse = poisoned(x)
    with pytest.raises(ValueError) as error:
        ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert str(error.value) == f"attention: {message}"
    assert out.isnan().all()
    assert lse.isnan().all()
    with pytest.raises(ValueError) as again:
        ops.attention(**as_kwargs(x))
    assert str(again.value) == str(error.value)


def as_kwargs(x: Inputs) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


@settings(max_examples=60)
@given(
    lens=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4),
    layouts=st.sampled_from(LAYOUTS),
    slack=st.sampled_from([0, 3]),
    page_size=st.sampled_from([1, 4]),
)
def test_check_values_is_silent_on_valid_inputs(
    lens: list[tuple[int, int]], layouts: tuple[str, str], slack: int, page_size: int
) -> None:
    check_values(
        make(
            [q for q, _ in lens],
            [k for _, k in lens],
            q_layout=layouts[0],
            kv_layout=layouts[1],
            slack=slack,
            page_size=page_size,
        )
    )


def test_lengths_of_a_paged_cache_may_come_as_offsets_or_beside_them() -> None:
    """seqused_k wins over cu_seqlens_k, whose slots then bound nothing: the table does."""
    x = paged()
    check_values(dataclasses.replace(x, seqused_k=None, cu_seqlens_k=ints(0, 5, 11)))
    check_values(dataclasses.replace(x, cu_seqlens_k=ints(0, 1, 2)))


def test_values_that_just_fit_are_silent() -> None:
    x = dense()
    for change in (rotated(9, 6, 0), rotated(9, 8, 8, advances=False), value(cache_leftpad=ints(5, 0))):
        check_values(dataclasses.replace(x, **change(x)))
    nobody = make([0, 2], [5, 5], q_layout="ragged", kv_layout="paged", slack=0)
    check_values(dataclasses.replace(nobody, **rotated(9, 99, 7)(nobody)))
    # Pages that lie wholly before the first valid key are not read.
    table = page(1, 0, 2**31 - 1)(paged())["page_table"]
    check_values(dataclasses.replace(paged(), page_table=table, cache_leftpad=ints(0, 4)))


@pytest.mark.usefixtures("reading")
def test_valid_calls_run_under_value_checks() -> None:
    x = ragged()
    out, lse = poisoned(x)
    ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert not out[:3].isnan().any()


@pytest.mark.usefixtures("reading")
def test_bad_arguments_are_refused_before_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "check_values", lambda x: pytest.fail("values were read"))
    x = ragged()
    out, lse = poisoned(x)
    with pytest.raises(ValueError, match="num_splits"):
        ops.attention_out(**as_kwargs(dataclasses.replace(x, num_splits=-1)), out=out, lse=lse)
    with pytest.raises(ValueError, match="out has shape"):
        ops.attention_out(**as_kwargs(x), out=out[1:], lse=lse)


@pytest.mark.parametrize(("setting", "enabled"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_values_are_read_only_when_asked(
    setting: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is None:
        monkeypatch.delenv("HEADFOLD_CHECK", raising=False)
    else:
        monkeypatch.setenv("HEADFOLD_CHECK", setting)
    calls: list[Inputs] = []
    monkeypatch.setattr(ops, "check_values", calls.append)
    x = ragged()
    ops.attention(**as_kwargs(x))
    out, lse = poisoned(x)
    ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert len(calls) == (2 if enabled else 0)
    assert value_checks_enabled() is enabled


def test_checks_read_no_index_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """check and problem_of may look at an index tensor's metadata alone, on any device."""
    instances = (dense(), ragged(), paged())
    for name in ("tolist", "item", "cpu", "numpy", "__getitem__", "__bool__", "__int__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, _name=name, **k: pytest.fail(f"Tensor.{_name} was called")
        )
    for x in instances:
        check(x)
        problem_of(x)
