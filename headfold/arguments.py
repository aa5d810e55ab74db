"""Arguments of the public functions: kinds, and what they mean to the operator."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from headfold import ops, prepared
from headfold.problem import Inputs, check_out
from headfold.values import check_values, value_checks_enabled

Window = Sequence[int | None] | torch.Tensor
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]

_DEFAULTS = {field.name: field.default for field in fields(Inputs)}


def run(
    tensors: tuple[torch.Tensor | None, ...],
    options: dict[str, Any],
    out: torch.Tensor | None,
    want_lse: bool,
    operators: tuple[Any, Any] = (ops.attention, ops.attention_out),
) -> Result:
    options = _given(options)
    new, into = operators
    if out is None:
        result, lse = new(*tensors, **options)
        return (result, lse) if want_lse else result
    q = tensors[0]
    assert q is not None
    ragged = len(tensors) > 3 and tensors[3] is not None
    lead, rows = (0, q.shape[:-1]) if ragged else (1, q.shape[1:-1])
    lse = q.new_empty((*q.shape[:lead], *reversed(rows)), dtype=torch.float32)
    into(*tensors, **options, out=out, lse=lse)
    return (out, lse) if want_lse else out


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not at the operator's defaults: telling PyTorch the others takes half as long again."""
    return {
        name: value
        for name, value in options.items()
        if value is not None and (type(value) not in (int, float, bool) or value != _DEFAULTS[name])
    }


def check_call(
    tensors: tuple[torch.Tensor | None, ...], options: dict[str, Any], out: torch.Tensor | None
) -> None:
    """Raise all that the operator would raise for these arguments, and launch nothing."""
    x = Inputs(*tensors, **options)  # type: ignore[arg-type]
    if torch.compiler.is_compiling() or type(x.q) is not torch.Tensor:  # a tracer's tensors lie nowhere
        _check_all(x, out)
    else:
        facts = ("checked", *prepared.facts_of(x, *(() if out is None else (out,))))
        if prepared.find(facts) is None:
            _check_all(x, out)
            prepared.keep(facts, True)
    if value_checks_enabled():
        check_values(x)


def _check_all(x: Inputs, out: torch.Tensor | None) -> None:
    ops.check_inputs(x)
    if out is not None:
        check_out(x, "out", out, x.out_shape, x.q.dtype)


def require_tensors(caller: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{caller}: {name} is a {type(value).__name__}; it must be a torch.Tensor")


def allow_tensors(caller: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{caller}: {name} is a {type(value).__name__}; it must be None or a torch.Tensor"
            )


def refuse(caller: str, **later: Any) -> None:
    for name, value in later.items():
        if value is not None:
            raise NotImplementedError(f"{caller}: {name} is not available yet; leave it at its default")


def check_flags(caller: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{caller}: {name} is {value!r}; it must be True or False")


def check_pack_gqa(caller: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{caller}: pack_gqa is {value!r}; it must be None, True or False")


def integer(caller: str, name: str, value: Any) -> int:
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    if isinstance(value, bool | float):
        raise TypeError(f"{caller}: {name} is {value!r}; it must be an int")
    # A symbolic int passes as it is: operator.index would make torch.compile specialise on its value.
    if not isinstance(value, int | torch.SymInt):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{caller}: {name} is {value!r}; it must be an int") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{caller}: {name} is {value}; it must fit 64 bits")
    return value


def number(caller: str, name: str, value: Any, need: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{caller}: {name} is {value!r}; it must be {need}")
    return float(value)


def window_sides(caller: str, window: Any, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for an open side; causal closes the right side at 0."""
    if type(window) is not tuple:
        window = _sides_of(caller, window)
    if len(window) != 2:
        raise ValueError(f"{caller}: window_size has {len(window)} entries; it must have two, (left, right)")
    left, right = (-1 if side is None else integer(caller, "window_size", side) for side in window)
    return left, 0 if causal else right


def _sides_of(caller: str, window: Any) -> Sequence[Any]:
    """The entries of a window that is no tuple."""
    if isinstance(window, torch.Tensor):
        if window.device.type != "cpu" or window.numel() != 2 or window.is_floating_point():
            raise ValueError(
                f"{caller}: window_size is a {window.dtype} tensor of shape {tuple(window.shape)} on {window.device}; "
                "it must hold two integers on the CPU"
            )
        return window.flatten().tolist()
    if isinstance(window, str) or not isinstance(window, Sequence):
        raise TypeError(f"{caller}: window_size is {window!r}; it must be two of int or None, (left, right)")
    return window


def features(
    caller: str,
    softcap: Any,
    attention_chunk: Any,
    tokens_per_split: Any,
    sink: Any,
    alibi_slopes: Any,
) -> dict[str, Any]:
    """The features that every function takes, as the operator's arguments."""
    allow_tensors(caller, learnable_sink=sink, alibi_slopes=alibi_slopes)
    split = 0 if tokens_per_split is None else integer(caller, "tokens_per_split", tokens_per_split)
    if tokens_per_split is not None and split < 1:
        raise ValueError(f"{caller}: tokens_per_split is {split}; it must be None or >= 1")
    return {
        "softcap": number(caller, "softcap", softcap, "a number, 0.0 for none"),
        "attention_chunk": integer(caller, "attention_chunk", attention_chunk),
        "tokens_per_split": split,
        "sink": sink,
        "alibi_slopes": alibi_slopes,
    }


def plain_options(
    caller: str,
    softmax_scale: Any,
    causal: bool,
    window_size: Any,
    num_splits: Any,
    pack_gqa: Any,
    sm_margin: Any,
) -> dict[str, Any]:
    """The arguments without tensors that every function takes, as the operator's."""
    check_pack_gqa(caller, pack_gqa)
    left, right = window_sides(caller, window_size, causal)
    if softmax_scale is not None:
        softmax_scale = number(caller, "softmax_scale", softmax_scale, "None or a number")
    return {
        "softmax_scale": softmax_scale,
        "window_left": left,
        "window_right": right,
        "num_splits": integer(caller, "num_splits", num_splits),
        "pack_gqa": pack_gqa,
        "sm_margin": integer(caller, "sm_margin", sm_margin),
        "caller": caller,
    }


def bound(caller: str, name: str, value: Any) -> int | None:
    """An upper bound of lengths: None or an int."""
    return None if value is None else integer(caller, name, value)
