"""Valid calls, and what tests change of them to make them invalid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from headfold.features import check_features
from headfold.problem import (
    Inputs,
    check,
)
from tests.cases import make

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


@st.composite
def drawn_calls(draw: st.DrawFn) -> tuple[Inputs, list[tuple[int, int]]]:
    """(a valid call of any layout, the queries and keys of each of its sequences)."""
    lens = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=4))
    q_layout, kv_layout = draw(st.sampled_from(LAYOUTS))
    x = make(
        [q for q, _ in lens],
        [k for _, k in lens],
        q_layout=q_layout,
        kv_layout=kv_layout,
        slack=draw(st.sampled_from([0, 3])),
        page_size=draw(st.sampled_from([1, 4])),
    )
    return x, lens


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


def check_all(x: Inputs) -> None:
    check(x)
    check_features(x)
