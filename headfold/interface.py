"""flash_attn_func and its kin: the public functions, with FlashAttention-3's names, order and layouts.

Each turns its arguments into those of one operator (`ops.py`), which checks them once and runs the plan.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from headfold import ops

Window = Sequence[int | None] | torch.Tensor
Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    tokens_per_split: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention of a dense batch.

    Args:
        q: (b, sq, h, d), float16, bfloat16 or float32, 1 <= d <= 256.
        k: (b, sk, hk, d); v: (b, sk, hk, dv); h a multiple of hk, query head i reads KV head i // (h // hk).
            Any strides whose last one is 1, of q too.
        softmax_scale: factor on the scores; None is d**-0.5.
        causal: query i sees key j iff j <= i + sk - sq (bottom-right).
        window_size: (left, right); query i sees keys i + sk - sq - left to i + sk - sq + right, both included.
            None or -1 is an open side.
        num_splits: parts that the keys are cut into; 0 is automatic, and the result means the same.
        pack_gqa: None or True folds the heads of a group, False runs them apart.
        deterministic: the forward always is.
        sm_margin: multiprocessors to leave to others.
        return_attn_probs, return_lse: also return the LSE, float32, natural log, (b, h, sq).
        out: (b, sq, h, dv), where to write.
        qv, q_descale, k_descale, v_descale, attention_chunk, softcap, learnable_sink, alibi_slopes,
            tokens_per_split: not available yet.

    Returns:
        out (b, sq, h, dv) in q's dtype, or (out, lse). A row that sees no key is 0, its LSE -inf.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
        NotImplementedError: an argument that is not available yet, or an input that requires a gradient.
    """
    caller = "flash_attn_func"
    _require_tensors(caller, q=q, k=k, v=v)
    _refuse(
        caller,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=_unless_zero(attention_chunk),
        softcap=_unless_zero(softcap),
        learnable_sink=learnable_sink,
        alibi_slopes=alibi_slopes,
        tokens_per_split=tokens_per_split,
    )
    _allow_tensors(caller, out=out)
    _check_flags(
        caller,
        causal=causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        return_lse=return_lse,
    )
    _check_pack_gqa(caller, pack_gqa)
    left, right = _window(caller, window_size, causal)
    return _run(
        (q, k, v),
        {
            "softmax_scale": _number(caller, "softmax_scale", softmax_scale),
            "window_left": left,
            "window_right": right,
            "num_splits": _integer(caller, "num_splits", num_splits),
            "pack_gqa": pack_gqa,
            "sm_margin": _integer(caller, "sm_margin", sm_margin),
            "caller": caller,
        },
        out,
        return_lse or return_attn_probs,
    )


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    page_table: torch.Tensor | None = None,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    tokens_per_split: int | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
) -> Result:
    """Attention of a ragged batch: sequences of any length behind one another.

    Args:
        q: (total_q, h, d) with cu_seqlens_q, or (b, sq, h, d) with cu_seqlens_q=None.
        k, v: (total_k, hk, d | dv) with cu_seqlens_k; (pages, page_size, hk, d | dv) with page_table; or
            (b, sk, hk, d | dv) with neither.
        cu_seqlens_q, cu_seqlens_k: (b + 1,) int32 offsets; sequence i owns rows [cu[i], cu[i + 1]). With a
            page_table, cu_seqlens_k only gives lengths, where seqused_k does not.
        max_seqlen_q, max_seqlen_k: upper bounds of the lengths, never read as exact; None is the capacity.
        seqused_q, seqused_k: (b,) int32, how many rows of each slot count; rows of q past them are undefined.
        page_table: (b, max_pages) int32; entries past a sequence's end are never read.

    The rest, the errors and the meaning are those of `flash_attn_func`.

    Returns:
        out (total_q, h, dv), or (out, lse) with the LSE (h, total_q) float32.
    """
    caller = "flash_attn_varlen_func"
    _require_tensors(caller, q=q, k=k, v=v)
    _refuse(
        caller,
        qv=qv,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=_unless_zero(attention_chunk),
        softcap=_unless_zero(softcap),
        learnable_sink=learnable_sink,
        alibi_slopes=alibi_slopes,
        tokens_per_split=tokens_per_split,
    )
    _allow_tensors(
        caller,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        out=out,
    )
    _check_flags(
        caller,
        causal=causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        return_lse=return_lse,
    )
    _check_pack_gqa(caller, pack_gqa)
    left, right = _window(caller, window_size, causal)
    return _run(
        (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table),
        {
            "max_seqlen_q": None if max_seqlen_q is None else _integer(caller, "max_seqlen_q", max_seqlen_q),
            "max_seqlen_k": None if max_seqlen_k is None else _integer(caller, "max_seqlen_k", max_seqlen_k),
            "softmax_scale": _number(caller, "softmax_scale", softmax_scale),
            "window_left": left,
            "window_right": right,
            "num_splits": _integer(caller, "num_splits", num_splits),
            "pack_gqa": pack_gqa,
            "sm_margin": _integer(caller, "sm_margin", sm_margin),
            "caller": caller,
        },
        out,
        return_lse or return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tokens_per_split: int | None = None,
    out: torch.Tensor | None = None,
) -> Result:
    """Attention against a cache: the decoding step of a language model.

    Args:
        q: (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q.
        k_cache, v_cache: (b, sk, hk, d | dv), or (pages, page_size, hk, d | dv) with page_table.
        cache_seqlens: int or (b,) int32, how many keys of each sequence count; None is the capacity (dense
            caches only). Bytes past it are never read.
        page_table: (b, max_pages) int32; entries past a sequence's end are never read. Any page size.
        cu_seqlens_q, max_seqlen_q: offsets of ragged queries, and an upper bound of their lengths.
        return_softmax_lse: also return the LSE, (b, h, sq) or (h, total_q), float32.
        k, v, rotary_cos, rotary_sin, rotary_seqlens, cu_seqlens_k_new, cache_batch_idx, cache_leftpad,
            scheduler_metadata, tree_mask: not available yet. rotary_interleaved has no effect without them.

    The rest, the errors and the meaning are those of `flash_attn_func`.
    """
    caller = "flash_attn_with_kvcache"
    _require_tensors(caller, q=q, k_cache=k_cache, v_cache=v_cache)
    _refuse(
        caller,
        k=k,
        v=v,
        qv=qv,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cu_seqlens_k_new=cu_seqlens_k_new,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        attention_chunk=_unless_zero(attention_chunk),
        softcap=_unless_zero(softcap),
        scheduler_metadata=scheduler_metadata,
        learnable_sink=learnable_sink,
        alibi_slopes=alibi_slopes,
        tree_mask=tree_mask,
        tokens_per_split=tokens_per_split,
    )
    _allow_tensors(caller, page_table=page_table, cu_seqlens_q=cu_seqlens_q, out=out)
    _check_flags(
        caller,
        causal=causal,
        rotary_interleaved=rotary_interleaved,
        return_softmax_lse=return_softmax_lse,
    )
    _check_pack_gqa(caller, pack_gqa)
    left, right = _window(caller, window_size, causal)
    if cache_seqlens is not None and not isinstance(cache_seqlens, torch.Tensor):
        n = _integer(caller, "cache_seqlens", cache_seqlens)
        k_cache, v_cache, cache_seqlens = _constant_length(caller, k_cache, v_cache, page_table, n)
    return _run(
        (q, k_cache, v_cache, cu_seqlens_q, None, None, cache_seqlens, page_table),
        {
            "max_seqlen_q": None if max_seqlen_q is None else _integer(caller, "max_seqlen_q", max_seqlen_q),
            "softmax_scale": _number(caller, "softmax_scale", softmax_scale),
            "window_left": left,
            "window_right": right,
            "num_splits": _integer(caller, "num_splits", num_splits),
            "pack_gqa": pack_gqa,
            "sm_margin": _integer(caller, "sm_margin", sm_margin),
            "caller": caller,
        },
        out,
        return_softmax_lse,
    )


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    return_lse: bool = True,
) -> Result:
    """Merge the finished states of the same queries over different keys.

    Args:
        out_partial: (splits, b, s, h, d) or (splits, total, h, d), 1 to 256 splits, any strides, last one 1.
        lse_partial: (splits, b, s, h) or (splits, total, h) float32, natural log. -inf marks a state that saw no
            key; its output is not read.
        out: where to write, of out_partial's shape without splits; its dtype is the result's.
        out_dtype: dtype of a new result; None is out_partial's.
        cu_seqlens: (b + 1,) int32 offsets of ragged rows.
        seqused: (b,) int32; rows past it are undefined.
        return_lse: return the LSE too.

    Returns:
        (out, lse) with the LSE (b, s, h) or (total, h) float32, heads last; or out. Where no state saw a key, out
        is 0 and the LSE -inf.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
    """
    caller = "flash_attn_combine"
    _require_tensors(caller, out_partial=out_partial, lse_partial=lse_partial)
    _allow_tensors(caller, out=out, cu_seqlens=cu_seqlens, seqused=seqused)
    _check_flags(caller, return_lse=return_lse)
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{caller}: out_dtype is {out_dtype!r}; it must be None or a torch.dtype")
    if out is None:
        out, lse = ops.combine(out_partial, lse_partial, cu_seqlens, seqused, out_dtype)
        return (out, lse) if return_lse else out
    if out_dtype is not None and out_dtype != out.dtype:
        raise ValueError(f"{caller}: out_dtype is {out_dtype}; with out given it must be None or {out.dtype}")
    lse = torch.empty(lse_partial.shape[1:], dtype=torch.float32, device=lse_partial.device)
    ops.combine_out(out_partial, lse_partial, cu_seqlens, seqused, out=out, lse=lse)
    return (out, lse) if return_lse else out


