"""Which sequences of a mixed batch are short: one launch before the kernels of both kinds."""

import triton
import triton.language as tl

from headfold.kernels.parts.address import pointer
from headfold.kernels.parts.spans import sequence_span

CHUNK: tl.constexpr = tl.constexpr(128)


@triton.jit(do_not_specialize=["Short", "Long", "cu_seqlens_q", "seqused_q", "batch", "most"])
def part_kernel(
    Short: tl.int64,
    Long: tl.int64,
    cu_seqlens_q: tl.int64,
    seqused_q: tl.int64,
    batch: tl.int32,
    most: tl.int32,
):
    """Grid: one program for 128 sequences. Short and Long (batch,) int32: a sequence's rows go to one, 0 to the other."""
    seq = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    live = seq < batch
    _, rows = sequence_span(tl.minimum(seq, batch - 1), cu_seqlens_q, seqused_q, 0)
    short = rows <= most
    tl.store(pointer(Short, tl.int32, 1) + seq, tl.where(short, rows, 0), mask=live)
    tl.store(pointer(Long, tl.int32, 1) + seq, tl.where(short, 0, rows), mask=live)
