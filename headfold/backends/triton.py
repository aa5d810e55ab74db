"""Run a Plan through the Triton kernels: turn tensors into launch arguments, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from headfold.kernels.decode import decode_kernel
from headfold.kernels.fixup import fixup_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.planner.plan import Plan
from headfold.planner.tiles import next_power_of_two
from headfold.problem import MAX_SPLITS, Inputs

# An open window side: above any position, and a sum with a position still fits 32 bits.
OPEN_SIDE = 2**30


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch what the plan says. `out` (x.out_shape) and `lse` (x.lse_shape, float32) are written in full."""
    if plan.num_splits == 1:
        _launch(plan, x, out, lse, (0, *_out_strides(x, out)), (0, *_lse_strides(x, lse)))
        return
    partial_out, partial_lse = _workspace(plan, x)
    out_strides = (partial_out.stride(0), *_out_strides(x, partial_out[0]))
    lse_strides = (partial_lse.stride(0), *_out_strides(x, partial_lse[0].unsqueeze(-1)))
    _launch(plan, x, partial_out, partial_lse, out_strides, lse_strides)
    fixup(
        partial_out,
        partial_lse,
        out,
        lse,
        shape=(1, *x.q.shape[:2]) if x.cu_seqlens_q is not None else x.q.shape[:3],
        partial_out_strides=out_strides,
        partial_lse_strides=lse_strides,
        out_strides=_out_strides(x, out),
        lse_strides=_lse_strides(x, lse),
        cu_seqlens=x.cu_seqlens_q,
        seqused=x.seqused_q,
    )


def _workspace(plan: Plan, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """States of all splits: out (splits, ..., h, dv padded to 8) and LSE (splits, ..., h), float32."""
    rows = x.q.shape[:-1]
    width = -(-x.v.shape[-1] // 8) * 8
    partial_out = x.q.new_empty((plan.num_splits, *rows, width), dtype=torch.float32)
    return partial_out, x.q.new_empty((plan.num_splits, *rows), dtype=torch.float32)


def _out_strides(x: Inputs, t: torch.Tensor) -> tuple[int, int, int]:
    """(batch, position, head) strides of a tensor laid out as q; ragged rows have no batch."""
    return t.stride()[:3] if x.cu_seqlens_q is None else (0, t.stride(0), t.stride(1))  # type: ignore[return-value]


def _lse_strides(x: Inputs, t: torch.Tensor) -> tuple[int, int, int]:
    """(batch, position, head) strides of an LSE (b, h, sq) or (h, total_q)."""
    if x.cu_seqlens_q is None:
        return t.stride(0), t.stride(2), t.stride(1)
    return 0, t.stride(1), t.stride(0)


def division(d: int) -> tuple[int, int]:
    """(magic, shift) with n // d == ((2 * n * magic) >> 32) >> shift for every 0 <= n < 2**31, magic below 2**32."""
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d), shift


def constants(plan: Plan, head_dim: int, head_dim_v: int, itemsize: int) -> dict[str, Any]:
    """The kernel's compile-time arguments: all that a compiled variant depends on besides dtypes and layout."""
    values: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "D0": plan.d_parts[0],
        "D1": plan.d_parts[1],
        "DV0": plan.dv_parts[0],
        "DV1": plan.dv_parts[1],
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "ALIGN": 16 // itemsize if plan.aligned else 1,
        "SEARCH": plan.search_tiles,
        "SOFTCAP": plan.softcap,
        "CHUNKED": plan.chunked,
        "MASK_ALIGN": plan.mask_align,
        "ROTARY_DIM": plan.rotary[0],
        "INTERLEAVED": plan.rotary[1],
        "ROTARY_ALIGN": plan.rotary[2],
    }
    if plan.kernel == "prefill":
        values["TMA"] = plan.use_tma
    return values


def _allocate_descriptors(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _launch(
    plan: Plan,
    x: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    out_strides: tuple[int, ...],
    lse_strides: tuple[int, ...],
) -> None:
    ragged_q, paged = x.cu_seqlens_q is not None, x.page_table is not None
    ragged_k = x.cu_seqlens_k is not None and not paged
    # A paged cache's lengths may come as offsets: then they stand where a ragged cache's do.
    q_strides = (0, x.q.stride(0), x.q.stride(1)) if ragged_q else x.q.stride()[:3]
    k_strides = (0, x.k.stride(0), x.k.stride(1)) if ragged_k else x.k.stride()[:3]
    v_strides = (0, x.v.stride(0), x.v.stride(1)) if ragged_k else x.v.stride()[:3]
    page_size = x.k.shape[1] if paged else 1
    # tanh bounds the scores before the exponential: its factor takes the scale's place.
    scale, softcap_scale = (x.softcap, abs(x.scale) / x.softcap) if x.softcap > 0 else (x.scale, 0.0)
    slopes_stride = (
        x.alibi_slopes.stride(0) if x.alibi_slopes is not None and x.alibi_slopes.dim() == 2 else 0
    )
    arguments = (
        x.q,
        x.k,
        x.v,
        out,
        lse,
        x.cu_seqlens_q,
        x.cu_seqlens_k,
        x.seqused_q,
        x.seqused_k,
        x.page_table,
        0 if ragged_q else x.q.shape[1],
        0 if ragged_k or paged else x.k.shape[1],
        x.batch,
        max(1, plan.tiles_per_sequence),
        plan.fold,
        x.q.shape[-2] // x.k.shape[-2],
        *q_strides,
        *k_strides,
        *v_strides,
        *out_strides,
        *lse_strides,
        x.page_table.stride(0) if x.page_table is not None else 0,
        page_size,
        *division(page_size),
        OPEN_SIDE if x.window_left < 0 else min(x.window_left, OPEN_SIDE),
        OPEN_SIDE if x.window_right < 0 else min(x.window_right, OPEN_SIDE),
        int(x.bottom_right),
        -1.0 if x.scale < 0 else 1.0,
        abs(scale) * math.log2(math.e),
        softcap_scale,
        max(1, x.attention_chunk),
        x.tokens_per_split,
        x.sink,
        x.alibi_slopes,
        slopes_stride,
        _bytes(x.mask),
        *(x.mask.stride() if x.mask is not None else (0, 0, 0, 0)),
        _bytes(x.tree_mask),
        *(x.tree_mask.stride()[:2] if x.tree_mask is not None else (0, 0)),
        x.cache_batch_idx,
        x.cache_leftpad,
        x.rotary_cos,
        x.rotary_sin,
        x.rotary_positions,
        x.rotary_cos.stride(0) if x.rotary_cos is not None else 0,
        x.rotary_sin.stride(0) if x.rotary_sin is not None else 0,
        x.rotary_cos.shape[0] if x.rotary_cos is not None else 0,
        int(x.rotary_advances),
    )
    variant = constants(plan, x.q.shape[-1], x.v.shape[-1], x.q.element_size())
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    with _on_device(x.q):
        if plan.kernel == "decode":
            grid = (plan.tiles, plan.head_units, plan.num_splits)
            decode_kernel[grid](*arguments, **variant, **options)
        else:
            if plan.use_tma:
                triton.set_allocator(_allocate_descriptors)
            prefill_kernel[(plan.tiles, plan.head_units)](*arguments, **variant, **options)


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A bool mask as the bytes it is."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


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
