"""Run a Plan through the Triton kernels: turn tensors into launch arguments, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from headfold.backends.launch import launch
from headfold.kernels.decode import decode_kernel
from headfold.kernels.fixup import fixup_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.planner.plan import Plan
from headfold.planner.tiles import next_power_of_two
from headfold.problem import MAX_SPLITS, Inputs, has_features, wide_mask

# An open window side, and no chunk: above any position, and a sum with a position still fits 32 bits.
OPEN_SIDE = 2**30
ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# What address.py calls the elements of masks, sinks and angles.
KINDS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}
NO_FEATURES = (0,) * 26


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


def constants(plan: Plan, head_dim: int, head_dim_v: int, dtype: torch.dtype) -> dict[str, Any]:
    """The kernel's compile-time arguments: with warps and stages, all that a compiled variant depends on."""
    values: dict[str, Any] = {
        "ELEMENT": ELEMENTS[dtype],
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "D0": plan.d_parts[0],
        "D1": plan.d_parts[1],
        "DV0": plan.dv_parts[0],
        "DV1": plan.dv_parts[1],
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "PAGED": plan.paged,
        "ALIGN": 16 // dtype.itemsize if plan.aligned else 1,
        "FEATURED": plan.featured,
        "TENSORS": plan.tensor_mask,
        "ROTARY": plan.rotary,
        "WIDE": plan.wide_mask,
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
    arguments = (
        x.q.data_ptr(),
        x.k.data_ptr(),
        x.v.data_ptr(),
        out.data_ptr(),
        lse.data_ptr(),
        address(x.cu_seqlens_q),
        address(x.cu_seqlens_k),
        address(x.seqused_q),
        address(x.seqused_k),
        address(x.page_table),
        0 if ragged_q else x.q.shape[1],
        0 if ragged_k or paged else x.k.shape[1],
        x.batch,
        plan.tiles_per_sequence,
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
        x.attention_chunk or OPEN_SIDE,
        x.tokens_per_split,
        *_feature_arguments(x),
    )
    variant = constants(plan, x.q.shape[-1], x.v.shape[-1], x.q.dtype)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    if plan.kernel == "decode":
        grid: tuple[int, ...] = (plan.tiles, plan.head_units, plan.num_splits)
        launch(decode_kernel, grid, arguments, variant, options, x.q.device)
    else:
        if plan.use_tma:
            triton.set_allocator(_allocate_descriptors)
        launch(prefill_kernel, (plan.tiles, plan.head_units), arguments, variant, options, x.q.device)


def _feature_arguments(x: Inputs) -> tuple[int, ...]:
    """What a plain call has none of, from the kernels' `sink` to `rotary_advances`; 0 for what is not there."""
    if not has_features(x):
        return NO_FEATURES
    sink, slopes, mask, tree, cos, sin = (
        x.sink,
        x.alibi_slopes,
        x.mask,
        x.tree_mask,
        x.rotary_cos,
        x.rotary_sin,
    )
    return (
        address(sink),
        _kind(sink),
        address(slopes),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        address(mask),
        _kind(mask),
        int(wide_mask(x) > 0),
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
        address(tree),
        *(tree.stride()[:2] if tree is not None else (0, 0)),
        address(x.cache_batch_idx),
        address(x.cache_leftpad),
        address(cos),
        address(sin),
        _kind(cos),
        2 * cos.shape[1] if cos is not None else 0,
        int(x.rotary_interleaved),
        address(x.rotary_positions),
        cos.stride(0) if cos is not None else 0,
        sin.stride(0) if sin is not None else 0,
        cos.shape[0] if cos is not None else 0,
        int(x.rotary_advances),
    )


def address(t: torch.Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if t is None else t.data_ptr()


def _kind(t: torch.Tensor | None) -> int:
    """The kind of a tensor's elements as `kernels/parts/address.py` numbers them; 0 for none."""
    return 0 if t is None else KINDS[t.dtype]


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
