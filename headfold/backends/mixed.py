"""Run a mixed batch: its short sequences as a decode, then the others as a prefill, neither of which sees the other's rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from headfold.backends import Runner, hopper, triton
from headfold.backends.launch import Launcher
from headfold.kernels.mixed import CHUNK, part_kernel
from headfold.planner import Plan
from headfold.problem import Inputs


class Parting:
    """The launch that parts calls that look like `x`: sequences of up to `most` queries, and the others."""

    def __init__(self, x: Inputs, most: int) -> None:
        self._launch = Launcher(part_kernel, (-(-x.batch // CHUNK.value),), {}, {"num_warps": 4}, x.q.device)
        self._most = most
        self.like = x.q.new_empty((x.batch,), dtype=torch.int32)  # of what a call returns

    def __call__(self, x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries of each sequence (b,) int32, 0 in the one where they count in the other."""
        batch = x.batch
        rows = x.q.new_empty((2, batch), dtype=torch.int32)
        at = rows.data_ptr()
        offsets = 0 if x.cu_seqlens_q is None else x.cu_seqlens_q.data_ptr()
        used = 0 if x.seqused_q is None else x.seqused_q.data_ptr()
        self._launch((at, at + 4 * batch, offsets, used, batch, self._most))
        return rows[0], rows[1]


def prepare(most: int, short: Runner, long: Runner, x: Inputs) -> Runner:
    """What runs calls that look like `x`: sequences of up to `most` queries through `short`, the others through `long`."""
    part = Parting(x, most)

    def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        few, many = part(x)
        # Decodes first: they are what a batch waits for.
        short(short_part(x, most, few), out, lse)
        long(replace(x, seqused_q=many), out, lse)

    return run


def short_part(x: Inputs, most: int, rows: torch.Tensor) -> Inputs:
    """The same call with `rows` (b,) of each sequence, at most `most`."""
    return replace(x, seqused_q=rows, max_seqlen_q=most)


def prepare_beside(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    """What runs calls that look like (x, out, lse) by a plan whose decodes and prefill run at the same time.

    The decode takes its multiprocessors first. The prefill is launched while it runs, takes the others, and those of the
    decode one by one as its programs end; the merge of the decode's states comes last.
    """
    assert plan.short is not None
    most = plan.short_queries
    part = Parting(x, most)
    decode = triton.decode_of(plan.short, short_part(x, most, part.like), out, lse)

    def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        lse = x.empty_lse() if lse is None else lse
        short, long = part(x)
        others = replace(x, seqused_q=long)
        tiles = hopper.list_tiles(plan, others)
        started = decode.start(short_part(x, most, short), out, lse)
        hopper.launch(plan, others, out, lse, tiles, beside=True)
        decode.finish(started)

    return run
