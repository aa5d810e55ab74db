"""Decoding steps over caches whose unused bytes are NaN."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

import headfold
from headfold.problem import Inputs
from tests.cases import NAN
from tests.interface.tensors import ints, placed


@dataclass
class Step:
    """A decoding step: what flash_attn_with_kvcache gets, over caches whose unused bytes are NaN."""

    tensors: dict[str, torch.Tensor]
    counts: list[int]
    rotary: dict[str, Any]
    options: dict[str, Any]

    @property
    def lengths(self) -> torch.Tensor:
        """Keys of each sequence after the append."""
        seqlens = self.tensors["cache_seqlens"]
        return (seqlens + torch.tensor(self.counts, device=seqlens.device)).int()

    def caches(self) -> dict[str, torch.Tensor]:
        return {n: self.tensors[n].clone() for n in ("k_cache", "v_cache")}

    def run(self, **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**self.tensors, **self.rotary, **self.options, "return_softmax_lse": True, **changes}
        return headfold.flash_attn_with_kvcache(**arguments)

    def run_after(self, caches: dict[str, torch.Tensor], **changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The same attention where the new keys are in the caches already."""
        positions = self.rotary.get("rotary_seqlens", self.tensors["cache_seqlens"]) if self.rotary else None
        new = {"k": None, "v": None, "cu_seqlens_k_new": None, "cache_seqlens": self.lengths}
        return self.run(**{**caches, **new, "rotary_seqlens": positions, **changes})

    def inputs(self, caches: dict[str, torch.Tensor]) -> Inputs:
        """That attention as the reference takes it."""
        t, o = self.tensors, self.options
        rotary = {}
        if self.rotary:
            rotary = {
                "rotary_cos": self.rotary["rotary_cos"],
                "rotary_sin": self.rotary["rotary_sin"],
                "rotary_positions": self.rotary.get("rotary_seqlens", t["cache_seqlens"]),
                "rotary_interleaved": self.rotary["rotary_interleaved"],
                "rotary_advances": o.get("causal", False) or "window_size" in o,
            }
        left, right = o.get("window_size", (-1, -1))
        return Inputs(
            t["q"],
            caches["k_cache"],
            caches["v_cache"],
            cu_seqlens_q=t.get("cu_seqlens_q"),
            seqused_k=self.lengths,
            page_table=t.get("page_table"),
            window_left=left,
            window_right=0 if o.get("causal") else right,
            tree_mask=o.get("tree_mask"),
            cache_batch_idx=t.get("cache_batch_idx"),
            cache_leftpad=t.get("cache_leftpad"),
            **rotary,
        )


