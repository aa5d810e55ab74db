"""Launch the append kernel: turn tensors into launch arguments, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from headfold.kernels.append import append_kernel
from headfold.planner.tiles import next_power_of_two
from headfold.problem import is_aligned, rotary_facts

if TYPE_CHECKING:
    from headfold.append import AppendInputs

# Elements of K in a tile: two 16-byte copies a thread in half precision, and enough programs for few tokens.
TILE = 2048
NUM_WARPS = 4


def rotary_constants(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> dict[str, Any]:
    """The compile-time arguments of `load_rotated`; ROTARY_DIM 0 without angles.

    ROTARY_DIM is one, since a model has one and the loads of a pair's other half are wide only if it is known.
    """
    dim, pairs, align = rotary_facts(cos, sin, interleaved)
    return {"ROTARY_DIM": dim, "INTERLEAVED": pairs, "ROTARY_ALIGN": align}


def constants(x: AppendInputs) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    d, dv = x.k.shape[-1], x.v.shape[-1]
    block_d, block_dv = next_power_of_two(d), next_power_of_two(dv)
    aligned = all(is_aligned(t) for t in (x.k_cache, x.v_cache, x.k, x.v))
    return {
        "HEAD_DIM": d,
        "HEAD_DIM_V": dv,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": max(1, TILE // max(block_d, block_dv, 16)),
        "ALIGN": 16 // x.k.element_size() if aligned else 1,
        **rotary_constants(x.rotary_cos, x.rotary_sin, x.rotary_interleaved),
    }


def run(x: AppendInputs, lengths: torch.Tensor) -> None:
    """Append checked inputs in place, in one launch; `lengths` (b,) int32 is written in full."""
    variant = constants(x)
    heads, block_m = x.k.shape[-2], variant["BLOCK_M"]
    ragged, cos, sin = x.cu_seqlens_k_new is not None, x.rotary_cos, x.rotary_sin
    new_tokens = 0 if ragged else x.k.shape[1]
    tiles_per_sequence = max(1, -(-new_tokens * heads // block_m))
    # A ragged batch has at most this many tiles, wherever its sequences end: see find_sequence.
    tiles = x.k.shape[0] * heads // block_m + x.batch if ragged else x.batch * tiles_per_sequence
    # Triton launches on the current device: make it the tensor's. (The interpreter runs on CPU tensors.)
    with torch.cuda.device(x.k.device if x.k.is_cuda else -1):
        append_kernel[(tiles,)](
            x.k_cache,
            x.v_cache,
            x.k,
            x.v,
            lengths,
            cos,
            sin,
            x.cache_seqlens,
            x.cu_seqlens_k_new,
            x.page_table,
            x.cache_batch_idx,
            x.rotary_seqlens,
            new_tokens,
            x.batch,
            tiles_per_sequence,
            heads,
            x.capacity,
            x.cache_rows,
            x.k_cache.shape[0],
            x.k_cache.shape[1],
            x.page_table.stride(0) if x.page_table is not None else 0,
            *x.k_cache.stride()[:3],
            *x.v_cache.stride()[:3],
            *((0, *x.k.stride()[:2]) if ragged else x.k.stride()[:3]),
            *((0, *x.v.stride()[:2]) if ragged else x.v.stride()[:3]),
            cos.stride(0) if cos is not None else 0,
            sin.stride(0) if sin is not None else 0,
            cos.shape[0] if cos is not None else 0,
            **variant,
            num_warps=NUM_WARPS,
        )