def _run(
    tensors: tuple[torch.Tensor | None, ...],
    options: dict[str, Any],
    out: torch.Tensor | None,
    want_lse: bool,
) -> Result:
    if out is None:
        result, lse = ops.attention(*tensors, **options)
        return (result, lse) if want_lse else result
    q = tensors[0]
    assert q is not None
    ragged = len(tensors) > 3 and tensors[3] is not None
    lead, rows = (0, q.shape[:-1]) if ragged else (1, q.shape[1:-1])
    lse = q.new_empty((*q.shape[:lead], *reversed(rows)), dtype=torch.float32)
    ops.attention_out(*tensors, **options, out=out, lse=lse)
    return (out, lse) if want_lse else out


def _require_tensors(caller: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{caller}: {name} is a {type(value).__name__}; it must be a torch.Tensor")


def _allow_tensors(caller: str, **tensors: Any) -> None:
    for name, value in tensors.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(
                f"{caller}: {name} is a {type(value).__name__}; it must be None or a torch.Tensor"
            )


def _unless_zero(value: Any) -> Any:
    """None for a number that switches a feature off."""
    return None if isinstance(value, int | float) and value == 0 else value


def _refuse(caller: str, **later: Any) -> None:
    for name, value in later.items():
        if value is not None:
            raise NotImplementedError(f"{caller}: {name} is not available yet; leave it at its default")


def _check_flags(caller: str, **flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{caller}: {name} is {value!r}; it must be True or False")


def _check_pack_gqa(caller: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{caller}: pack_gqa is {value!r}; it must be None, True or False")


def _integer(caller: str, name: str, value: Any) -> int:
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


def _number(caller: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{caller}: {name} is {value!r}; it must be None or a number")
    return float(value)


def _window(caller: str, window: Any, causal: bool) -> tuple[int, int]:
    """(left, right) with -1 for an open side; causal closes the right side at 0."""
    if isinstance(window, torch.Tensor):
        if window.device.type != "cpu" or window.numel() != 2 or window.is_floating_point():
            raise ValueError(
                f"{caller}: window_size is a {window.dtype} tensor of shape {tuple(window.shape)} on {window.device}; "
                "it must hold two integers on the CPU"
            )
        window = window.flatten().tolist()
    if isinstance(window, str) or not isinstance(window, Sequence):
        raise TypeError(f"{caller}: window_size is {window!r}; it must be two of int or None, (left, right)")
    if len(window) != 2:
        raise ValueError(f"{caller}: window_size has {len(window)} entries; it must have two, (left, right)")
    left, right = (-1 if side is None else _integer(caller, "window_size", side) for side in window)
    return left, 0 if causal else right


def _constant_length(
    caller: str,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor | None,
    n: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A length that the host knows: a shorter view of a dense cache, a filled tensor for a paged one."""
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:-1] != v_cache.shape[:-1]:
        return k_cache, v_cache, None  # problem.check says what is wrong
    if page_table is None:
        if not 0 <= n <= k_cache.shape[1]:
            raise ValueError(f"{caller}: cache_seqlens is {n}; the cache holds 0 to {k_cache.shape[1]} keys")
        return k_cache[:, :n], v_cache[:, :n], None
    if page_table.dim() != 2:
        return k_cache, v_cache, None
    room = page_table.shape[1] * k_cache.shape[1]
    if not 0 <= n <= room:
        raise ValueError(f"{caller}: cache_seqlens is {n}; the page table has room for 0 to {room} keys")
    return k_cache, v_cache, torch.full((page_table.shape[0],), n, dtype=torch.int32, device=k_cache.device)
