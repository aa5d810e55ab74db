"""flash_attn_func and its kin: the public functions, with FlashAttention-3's names, order and layouts.

Each turns its arguments into those of one operator (`ops.py`), which checks them once and runs the plan.
"""

from __future__ import annotations

import torch

from headfold import ops
from headfold.arguments import (
    Result,
    Window,
    allow_tensors,
    bound,
    check_flags,
    features,
    plain_options,
    refuse,
    require_tensors,
    run,
)
from headfold.interface_kvcache import flash_attn_with_kvcache, get_scheduler_metadata
from headfold.kept_calls import kept

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]


@kept
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
        attention_chunk: with c > 0, key j is visible only in the query's own chunk: (i + sk - sq) // c == j // c,
            and causal and windows on top.
        softcap: with a cap > 0 the scaled scores become cap * tanh(score / cap), before any mask.
        learnable_sink: (h,) float16, bfloat16 or float32, one more logit per head in the softmax's denominator,
            with no value; it enters the LSE.
        alibi_slopes: (h,) or (b, h) float32; adds -slope * abs(i + sk - sq - j) to the scaled scores.
        tokens_per_split: a fixed extent of a split, in keys; wins over num_splits. A sequence's bits then do not
            depend on what else is in its batch.
        qv, q_descale, k_descale, v_descale: not available yet.

    Returns:
        out (b, sq, h, dv) in q's dtype, or (out, lse). A row that sees no key is 0, its LSE -inf.

    Raises:
        TypeError, ValueError: an argument that does not fit, named in the message.
        NotImplementedError: an argument that is not available yet, or an input that requires a gradient.
    """
    caller = "flash_attn_func"
    require_tensors(caller, q=q, k=k, v=v)
    refuse(caller, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    allow_tensors(caller, out=out)
    check_flags(
        caller,
        causal=causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        return_lse=return_lse,
    )
    return run(
        (q, k, v),
        {
            **plain_options(caller, softmax_scale, causal, window_size, num_splits, pack_gqa, sm_margin),
            **features(caller, softcap, attention_chunk, tokens_per_split, learnable_sink, alibi_slopes),
        },
        out,
        return_lse or return_attn_probs,
    )


@kept
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
    require_tensors(caller, q=q, k=k, v=v)
    refuse(caller, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    allow_tensors(
        caller,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        seqused_q=seqused_q,
        seqused_k=seqused_k,
        page_table=page_table,
        out=out,
    )
    check_flags(
        caller,
        causal=causal,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        return_lse=return_lse,
    )
    return run(
        (q, k, v, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, page_table),
        {
            "max_seqlen_q": bound(caller, "max_seqlen_q", max_seqlen_q),
            "max_seqlen_k": bound(caller, "max_seqlen_k", max_seqlen_k),
            **plain_options(caller, softmax_scale, causal, window_size, num_splits, pack_gqa, sm_margin),
            **features(caller, softcap, attention_chunk, tokens_per_split, learnable_sink, alibi_slopes),
        },
        out,
        return_lse or return_attn_probs,
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
    require_tensors(caller, out_partial=out_partial, lse_partial=lse_partial)
    allow_tensors(caller, out=out, cu_seqlens=cu_seqlens, seqused=seqused)
    check_flags(caller, return_lse=return_lse)
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
