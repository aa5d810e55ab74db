"""Launch the merge of states that `flash_attn_combine` is given."""

from __future__ import annotations

from typing import Any

import torch

from headfold.kernels.fixup import fixup_kernel
from headfold.planner.tiles import next_power_of_two
from headfold.problem import MAX_SPLITS


def _on_device(t: torch.Tensor) -> Any:
    """Triton launches on the current device: make it the tensor's. (The interpreter runs on CPU tensors.)"""
    return torch.cuda.device(t.device if t.is_cuda else -1)


def fixup(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    shape: tuple[int, ...] | torch.Size,
    partial_out_strides: tuple[int, ...],
    partial_lse_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
) -> None:
    """Merge states. shape is (batch, rows, heads); strides are (split, batch, row, head), without split for results."""
    batch, rows, heads = shape
    head_dim_v = out.shape[-1]
    if batch * rows * heads == 0:
        return
    with _on_device(out):
        fixup_kernel[(batch * rows * heads,)](
            partial_out,
            partial_lse,
            out,
            lse,
            cu_seqlens,
            seqused,
            partial_out.shape[0],
            rows,
            heads,
            cu_seqlens.shape[0] - 1 if cu_seqlens is not None else batch,
            *partial_out_strides,
            *partial_lse_strides,
            *out_strides,
            *lse_strides,
            HEAD_DIM_V=head_dim_v,
            BLOCK_D=next_power_of_two(head_dim_v),
            MAX_SPLITS=MAX_SPLITS,
            BLOCK_S=16,
            num_warps=2,
        )
