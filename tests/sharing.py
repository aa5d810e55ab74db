"""Decoding steps of groups of sequences whose page tables begin with the same pages; all that is not read is NaN."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

import headfold
from headfold.problem import Inputs
from tests.cases import NAN
from tests.interface.tensors import ints, placed

GARBAGE = 2**31 - 1
Result = tuple[torch.Tensor, torch.Tensor]


@dataclass
class SharedCall:
    """A call of flash_attn_with_kvcache, and its promise."""

    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]
    promise: dict[str, Any]
    appended: int = 0

    def caches(self) -> dict[str, torch.Tensor]:
        return {n: self.tensors[n].clone() for n in ("k_cache", "v_cache")}

    def run(self, **changes: Any) -> Result:
        arguments = {**self.tensors, **self.options, "return_softmax_lse": True, **changes}
        return headfold.flash_attn_with_kvcache(**arguments)  # type: ignore[return-value]

    def inputs(self, **caches: torch.Tensor) -> Inputs:
        """The same attention as the reference takes it, the new keys in the caches already."""
        t, o = {**self.tensors, **caches}, self.options
        rotary = {}
        if "rotary_cos" in t:
            rotary = {
                "rotary_cos": t["rotary_cos"],
                "rotary_sin": t["rotary_sin"],
                "rotary_positions": t["cache_seqlens"],
                "rotary_advances": o["causal"] or o["window_size"][1] is not None,
            }
        return Inputs(
            t["q"],
            t["k_cache"],
            t["v_cache"],
            cu_seqlens_q=t.get("cu_seqlens_q"),
            seqused_k=t["cache_seqlens"] + self.appended,
            page_table=t["page_table"],
            softmax_scale=o["softmax_scale"],
            window_right=0 if o["causal"] else -1 if o["window_size"][1] is None else o["window_size"][1],
            softcap=o["softcap"],
            sink=t.get("learnable_sink"),
            tree_mask=t.get("tree_mask"),
            **rotary,  # type: ignore[arg-type]
        )


def shared_call(
    groups: list[tuple[int, int]],
    q_lens: list[int],
    own: list[int],
    *,
    page_size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    dv: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    ragged_q: bool = False,
    spare_rows: int = 0,
    append: bool = False,
    rotary: bool = False,
    sink: bool = False,
    tree: bool = False,
    causal: bool = False,
    right: int | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    **options: Any,
) -> SharedCall:
    """A call over groups of (sequences, pages of their prefix).

    own[i] are the keys of sequence i past its prefix, those of an append included: it appends as many as there are
    queries, which must then be the same for all.
    """
    g = torch.Generator().manual_seed(seed)
    sizes, pages = [n for n, _ in groups], [n for _, n in groups]
    assert sum(sizes) == len(q_lens) == len(own)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    prefixes = [n for size, n in groups for _ in range(size)]
    lengths = [n * page_size + mine for n, mine in zip(prefixes, own, strict=True)]
    per = [-(-n // page_size) for n in lengths]
    there = sum(pages) + sum(a - b for a, b in zip(per, prefixes, strict=True)) + 1
    free = torch.randperm(there, generator=g).tolist()
    table = torch.full((len(own), max([*per, 0]) + 1), GARBAGE, dtype=torch.int32)
    first = 0
    for size, n in groups:
        shared = [free.pop() for _ in range(n)]
        for i in range(first, first + size):
            own_pages = [free.pop() for _ in range(per[i] - n)]
            table[i, : per[i]] = torch.tensor(shared + own_pages, dtype=torch.int32)
        first += size
    new = q_lens[0] if append and q_lens else 0
    k_cache, v_cache = (torch.full((there, page_size, kv_heads, n), NAN, dtype=dtype) for n in (d, dv))
    for i, n in enumerate(lengths):
        for j in range(0, n - new, page_size):
            kept = slice(0, min(page_size, n - new - j))
            page = table[i, j // page_size]
            rows = kept.stop
            k_cache[page, kept], v_cache[page, kept] = rand(rows, kv_heads, d), rand(rows, kv_heads, dv)
    tensors = {
        "k_cache": k_cache,
        "v_cache": v_cache,
        "cache_seqlens": ints(*lengths) - new,
        "page_table": table,
    }
    if ragged_q:
        tensors["q"] = torch.full((sum(q_lens) + spare_rows, heads, d), NAN, dtype=dtype)
        tensors["q"][: sum(q_lens)] = rand(sum(q_lens), heads, d)
        tensors["cu_seqlens_q"] = ints(*accumulate(q_lens, initial=0))
        options["max_seqlen_q"] = max([*q_lens, 0])
    else:
        assert len(set(q_lens)) <= 1
        tensors["q"] = rand(len(q_lens), max([*q_lens, 0]), heads, d)
    if append:
        tensors |= {"k": rand(len(own), new, kv_heads, d), "v": rand(len(own), new, kv_heads, dv)}
    if rotary:
        angles = torch.rand(max([*lengths, 0]) + new + 1, d // 4, generator=g) * 6.3
        tensors |= {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    if sink:
        tensors["learnable_sink"] = torch.randn(heads, generator=g)
    if tree:
        most = max([*q_lens, 0])
        tensors["tree_mask"] = torch.rand(len(own), most, most, generator=g) < 0.6
    options |= {"causal": causal, "window_size": (None, right), "softcap": softcap, "softmax_scale": scale}
    promise = {"shared_prefix_len": [n * page_size for n in pages], "shared_prefix_groups": sizes}
    return SharedCall(placed(tensors, device), options, promise, new)


def keys_past_a_prefix(queries: int, causal: bool, right: int | None, tree: bool) -> int:
    """The least that must follow a prefix for all of so many queries to see all of it."""
    if tree:
        return queries
    if causal or right is not None:
        return max(0, queries - 1 - (0 if causal or right is None else right))
    return 0
