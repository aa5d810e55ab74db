"""Run a mixed batch: its short sequences as a decode, then the others as a prefill, neither of which sees the other's rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from headfold.backends import Runner
from headfold.backends.launch import Launcher
from headfold.kernels.mixed import CHUNK, part_kernel
from headfold.problem import Inputs


def prepare(most: int, short: Runner, long: Runner, x: Inputs) -> Runner:
    """What runs calls that look like `x`: sequences of up to `most` queries through `short`, the others through `long`."""
    batch = x.batch
    launch = Launcher(part_kernel, (-(-batch // CHUNK.value),), {}, {"num_warps": 4}, x.q.device)

    def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        rows = x.q.new_empty((2, batch), dtype=torch.int32)
        at = rows.data_ptr()
        offsets = 0 if x.cu_seqlens_q is None else x.cu_seqlens_q.data_ptr()
        used = 0 if x.seqused_q is None else x.seqused_q.data_ptr()
        launch((at, at + 4 * batch, offsets, used, batch, most))
        # Decodes first: they are what a batch waits for.
        short(short_part(x, most, rows[0]), out, lse)
        long(replace(x, seqused_q=rows[1]), out, lse)

    return run


def short_part(x: Inputs, most: int, rows: torch.Tensor) -> Inputs:
    """The same call with `rows` (b,) of each sequence, at most `most`."""
    return replace(x, seqused_q=rows, max_seqlen_q=most)
