"""merge_states: attention over parts of the keys, put together to attention over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from headfold import ops
from headfold.problem import DTYPES, MAX_HEAD_DIM, MAX_SPLITS

State = tuple[torch.Tensor, torch.Tensor]
_CALLER = "merge_states"


def merge_states(
    states: Sequence[State], out: torch.Tensor | None = None, lse: torch.Tensor | None = None
) -> State:
    """Merge the finished states of the same queries over different keys.

    A state is what the attention functions return with their LSE: shared prefix and own suffix, the steps of a
    ring, the ranks of a context-parallel group. Merging is exact up to float32 rounding, and merged states can be
    merged again. A sink must be in one of the states only: it is in that one's LSE.

    Args:
        states: any number >= 1 of pairs (out, lse), all of one shape: (b, sq, h, d) with (b, h, sq), or
            (total, h, d) with (h, total). Outputs are float16, bfloat16 or float32, not necessarily all the same,
            with d from 1 to 256; LSEs are float32, natural logarithm. Any strides. Where a state's LSE is -inf it
            saw no key, and its output is not read.
        out: where to write the output, of the states' shape and any of the dtypes; its last stride is 1. It may be
            one of the states' (merge in place). None makes a new one, in the dtype that the states promote to.
        lse: where to write the LSE, float32; it may be one of the states'. None makes a new one.

    Returns:
        (out, lse). Rows that no state saw are 0, with LSE -inf.

    Raises:
        TypeError: an argument that is not of the kind above.
        ValueError: a shape, dtype, device or stride that does not fit.
        NotImplementedError: a tensor that requires a gradient.

    The states are first copied side by side, since the kernel takes them from one tensor: that reads and writes
    each of them once more than the merge itself would.
    """
    dtype = _check(states, out, lse)
    while len(states) > MAX_SPLITS:
        groups = [states[i : i + MAX_SPLITS] for i in range(0, len(states), MAX_SPLITS)]
        states = [_merge(group, *_new_state(group[0], torch.float32)) for group in groups]
    new_out, new_lse = _new_state(states[0], dtype, out, lse)
    return _merge(states, new_out, new_lse)


def _merge(states: Sequence[State], out: torch.Tensor, lse: torch.Tensor) -> State:
    """Merge at most MAX_SPLITS checked states. The copies also make writing into one of them safe."""
    # torch.stack promotes outputs of different dtypes. The operator takes LSEs with heads last.
    out_partial = torch.stack([o for o, _ in states])
    lse_partial = torch.stack([s for _, s in states]).transpose(-1, -2)
    ops.combine_out(out_partial, lse_partial, out=out, lse=lse.transpose(-1, -2))
    return out, lse


def _new_state(
    like: State, dtype: torch.dtype, out: torch.Tensor | None = None, lse: torch.Tensor | None = None
) -> State:
    if out is None:
        out = like[0].new_empty(like[0].shape, dtype=dtype)
    if lse is None:
        lse = like[1].new_empty(like[1].shape)
    return out, lse


def _check(states: Any, out: Any, lse: Any) -> torch.dtype:
    """Raise on the first argument that does not fit; returns the dtype that the outputs promote to."""
    if isinstance(states, torch.Tensor | str) or not isinstance(states, Sequence):
        raise TypeError(f"{_CALLER}: states is a {type(states).__name__}; it must be a list of (out, lse)")
    if len(states) == 0:
        raise ValueError(f"{_CALLER}: states is empty; at least one state is needed")
    for i, state in enumerate(states):
        if isinstance(state, torch.Tensor | str) or not isinstance(state, Sequence) or len(state) != 2:
            raise TypeError(
                f"{_CALLER}: states[{i}] is a {type(state).__name__}; it must be a pair (out, lse)"
            )
    first = states[0][0]
    if isinstance(first, torch.Tensor) and first.dim() not in (3, 4):
        raise ValueError(
            f"{_CALLER}: states[0]'s out has shape {tuple(first.shape)}; it must be (b, sq, h, d) or (total, h, d)"
        )
    if isinstance(first, torch.Tensor) and not 1 <= first.shape[-1] <= MAX_HEAD_DIM:
        raise ValueError(
            f"{_CALLER}: states[0]'s out has head dimension {first.shape[-1]}; it must be 1 to {MAX_HEAD_DIM}"
        )
    for i, (o, s) in enumerate(states):
        _check_tensor(f"states[{i}]'s out", o, first, tuple(first.shape) if i else None, DTYPES)
        _check_tensor(f"states[{i}]'s lse", s, first, _lse_shape(first), (torch.float32,))
    for name, result, shape, dtypes in (
        ("out", out, tuple(first.shape), DTYPES),
        ("lse", lse, _lse_shape(first), (torch.float32,)),
    ):
        if result is None:
            continue
        _check_tensor(name, result, first, shape, dtypes)
        if any(n > 1 and s == 0 for n, s in zip(result.shape, result.stride(), strict=True)):
            raise ValueError(
                f"{_CALLER}: {name} is expanded (a stride is 0); every element needs its own place"
            )
    if out is not None and out.shape[-1] > 1 and out.stride(-1) != 1:
        raise ValueError(
            f"{_CALLER}: out has last stride {out.stride(-1)}; its last dimension must be contiguous"
        )
    return reduce(torch.promote_types, (o.dtype for o, _ in states))


def _lse_shape(out: torch.Tensor) -> tuple[int, ...]:
    *lead, rows, heads, _ = out.shape
    return (*lead, heads, rows)


def _check_tensor(
    name: str, t: Any, first: torch.Tensor, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{_CALLER}: {name} is a {type(t).__name__}; it must be a torch.Tensor")
    if shape is not None and tuple(t.shape) != shape:
        raise ValueError(
            f"{_CALLER}: {name} has shape {tuple(t.shape)}; it must be {shape}, as states[0] says"
        )
    if t.dtype not in dtypes:
        need = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{_CALLER}: {name} has dtype {t.dtype}; it must be {need}")
    if t.device != first.device:
        raise ValueError(f"{_CALLER}: {name} is on {t.device}; it must be on states[0]'s {first.device}")
    if torch.is_grad_enabled() and t.requires_grad:
        raise NotImplementedError(
            f"{_CALLER}: {name} requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach it"
        )
