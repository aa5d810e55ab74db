"""The errors of get_scheduler_metadata."""

from __future__ import annotations

import torch

from headfold.problem import MAX_SEQLEN
from tests.interface.bad import FLOATS, SIDES, Bad, flag, no_tensor, not_int, wrong
from tests.interface.tensors import ints


def sizes(name: str, least: int, most: int | None) -> list[Bad]:
    need = f">= {least}" if most is None else f"{least} to {most}"
    values = [least - 1] if most is None else [least - 1, most + 1]
    return [*not_int(name), *(wrong(f"{name} is {n}; it must be {need}", **{name: n}) for n in values)]


LENGTHS = "it must be int32 of shape (2,)"
METADATA_ERRORS: dict[str, list[Bad]] = {
    "batch_size": [
        *sizes("batch_size", 0, None),
        wrong(f"cache_seqlens is torch.int32 of shape (2,); {LENGTHS.replace('2,', '3,')}", batch_size=3),
    ],
    "max_seqlen_q": sizes("max_seqlen_q", 0, MAX_SEQLEN),
    "max_seqlen_k": sizes("max_seqlen_k", 0, MAX_SEQLEN),
    "max_seqlen_k_new": [
        *sizes("max_seqlen_k_new", 0, MAX_SEQLEN),
        wrong(f"with max_seqlen_k it may be at most {MAX_SEQLEN}", max_seqlen_k_new=MAX_SEQLEN),
    ],
    "num_heads_q": [
        *sizes("num_heads_q", 1, None),
        wrong("num_heads_q is 5; it must be a multiple of the 2 KV heads", num_heads_q=5),
        wrong(
            "num_heads_q is 514; it must be a multiple of the 2 KV heads, at most 256 times", num_heads_q=514
        ),
    ],
    "num_heads_kv": sizes("num_heads_kv", 1, None),
    "headdim": sizes("headdim", 1, 256),
    "headdim_v": sizes("headdim_v", 1, 256),
    "page_size": sizes("page_size", 1, MAX_SEQLEN),
    "attention_chunk": sizes("attention_chunk", 0, MAX_SEQLEN),
    "num_splits": sizes("num_splits", 0, 256),
    "sm_margin": sizes("sm_margin", 0, None),
    "cache_seqlens": [
        no_tensor("cache_seqlens", 5, optional=False),
        no_tensor("cache_seqlens", None, optional=False),
        wrong(f"cache_seqlens is torch.int64 of shape (2,); {LENGTHS}", cache_seqlens=ints(3, 4).long()),
        wrong(f"cache_seqlens is torch.int32 of shape (3,); {LENGTHS}", cache_seqlens=ints(3, 4, 5)),
        wrong(f"cache_seqlens is torch.int32 of shape (); {LENGTHS}", cache_seqlens=ints(3)[0]),
    ],
    "qkv_dtype": [
        *(
            wrong(f"qkv_dtype is {value!r}; it must be a torch.dtype", TypeError, qkv_dtype=value)
            for value in ("float16", None)
        ),
        wrong(f"qkv_dtype is torch.float64; it must be {FLOATS}", qkv_dtype=torch.float64),
    ],
    "cu_seqlens_q": [no_tensor("cu_seqlens_q", [0, 1])],
    "cu_seqlens_k_new": [no_tensor("cu_seqlens_k_new", 0)],
    "cache_leftpad": [no_tensor("cache_leftpad", (0, 1))],
    "causal": flag("causal"),
    "has_softcap": flag("has_softcap"),
    "window_size": [
        wrong(f"window_size is 5; {SIDES}", TypeError, window_size=5),
        wrong("window_size has 3 entries; it must have two", window_size=(1, 2, 3)),
        wrong("window_size is 1.5; it must be an int", TypeError, window_size=(1.5, 2)),
        wrong("window_size has left side -2; a side is None or -1 (open), or >= 0", window_size=(-2, 0)),
        wrong("window_size has right side -3; a side is None or -1 (open), or >= 0", window_size=(0, -3)),
        wrong("it must hold two integers on the CPU", window_size=torch.ones(2)),
    ],
    "pack_gqa": [
        wrong(f"pack_gqa is {value!r}; it must be None, True or False", TypeError, pack_gqa=value)
        for value in (1, "auto")
    ],
}
