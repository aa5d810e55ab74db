"""The Gluon decode kernel of Hopper GPUs as `backends/triton.py` launches it: its program, and the boxes of K and V."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from headfold.backends.descriptors import Descriptors
from headfold.backends.hopper import SWIZZLED, boxes, by_head, groups, whole
from headfold.kernels.hopper.decode import COPYING_REGISTERS, REGISTERS, hopper_decode_kernel
from headfold.planner.hopper_decode import CONSUMER_ROWS
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
        "FETCH_REGISTERS": max(of_producer, COPYING_REGISTERS) if plan.page_rows == 1 else of_producer,
    }
    # num_warps are those of the first partition.
    options = {"num_warps": 4, "maxnreg": at_start, "enable_fp_fusion": True}
    rows = plan.page_rows or plan.block_n
    piece = SWIZZLED // x.k.element_size()
    k, v = by_head(x.k), by_head(x.v)
    grouped = plan.page_rows > 1 and whole(k, piece) and whole(v, piece)
    variant["GROUPED"] = grouped
    if plan.page_rows == 1:  # copied row by row, which takes no boxes
        return kernel, _no_boxes, variant, options
    if grouped:
        described = groups(k, rows, piece), groups(v, rows, piece)
    else:
        widths = (piece, piece) if plan.page_rows else (plan.d_parts[0], plan.dv_parts[0])
        described = boxes(k, rows, widths[0]), boxes(v, rows, widths[1])
    at_k, at_v = (Descriptors(one) for one in described)
    numbers = (plan.block_n // rows, *(t.stride(0) // (8 * t.stride(2)) if grouped else 0 for t in (k, v)))

    def first(x: Inputs) -> tuple[Any, ...]:
        return at_k(x.k), at_v(x.v), *numbers

    return kernel, first, variant, options


def _no_boxes(x: Inputs) -> tuple[Any, ...]:
    """The arguments before those of the Triton kernel where no box is fetched."""
    return None, None, 0, 0, 0


def no_arguments(x: Inputs) -> tuple[int, ...]:
    """This kernel has no arguments for features, nor for new tokens."""
    return ()
