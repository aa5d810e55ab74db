"""The Gluon decode kernel of Hopper GPUs as `backends/triton.py` launches it: its program, and the boxes of K and V."""

from __future__ import annotations

from typing import Any

from headfold.backends.descriptors import Boxes, Descriptors
from headfold.backends.hopper import by_head, cache_boxes
from headfold.kernels.hopper.decode import COPYING_REGISTERS, REGISTERS, hopper_decode_kernel
from headfold.planner.hopper_decode import CONSUMER_ROWS
from headfold.planner.plan import Plan
from headfold.problem import Inputs

# Of the Triton kernel's compile-time arguments, those that this kernel and the merge after it have too.
SHARED = ("ELEMENT", "HEAD_DIM", "HEAD_DIM_V", "BLOCK_M", "BLOCK_N", "ALIGN", "EARLY")


def program(
    plan: Plan, x: Inputs, constants: dict[str, Any], kernel: Any = hopper_decode_kernel
) -> tuple[Any, Boxes, dict[str, Any], dict[str, Any]]:
    """(kernel, the arguments before those of the Triton kernel, compile-time arguments, Triton's options)."""
    variant = {name: constants[name] for name in SHARED}
    consumers = max(1, plan.block_m // CONSUMER_ROWS)
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
    k_boxes, v_boxes, *page_groups = cache_boxes(plan, by_head(x.k), by_head(x.v))
    variant["GROUPED"] = any(page_groups)
    if k_boxes is None or v_boxes is None:  # rows are copied
        return kernel, Boxes((None, None, 0, 0, 0)), variant, options
    numbers = (plan.block_n // (plan.page_rows or plan.block_n), *page_groups)
    return kernel, Boxes(numbers, Descriptors(k_boxes), Descriptors(v_boxes)), variant, options


def no_arguments(x: Inputs) -> tuple[int, ...]:
    """This kernel has no arguments for features, nor for new tokens."""
    return ()
