"""scaled_dot_product_attention with PyTorch's own meaning."""

from __future__ import annotations

import torch

from headfold import ops

_CALLER = "scaled_dot_product_attention"


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
        attn_mask: not available yet.
        dropout_p: must be 0.0.
        is_causal: query i sees key j iff j <= i (top-left, as PyTorch; the flash_attn functions are bottom-right).
        scale: factor on the scores; None is d**-0.5.
        enable_gqa: query head i reads KV head i // (h // hk).

    Returns:
        (..., h, sq, dv) in query's dtype. A row that sees no key is 0.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
        NotImplementedError: a mask, dropout, or an input that requires a gradient.
    """
    if attn_mask is not None:
        raise NotImplementedError(f"{_CALLER}: attn_mask is not available yet; leave it at None")
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
    lead = _leading(query, key, value, enable_gqa)
    k_heads = max(_heads(key), _heads(value))
    q = _to_rows(query, lead, _heads(query) if enable_gqa else max(_heads(query), k_heads))
    out, _ = ops.attention(
        q,
        _to_rows(key, lead, k_heads),
        _to_rows(value, lead, k_heads),
        softmax_scale=None if scale is None else float(scale),
        window_right=0 if is_causal else -1,
        bottom_right=False,
        caller=_CALLER,
    )
    heads = () if max(query.dim(), key.dim(), value.dim()) < 3 else (q.shape[2],)
    return out.transpose(1, 2).reshape(*lead, *heads, query.shape[-2], value.shape[-1])


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
    if t.dim() == 2:
        t = t.unsqueeze(0)
    t = t.expand(*lead, heads, *t.shape[-2:])
    batch = 1
    for n in lead:
        batch *= n
    return t.reshape(batch, *t.shape[-3:]).transpose(1, 2)
