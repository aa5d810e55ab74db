"""A kernel that only reads: its speed is the ceiling of every kernel that must read as many bytes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["blocks"])
def read_kernel(source, sums, blocks, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read `blocks` blocks of BLOCK elements, each program every num_programs-th block, and keep one sum."""
    program = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for block in tl.range(program, blocks, tl.num_programs(0), num_stages=STAGES):
        start = tl.full((), BLOCK, tl.int64) * block
        total += tl.load(source + start + offsets).to(tl.float32)
    tl.store(sums + program, tl.sum(total, 0))


class ReadConfig(NamedTuple):
    """How the kernel is launched: elements of a block, warps, stages, programs per multiprocessor."""

    block: int
    warps: int
    stages: int
    programs: int


# No one of them is the fastest at every size, so the ceiling is the best of all.
CONFIGS = (
    ReadConfig(8192, 8, 3, 2),
    ReadConfig(8192, 8, 1, 4),
    ReadConfig(4096, 4, 4, 4),
    ReadConfig(4096, 4, 1, 8),
    ReadConfig(2048, 4, 1, 8),
)
LARGEST_BLOCK = max(c.block for c in CONFIGS)


def read(source: torch.Tensor, sums: torch.Tensor, config: ReadConfig, programs: int) -> None:
    """Read a flat bf16 tensor, its length a multiple of `config.block`. `sums` has room for `programs`."""
    blocks = source.numel() // config.block
    read_kernel[(programs,)](
        source, sums, blocks, BLOCK=config.block, STAGES=config.stages, num_warps=config.warps
    )
