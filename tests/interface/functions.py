"""The public functions by name, with the signatures that callers know, and calls of them on Inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import headfold
from headfold.problem import Inputs

# Positional order, names and defaults that callers of FlashAttention-3 rely on; then headfold's own.
SIGNATURES = {
    "flash_attn_func": """q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0, pack_gqa=None,
        deterministic=False, sm_margin=0, return_attn_probs=False, *, learnable_sink=None, alibi_slopes=None,
        tokens_per_split=None, out=None, return_lse=False""",
    "flash_attn_varlen_func": """q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
        seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=0, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False, *, page_table=None, learnable_sink=None, alibi_slopes=None,
        tokens_per_split=None, out=None, return_lse=False""",
    "flash_attn_with_kvcache": """q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None,
        cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None,
        cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None,
        v_descale=None, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
        rotary_interleaved=True, scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0,
        return_softmax_lse=False, *, learnable_sink=None, alibi_slopes=None, tree_mask=None,
        tokens_per_split=None, out=None, shared_prefix_len=None, shared_prefix_groups=None""",
    "flash_attn_combine": """out_partial, lse_partial, out=None, out_dtype=None, *, cu_seqlens=None, seqused=None,
        return_lse=True""",
    "get_scheduler_metadata": """batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim,
        cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
        cache_leftpad=None, page_size=None, max_seqlen_k_new=0, causal=False, window_size=(-1, -1),
        attention_chunk=0, has_softcap=False, num_splits=0, pack_gqa=None, sm_margin=0""",
}
FUNCTIONS: dict[str, Callable[..., Any]] = {name: getattr(headfold, name) for name in SIGNATURES}


ATTENTION = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")


def func(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return headfold.flash_attn_func(x.q, x.k, x.v, return_lse=True, **options)


def call(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """flash_attn_varlen_func, which takes every layout."""
    options = {"causal": x.window_right == 0 and x.window_left < 0, **options}
    if not options["causal"] and "window_size" not in options:
        options["window_size"] = (x.window_left, x.window_right)
    return headfold.flash_attn_varlen_func(
        x.q,
        x.k,
        x.v,
        x.cu_seqlens_q,
        x.cu_seqlens_k,
        x.max_seqlen_q,
        x.max_seqlen_k,
        x.seqused_q,
        x.seqused_k,
        x.softmax_scale,
        page_table=x.page_table,
        return_lse=True,
        **options,
    )


def kvcache(x: Inputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return headfold.flash_attn_with_kvcache(
        x.q,
        x.k,
        x.v,
        **{
            "cache_seqlens": x.seqused_k,
            "page_table": x.page_table,
            "cu_seqlens_q": x.cu_seqlens_q,
            "max_seqlen_q": x.max_seqlen_q,
            "return_softmax_lse": True,
            **options,
        },
    )


Run = Callable[..., tuple[torch.Tensor, torch.Tensor]]
