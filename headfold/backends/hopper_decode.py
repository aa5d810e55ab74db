"""The Gluon decode kernel of Hopper GPUs as `backends/triton.py` launches it: its program, and the boxes of K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headfold.backends.hopper import SWIZZLED, boxes, by_head
from headfold.kernels.hopper.compat import TensorDescriptor
from headfold.kernels.hopper.decode import REGISTERS, hopper_decode_kernel
from headfold.planner.hopper import CONSUMER_ROWS
from headfold.planner.plan import Plan
from headfold.problem import Inputs

# Of the Triton kernel's compile-time arguments, those that this kernel and the merge after it have too.
SHARED = ("ELEMENT", "HEAD_DIM", "HEAD_DIM_V", "BLOCK_M", "BLOCK_N", "ALIGN", "EARLY")


def program(
    plan: Plan, x: Inputs, constants: dict[str, Any], kernel: Any = hopper_decode_kernel
) -> tuple[Any, Callable[[Inputs], tuple[Any, ...]], dict[str, Any], dict[str, Any]]:
    """(kernel, the arguments before those of the Triton kernel, compile-time arguments, Triton's options)."""
    variant = {name: constants[name] for name in SHARED}
    consumers = plan.block_m // CONSUMER_ROWS
    at_start, of_producer = REGISTERS[consumers, max(plan.d_parts[0], plan.dv_parts[0]) > 128]
    variant |= {
        "TILE_D": plan.d_parts[0],
        "TILE_DV": plan.dv_parts[0],
        "STAGES": plan.num_stages,
        "PAGE_ROWS": plan.page_rows,
        "FETCH_REGISTERS": of_producer,
    }
    # num_warps are those of the first partition.
    options = {"num_warps": 4, "maxnreg": at_start, "enable_fp_fusion": True}
    rows = plan.page_rows or plan.block_n
    widths = [SWIZZLED // x.k.element_size()] * 2 if plan.page_rows else [plan.d_parts[0], plan.dv_parts[0]]
    like_k, like_v = (
        vars(boxes(by_head(t), rows, width)) | {"base": None}
        for t, width in zip((x.k, x.v), widths, strict=True)
    )
    count = plan.block_n // rows

    def first(x: Inputs) -> tuple[Any, ...]:
        return _at(like_k, x.k), _at(like_v, x.v), count

    return kernel, first, variant, options


def no_arguments(x: Inputs) -> tuple[int, ...]:
    """This kernel has no arguments for features, nor for new tokens."""
    return ()


def _at(like: dict[str, Any], base: torch.Tensor) -> TensorDescriptor:
    """A descriptor like the checked one of an earlier call that looked the same, of a tensor elsewhere.

    Its constructor takes 25 times as long, to check what that call's was checked for.
    """
    descriptor = object.__new__(TensorDescriptor)
    vars(descriptor).update(like, base=base)
    return descriptor
