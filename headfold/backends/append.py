"""Launch the append kernel: turn tensors into launch arguments, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from headfold.backends import device_of
from headfold.backends.launch import Launcher
from headfold.backends.triton import ELEMENTS, address, rotary_constants
from headfold.kernels.append import append_kernel
from headfold.planner.device import interpreter_requested
from headfold.planner.tiles import next_power_of_two
from headfold.problem import is_aligned

if TYPE_CHECKING:
    from headfold.append import AppendInputs

# Elements of K in a tile: two 16-byte copies a thread in half precision, and enough programs for few tokens.
TILE = 2048
NUM_WARPS = 4


def constants(x: AppendInputs, turned: torch.Tensor | None = None) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    d, dv = x.k.shape[-1], x.v.shape[-1]
    block_d, block_dv = next_power_of_two(d), next_power_of_two(dv)
    tensors = [t for t in (x.k_cache, x.v_cache, x.k, x.v, x.q, turned) if t is not None]
    return {
        "ELEMENT": ELEMENTS[x.k.dtype],
        "ANGLE": ELEMENTS[x.k.dtype if x.rotary_cos is None else x.rotary_cos.dtype],
        "HEAD_DIM": d,
        "HEAD_DIM_V": dv,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "BLOCK_M": max(1, TILE // max(block_d, block_dv, 16)),
        "ALIGN": 16 // x.k.element_size() if all(is_aligned(t) for t in tensors) else 1,
        **rotary_constants(x.rotary_cos, x.rotary_sin, x.rotary_interleaved),
        "EARLY": device_of(x.k.device).starts_early and not interpreter_requested(),
    }


def prepare(
    x: AppendInputs, lengths: torch.Tensor, turned: torch.Tensor
) -> Callable[[AppendInputs, torch.Tensor, torch.Tensor], None]:
    """What appends checked inputs in place, in one launch, and any that look like them.

    It writes `lengths` (b,) int32 in full, and so `turned`, a contiguous tensor of q's shape and dtype where there is q.
    """
    variant = constants(x, None if x.q is None else turned)
    heads, block_m = x.k.shape[-2], variant["BLOCK_M"]
    per_sequence, tiles = _tiles(x.k, x.cu_seqlens_k_new, x.batch, block_m)
    q_per_sequence, q_tiles = (0, 0) if x.q is None else _tiles(x.q, x.cu_seqlens_q, x.batch, block_m)
    numbers = (
        0 if x.cu_seqlens_k_new is not None else x.k.shape[1],
        x.batch,
        tiles,
        per_sequence,
        heads,
        x.capacity,
        x.cache_rows,
        x.k_cache.shape[0],
        x.k_cache.shape[1],
        x.page_table.stride(0) if x.page_table is not None else 0,
        *x.k_cache.stride()[:3],
        *x.v_cache.stride()[:3],
        *_strides(x.k, x.cu_seqlens_k_new),
        *_strides(x.v, x.cu_seqlens_k_new),
        x.rotary_cos.stride(0) if x.rotary_cos is not None else 0,
        x.rotary_sin.stride(0) if x.rotary_sin is not None else 0,
        x.rotary_cos.shape[0] if x.rotary_cos is not None else 0,
        0 if x.q is None or x.cu_seqlens_q is not None else x.q.shape[1],
        q_per_sequence,
        0 if x.q is None else x.q.shape[-2],
        int(x.rotary_advances),
        *((0, 0, 0) if x.q is None else _strides(x.q, x.cu_seqlens_q)),
        *((0, 0, 0) if x.q is None else _strides(turned, x.cu_seqlens_q)),
    )
    launch = Launcher(append_kernel, (tiles + q_tiles,), variant, {"num_warps": NUM_WARPS}, x.k.device)

    def run(x: AppendInputs, lengths: torch.Tensor, turned: torch.Tensor) -> None:
        addresses = (
            x.k_cache.data_ptr(),
            x.v_cache.data_ptr(),
            x.k.data_ptr(),
            x.v.data_ptr(),
            lengths.data_ptr(),
            address(x.q),
            0 if x.q is None else turned.data_ptr(),
            address(x.rotary_cos),
            address(x.rotary_sin),
            address(x.cache_seqlens),
            address(x.cu_seqlens_k_new),
            address(x.page_table),
            address(x.cache_batch_idx),
            address(x.rotary_seqlens),
            address(x.cu_seqlens_q),
        )
        launch((*addresses, *numbers))

    return run


def _tiles(t: torch.Tensor, offsets: torch.Tensor | None, batch: int, block_m: int) -> tuple[int, int]:
    """(tiles of a sequence, 0 where each tile must find its own; tiles in all) of tokens x heads of k or q."""
    heads = t.shape[-2]
    if offsets is not None:
        # At most this many, wherever the sequences end: see find_sequence.
        return 0, t.shape[0] * heads // block_m + batch
    per_sequence = max(1, -(-t.shape[1] * heads // block_m))
    return per_sequence, batch * per_sequence


def _strides(t: torch.Tensor, offsets: torch.Tensor | None) -> tuple[int, int, int]:
    """(sequence, token, head) strides; tokens of ragged tensors have no sequence."""
    return t.stride()[:3] if offsets is None else (0, t.stride(0), t.stride(1))  # type: ignore[return-value]
