"""Prepared calls: what checking and planning came to, kept for the calls that look the same.

A decoding step makes the same call thousands of times. Its checks and its plan look at shapes, strides, dtypes,
devices, alignments and numbers only, never at what a tensor holds: a call of which `facts_of` says what it said of an
earlier one passes the same checks and runs the same way. Looking that up takes 3 us, checking and planning about 30.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch

from headfold import backends
from headfold.problem import Inputs

Kept = TypeVar("Kept")

# A bound for programs that never make the same call twice; past it everything is forgotten and learnt again.
MOST = 4096
_kept: dict[tuple[Any, ...], Any] = {}


def tensor_fact(t: torch.Tensor) -> tuple[Any, ...]:
    """What checks, planner and launcher look at of a tensor."""
    return t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15, t.requires_grad


def tensor_facts(tensors: Iterable[torch.Tensor | None]) -> list[Any]:
    """The same of tensors of which some may not be there."""
    return [None if t is None else tensor_fact(t) for t in tensors]


def facts_of(x: Inputs, *results: torch.Tensor) -> tuple[Any, ...]:
    """Everything that checks, planner and launcher look at: a change of any of it makes another call."""
    tensors = (
        x.q,
        x.k,
        x.v,
        x.cu_seqlens_q,
        x.cu_seqlens_k,
        x.seqused_q,
        x.seqused_k,
        x.page_table,
        x.sink,
        x.alibi_slopes,
        x.mask,
        x.tree_mask,
        x.cache_batch_idx,
        x.cache_leftpad,
        x.rotary_cos,
        x.rotary_sin,
        x.rotary_positions,
        x.early_lengths,
        *x.tensors_besides(),
        *results,
    )
    return (
        *tensor_facts(tensors),
        torch.is_grad_enabled(),
        backends.forced(),
        x.max_seqlen_q,
        x.max_seqlen_k,
        x.softmax_scale,
        x.window_left,
        x.window_right,
        x.bottom_right,
        x.num_splits,
        x.pack_gqa,
        x.sm_margin,
        x.softcap,
        x.attention_chunk,
        x.tokens_per_split,
        x.rotary_interleaved,
        x.rotary_advances,
        x.early_new,
        x.caller,
    )


def find(facts: tuple[Any, ...]) -> Any:
    """What was kept of a call with these facts, None if there was none yet."""
    return _kept.get(facts)


def keep(facts: tuple[Any, ...], kept: Kept, store: dict[tuple[Any, ...], Any] = _kept) -> Kept:
    """Keep something of a checked call, in `store` or with the calls of the operators; returns it."""
    if len(store) >= MOST:
        store.clear()
    store[facts] = kept
    return kept
