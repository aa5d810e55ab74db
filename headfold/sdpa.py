"""scaled_dot_product_attention with PyTorch's own meaning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias, CausalVariant

from headfold import ops

_CALLER = "scaled_dot_product_attention"


class MaskError(ValueError, RuntimeError):
    """A mask that contradicts another argument; PyTorch raises a RuntimeError there."""


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """PyTorch's `torch.nn.functional.scaled_dot_product_attention`, grouped heads folded.

    Args:
        query: (..., h, sq, d); key: (..., hk, sk, d); value: (..., hk, sk, dv), float16, bfloat16 or float32.
            Leading dimensions broadcast against each other, as do heads of size 1.
        attn_mask: bool (keep where True) or floating point (added to the scaled scores), broadcast to
            (..., h, sq, sk), any strides; or torch.nn.attention.bias.causal_lower_right / causal_upper_left.
        dropout_p: must be 0.0.
        is_causal: query i sees key j iff j <= i (top-left, as PyTorch; the flash_attn functions are bottom-right).
        scale: factor on the scores; None is d**-0.5.
        enable_gqa: query head i reads KV head i // (h // hk).

    Returns:
        (..., h, sq, dv) in query's dtype. A row that sees no key is 0. Tensors are read where they lie, but for
        two or more leading dimensions that do not merge, and a last dimension that is not contiguous.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
        MaskError: is_causal together with a mask (a ValueError, and a RuntimeError as PyTorch's).
        NotImplementedError: dropout, or an input that requires a gradient.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(
            f"{_CALLER}: dropout_p is {dropout_p}; attention here has no dropout, it must be 0.0"
        )
    if not isinstance(is_causal, bool) or not isinstance(enable_gqa, bool):
        raise TypeError(
            f"{_CALLER}: is_causal is {is_causal!r} and enable_gqa {enable_gqa!r}; both must be bool"
        )
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat)):
        raise TypeError(f"{_CALLER}: scale is {scale!r}; it must be None or a number")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{_CALLER}: {name} is a {type(t).__name__}; it must be a torch.Tensor")
        if t.dim() < 2:
            raise ValueError(f"{_CALLER}: {name} has shape {tuple(t.shape)}; it must be (..., length, dim)")
    if value.shape[-2] != key.shape[-2]:
        raise ValueError(f"{_CALLER}: value has length {value.shape[-2]}; it must have key's {key.shape[-2]}")
    right, bottom_right, mask = _mask_sides(query, key, attn_mask, is_causal)
    lead = _leading(query, key, value, enable_gqa)
    k_heads = max(_heads(key), _heads(value))
    q = _to_rows(query, lead, _heads(query) if enable_gqa else max(_heads(query), k_heads))
    out, _ = ops.attention(
        q,
        _to_rows(key, lead, k_heads),
        _to_rows(value, lead, k_heads),
        softmax_scale=None if scale is None else float(scale),
        window_right=right,
        bottom_right=bottom_right,
        mask=None if mask is None else _to_mask(mask, (*lead, q.shape[2], query.shape[-2], key.shape[-2])),
        caller=_CALLER,
    )
    heads = () if max(query.dim(), key.dim(), value.dim()) < 3 else (q.shape[2],)
    return out.transpose(1, 2).reshape(*lead, *heads, query.shape[-2], value.shape[-1])


def _mask_sides(
    query: torch.Tensor, key: torch.Tensor, attn_mask: Any, is_causal: bool
) -> tuple[int, bool, torch.Tensor | None]:
    """(right side of the window, whether it is aligned bottom-right, mask tensor)."""
    if attn_mask is None:
        return (0 if is_causal else -1), False, None
    if not isinstance(attn_mask, torch.Tensor):
        raise TypeError(
            f"{_CALLER}: attn_mask is a {type(attn_mask).__name__}; it must be None or a torch.Tensor"
        )
    if is_causal:
        raise MaskError(f"{_CALLER}: attn_mask is given with is_causal=True; it must be None then")
    if isinstance(attn_mask, CausalBias):
        shape, got = (query.shape[-2], key.shape[-2]), (attn_mask.seq_len_q, attn_mask.seq_len_kv)
        if shape != got:
            raise ValueError(
                f"{_CALLER}: attn_mask is a causal bias for lengths {got}; it must be for {shape}"
            )
        return 0, attn_mask.variant == CausalVariant.LOWER_RIGHT, None
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise ValueError(
            f"{_CALLER}: attn_mask has dtype {attn_mask.dtype}; it must be bool or floating point"
        )
    if attn_mask.device != query.device:
        raise ValueError(
            f"{_CALLER}: attn_mask is on {attn_mask.device}; it must be on query's {query.device}"
        )
    return -1, False, attn_mask


def _to_mask(mask: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The mask as (batch, h, sq, sk), broadcast without a copy for up to one leading dimension."""
    try:
        full = mask.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{_CALLER}: attn_mask has shape {tuple(mask.shape)}; it must broadcast to {tuple(shape)}"
        ) from None
    return full.reshape(math.prod(shape[:-3]), *shape[-3:])


def _heads(t: torch.Tensor) -> int:
    return t.shape[-3] if t.dim() > 2 else 1


def _leading(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[int, ...]:
    """The broadcast batch dimensions, with the heads checked."""
    h, hk, hv = _heads(query), _heads(key), _heads(value)
    for name, n in (("key", hk), ("value", hv)):
        if not enable_gqa and h != n and 1 not in (h, n):
            raise ValueError(f"{_CALLER}: {name} has {n} heads; without enable_gqa it must have query's {h}")
    if hk != hv and 1 not in (hk, hv):
        raise ValueError(f"{_CALLER}: value has {hv} heads; it must have key's {hk}")
    try:
        return tuple(torch.broadcast_shapes(*(t.shape[:-3] for t in (query, key, value))))
    except RuntimeError:
        shapes = ", ".join(str(tuple(t.shape)) for t in (query, key, value))
        raise ValueError(
            f"{_CALLER}: query, key and value have shapes {shapes}; their batches must broadcast"
        ) from None


def _to_rows(t: torch.Tensor, lead: tuple[int, ...], heads: int) -> torch.Tensor:
    """(..., heads, length, dim) as (batch, length, heads, dim), broadcast; a view for up to one leading dimension."""
    if t.shape[-1] > 1 and t.stride(-1) != 1:
        t = t.contiguous()  # PyTorch takes any last stride, the kernels do not
    if t.dim() == 2:
        t = t.unsqueeze(0)
    t = t.expand(*lead, heads, *t.shape[-2:])
    return t.reshape(math.prod(lead), *t.shape[-3:]).transpose(1, 2)
