"""Fixup: merge the states of one row, as flash_attn_combine does."""

import triton
import triton.language as tl

from headfold.kernels.parts.spans import find_row
from headfold.kernels.specialize import FIXUP_INTEGERS


@triton.jit(do_not_specialize=FIXUP_INTEGERS)
def fixup_kernel(
    PartialOut,
    PartialLse,
    Out,
    Lse,
    cu_seqlens,
    seqused,
    num_splits: tl.int32,
    rows: tl.int32,
    heads: tl.int32,
    batch: tl.int32,
    po_stride_split: tl.int64,
    po_stride_b: tl.int64,
    po_stride_s: tl.int64,
    po_stride_h: tl.int64,
    pl_stride_split: tl.int64,
    pl_stride_b: tl.int64,
    pl_stride_s: tl.int64,
    pl_stride_h: tl.int64,
    out_stride_b: tl.int64,
    out_stride_s: tl.int64,
    out_stride_h: tl.int64,
    lse_stride_b: tl.int64,
    lse_stride_s: tl.int64,
    lse_stride_h: tl.int64,
    HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Grid: (batch * rows * heads). States with LSE -inf are never read: their output may be anything.

    The order of summation depends on the number of splits alone, so results repeat bit for bit.
    """
    pid = tl.program_id(0).to(tl.int64)
    head = pid % heads
    seq = pid // heads // rows
    position = pid // heads - seq * rows
    if seqused is not None:
        if cu_seqlens is not None:
            owner, first = find_row(position, cu_seqlens, batch)
            live = position - first < tl.load(seqused + owner)
        else:
            live = position < tl.load(seqused + seq)
        if not live:
            return
    PartialOut += seq * po_stride_b + position * po_stride_s + head * po_stride_h
    PartialLse += seq * pl_stride_b + position * pl_stride_s + head * pl_stride_h
    split = tl.arange(0, MAX_SPLITS)
    all_lse = tl.load(PartialLse + split * pl_stride_split, mask=split < num_splits, other=float("-inf"))
    top = tl.max(all_lse, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(all_lse - top), 0)
    column = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        part_lse = tl.load(PartialLse + part * pl_stride_split, mask=part < num_splits, other=float("-inf"))
        weight = tl.exp(part_lse - top)
        rows_out = tl.load(
            PartialOut + part.to(tl.int64)[:, None] * po_stride_split + column[None, :],
            mask=(weight > 0.0)[:, None] & (column < HEAD_DIM_V)[None, :],
            other=0.0,
        ).to(tl.float32)
        acc += tl.sum(rows_out * weight[:, None], 0)
    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    Out += seq * out_stride_b + position * out_stride_s + head * out_stride_h
    tl.store(Out + column, (acc / safe_total).to(Out.dtype.element_ty), mask=column < HEAD_DIM_V)
    lse = tl.where(empty, float("-inf"), top + tl.log(safe_total))
    tl.store(Lse + seq * lse_stride_b + position * lse_stride_s + head * lse_stride_h, lse)