def step(
    starts: list[int],
    counts: list[int],
    device: str,
    *,
    page_size: int = 0,
    ragged_new: bool = False,
    ragged_q: bool = False,
    rotary_dim: int = 0,
    interleaved: bool = True,
    rotary_at: list[int] | None = None,
    rows: list[int] | None = None,
    leftpad: list[int] | None = None,
    sq: int = 2,
    capacity: int = 24,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Step:
    g = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, d, dv = len(starts), 4, 2, 16, 8
    at = list(range(batch)) if rows is None else rows
    there = max(at) + 1
    tensors: dict[str, torch.Tensor] = {}

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if page_size:
        per = capacity // page_size
        tensors["page_table"] = torch.randperm(there * per, generator=g, dtype=torch.int32).view(there, per)
        shape = (there * per, page_size)
    else:
        shape = (there, capacity)
    k_cache, v_cache = (torch.full((*shape, kv_heads, n), NAN, dtype=dtype) for n in (d, dv))
    for i, row in enumerate(at):
        for j in range(leftpad[i] if leftpad else 0, starts[i]):
            place = (tensors["page_table"][row, j // page_size], j % page_size) if page_size else (row, j)
            k_cache[place], v_cache[place] = randn(kv_heads, d), randn(kv_heads, dv)
    new = (sum(counts),) if ragged_new else (batch, counts[0])
    tensors |= {
        "q": randn(batch, sq, heads, d),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": randn(*new, kv_heads, d),
        "v": randn(*new, kv_heads, dv),
        "cache_seqlens": ints(*starts),
    }
    if ragged_q:
        tensors |= {"q": tensors["q"].flatten(0, 1), "cu_seqlens_q": ints(*range(0, batch * sq + 1, sq))}
        options["max_seqlen_q"] = sq
    if ragged_new:
        tensors["cu_seqlens_k_new"] = ints(*itertools.accumulate(counts, initial=0))
    if rows is not None:
        tensors["cache_batch_idx"] = ints(*rows)
    if leftpad is not None:
        tensors["cache_leftpad"] = ints(*leftpad)
    rotary: dict[str, Any] = {}
    if rotary_dim:
        angles = torch.rand(40, rotary_dim // 2, generator=g) * 6.3
        rotary = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": interleaved}
        if rotary_at is not None:
            rotary["rotary_seqlens"] = ints(*rotary_at)
    return Step(placed(tensors, device), counts, placed(rotary, device), placed(options, device))


STEPS: dict[str, dict[str, Any]] = {
    "dense": {"starts": [5, 17], "counts": [2, 2], "causal": True},
    "dense, empty cache": {"starts": [0, 3], "counts": [3, 3], "causal": True, "rotary_dim": 16},
    "dense, rotated": {"starts": [5, 17], "counts": [2, 2], "causal": True, "rotary_dim": 12},
    "dense, rotated halves": {
        "starts": [5, 17],
        "counts": [2, 2],
        "causal": True,
        "rotary_dim": 12,
        "interleaved": False,
    },
    "no causal: all queries rotate at one position": {"starts": [5, 17], "counts": [2, 2], "rotary_dim": 16},
    "window": {"starts": [5, 17], "counts": [2, 2], "rotary_dim": 16, "window_size": (6, 0)},
    "rotary_seqlens": {
        "starts": [5, 17],
        "counts": [2, 2],
        "rotary_dim": 16,
        "rotary_at": [30, 0],
        "causal": True,
    },
    "paged": {
        "starts": [5, 17],
        "counts": [2, 2],
        "page_size": 4,
        "rotary_dim": 16,
        "interleaved": False,
        "causal": True,
    },
    "ragged new": {"starts": [5, 17], "counts": [4, 1], "ragged_new": True, "rotary_dim": 12, "causal": True},
    "paged, ragged new and ragged queries": {
        "starts": [3, 17],
        "counts": [0, 6],
        "page_size": 3,
        "ragged_new": True,
        "ragged_q": True,
        "rotary_dim": 12,
        "causal": True,
    },
    "rows": {"starts": [5, 17], "counts": [2, 2], "rows": [3, 1], "causal": True, "rotary_dim": 16},
    "rows of a table": {"starts": [5, 17], "counts": [2, 2], "rows": [2, 0], "page_size": 4, "causal": True},
    "left padding": {
        "starts": [5, 17],
        "counts": [2, 2],
        "leftpad": [2, 11],
        "causal": True,
        "rotary_dim": 12,
    },
    "left padding of pages": {
        "starts": [5, 17],
        "counts": [2, 2],
        "leftpad": [0, 11],
        "page_size": 4,
        "causal": True,
        "rotary_dim": 12,
    },
    "tree": {
        "starts": [5, 17],
        "counts": [3, 3],
        "sq": 3,
        "tree_mask": torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool().expand(2, 3, 3),
        "rotary_dim": 16,
    },
    "everything": {
        "starts": [5, 17],
        "counts": [4, 3],
        "sq": 3,
        "page_size": 4,
        "ragged_new": True,
        "rows": [2, 0],
        "leftpad": [1, 6],
        "rotary_dim": 12,
        "interleaved": False,
        "rotary_at": [9, 2],
        "tree_mask": torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 1]]).bool().expand(2, 3, 3),
        "window_size": (20, 5),
    },
}
