"""Run a Plan through the Gluon kernel of Hopper GPUs: turn tensors into descriptors and arguments, nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch

from headfold.kernels.hopper.compat import TensorDescriptor
from headfold.kernels.hopper.layouts import shared_layout
from headfold.kernels.hopper.prefill import MAX_REGISTERS, prefill_kernel
from headfold.planner.plan import Plan
from headfold.problem import Inputs

# An open window side: above any position, and a sum with a position still fits 32 bits.
OPEN_SIDE = 2**30
# Stands for a softmax scale of 0: every score becomes 0 to the last bit, and a hidden one stays -inf.
NO_SCALE = 1e-30

_counters: dict[tuple[int, int], torch.Tensor] = {}


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Launch what the plan says. `out` (x.out_shape) and `lse` (x.lse_shape, float32) are written in full."""
    arguments, variant = launch_arguments(plan, x, out, lse)
    with torch.cuda.device(x.q.device):
        counter = _counter(x.q.device)
        prefill_kernel[(plan.workers,)](*arguments, counter, **variant)


def launch_arguments(
    plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's run-time arguments but the counter, and its compile-time ones with Triton's options."""
    rows, keys = plan.block_m // 2, plan.block_n
    mask, mask_steps = None, (0, 0)
    if x.mask is not None:
        dense = _unexpanded(x.mask)
        mask, mask_steps = boxes(dense, rows, keys), (int(dense.shape[0] > 1), int(dense.shape[1] > 1))
    arguments = (
        boxes(x.q.transpose(1, 2), rows, x.q.shape[3]),
        boxes(x.k.transpose(1, 2), keys, x.k.shape[3]),
        boxes(x.v.transpose(1, 2), keys, x.v.shape[3]),
        mask,
        out,
        lse,
        x.q.shape[1],
        x.k.shape[1],
        int(x.bottom_right),
        x.q.shape[2],
        x.q.shape[2] // x.k.shape[2],
        plan.tiles_per_sequence,
        plan.section,
        x.q.shape[0] * x.q.shape[2],
        OPEN_SIDE if x.window_left < 0 else min(x.window_left, OPEN_SIDE),
        OPEN_SIDE if x.window_right < 0 else min(x.window_right, OPEN_SIDE),
        *mask_steps,
        *(s // 8 for s in out.stride()[:3]),
        lse.stride(0),
        lse.stride(2),
        lse.stride(1),
        max(x.scale, NO_SCALE) * math.log2(math.e),
    )
    variant = {
        "HEAD_DIM": x.q.shape[3],
        "HEAD_DIM_V": x.v.shape[3],
        "BLOCK_N": keys,
        "STAGES": plan.num_stages,
        "MASKED": mask is not None,
        "num_warps": 4,
        "maxnreg": MAX_REGISTERS,
    }
    return arguments, variant


def boxes(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor for boxes (1, 1, rows, columns) of a tensor with four dimensions; what lies outside reads as 0."""
    vector = 16 // t.element_size()
    # The stride of a dimension of size 1 is never walked, but must be one that the copy engine takes.
    strides = [s if n > 1 else vector for n, s in zip(t.shape, t.stride(), strict=True)]
    strides[3] = 1
    layout = shared_layout(rows, columns, t.element_size() * 8, 4)
    return TensorDescriptor(t, list(t.shape), strides, [1, 1, rows, columns], layout)


def _unexpanded(mask: torch.Tensor) -> torch.Tensor:
    """A mask (b, h, sq, sk) with a size of 1 where batch or heads are expanded; a bool one as the bytes it is."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask[: None if mask.stride(0) else 1, : None if mask.stride(1) else 1]


def _counter(device: torch.device) -> torch.Tensor:
    """Two zeros for the launch at hand. The kernel leaves them at zero, so launches of a stream can share them.

    A captured launch gets its own, cleared by every replay: graphs may run beside each other.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return _counters[key]
