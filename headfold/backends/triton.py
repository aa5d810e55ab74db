"""Run a Plan through the Triton kernels: turn tensors into launch arguments, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from headfold.appending import AppendingInputs
from headfold.backends import Runner, besides, hopper_decode
from headfold.backends.besides import OPEN_SIDE, address, division, tensor_arguments
from headfold.backends.decode_calls import Decode
from headfold.backends.descriptors import Boxes
from headfold.backends.launch import Launcher
from headfold.kernels.decode import decode_kernel
from headfold.kernels.mask_blocks import mask_blocks_kernel
from headfold.kernels.merge import merge_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.planner.device import interpreter_requested
from headfold.planner.plan import Plan
from headfold.planner.tiles import next_power_of_two
from headfold.problem import Inputs, has_features, is_aligned, k_capacity, q_capacity, wide_mask

ELEMENTS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Columns that a program of the merge kernel takes: narrow, and of one warp, so that all its loads are in flight at once.
# Over the loop alone 32:8 b1 s8192 takes 1.8 us, 3.6 with 128 columns and 4 warps.
MERGE_WIDTH = 32
# Programs that it has at the most, each of which takes rows in turn, and of a stream, where few tiles have anything to
# merge, but at least MERGE_LEAST a tile: 32 rows of 32:8 b16 s8192 with lengths on the device take 7.7 us with a program
# each, 2 in 8 a tile; 256 rows in 8 splits of a prefix of 8192 keys 13 us in 8192 programs, 10 in 2048.
MERGE_PROGRAMS = 2048
MERGE_STREAM = 512
MERGE_LEAST = 8
# States that it merges at a time, or four times as many: 64 splits of d256 take 15 us with 64, 19 with 16.
FEW_STATES = 16
# Keys of a mask that a program of the mask_blocks kernel looks at together, by the size of an element: as many as its
# registers hold.
MASK_KEYS = {1: 512, 2: 256, 4: 256}


def prepare(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    """What runs a plan, for a call that looks like (x, out, lse) in all that `prepared.facts_of` looks at.

    It takes such a call's inputs, `out` (x.out_shape) and `lse` (x.lse_shape, float32), and writes both in full. All
    that does not lie at an address of its own is turned into launch arguments here, once.
    """
    if plan.kernel == "prefill":
        return _prefill(plan, x, out, lse)
    return decode_of(plan, x, out, lse)


def out_strides(x: Inputs, t: torch.Tensor) -> tuple[int, int, int]:
    """(batch, position, head) strides of a tensor laid out as q; ragged rows have no batch."""
    return t.stride()[:3] if x.cu_seqlens_q is None else (0, t.stride(0), t.stride(1))  # type: ignore[return-value]


def lse_strides(x: Inputs, t: torch.Tensor) -> tuple[int, int, int]:
    """(batch, position, head) strides of an LSE (b, h, sq) or (h, total_q)."""
    if x.cu_seqlens_q is None:
        return t.stride(0), t.stride(2), t.stride(1)
    return 0, t.stride(1), t.stride(0)


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
    else:
        values["STREAM"] = plan.stream
        values["EARLY"] = plan.early and not interpreter_requested()
        values["APPENDS"] = plan.appends
        # Without new tokens the same for every model.
        values |= {"ANGLE": ELEMENTS[dtype], **rotary_constants(None, None, False)}
    return values


def rotary_constants(cos: torch.Tensor | None, sin: torch.Tensor | None, interleaved: bool) -> dict[str, Any]:
    """The compile-time arguments of `load_rotated`; ROTARY_DIM 0 without angles.

    ROTARY_DIM is one, since a model has one and the loads of a pair's other half are wide only if it is known.
    """
    if cos is None or sin is None:
        return {"ROTARY_DIM": 0, "INTERLEAVED": False, "ROTARY_ALIGN": 1}
    align = 16 // cos.element_size() if is_aligned(cos) and is_aligned(sin) else 1
    return {"ROTARY_DIM": 2 * cos.shape[1], "INTERLEAVED": interleaved, "ROTARY_ALIGN": align}


def _allocate_descriptors(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _prefill(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    numbers = (
        *_capacities(x),
        x.batch,
        plan.tiles_per_sequence,
        plan.fold,
        x.q.shape[-2] // x.k.shape[-2],
        *_input_strides(x),
        0,
        *out_strides(x, out),
        0,
        *lse_strides(x, lse),
        *_pages(x),
        *band(x),
        *scales(x),
        x.attention_chunk or OPEN_SIDE,
        0,
    )
    variant = constants(plan, x.q.shape[-1], x.v.shape[-1], x.q.dtype)
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    launch = Launcher(prefill_kernel, (plan.tiles, plan.head_units), variant, options, x.q.device)
    feature_arguments = besides.feature_arguments if has_features(x) else besides.no_features
    live_blocks = _no_lists if x.mask is None else _live_blocks(plan, x, x.mask)

    def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        lse = x.empty_lse() if lse is None else lse
        if plan.use_tma:
            triton.set_allocator(_allocate_descriptors)
        lists = live_blocks(x)
        steps = (0, 0, 0) if lists is None else _steps(lists)
        tensors = tensor_arguments(x, out, lse.data_ptr(), x.seqused_k)
        launch((*tensors, *numbers, *feature_arguments(x), address(lists), *steps))

    return run


def _no_lists(x: Inputs) -> torch.Tensor | None:
    """`_live_blocks` of a call without a mask."""
    return None


def _live_blocks(plan: Plan, x: Inputs, mask: torch.Tensor) -> Callable[[Inputs], torch.Tensor | None]:
    """What lists the blocks that a mask leaves alive, in lists (*plan.mask_lists, 1 + plan.mask_list_blocks)."""
    sequences, units, tiles = plan.mask_lists
    shape = (*plan.mask_lists, 1 + plan.mask_list_blocks)
    before = (shape[3], units, tiles)
    numbers = (x.q.shape[1], x.k.shape[1], plan.fold, *band(x), x.attention_chunk or OPEN_SIDE)
    kind = (besides.kind(mask), *_steps(mask), mask.stride(3))
    size = mask.element_size()
    variant = {
        "SIZE": size,
        "WIDE": wide_mask(x) > 0,
        "BLOCK_M": plan.block_m,
        "BLOCK_N": plan.block_n,
        "KEYS": MASK_KEYS[size],
    }
    grid = (sequences * units * tiles,)
    launch = Launcher(mask_blocks_kernel, grid, variant, {"num_warps": 8}, x.q.device)

    def run(x: Inputs) -> torch.Tensor | None:
        lists = x.q.new_empty(shape, dtype=torch.int32)
        lengths = (address(x.seqused_q), address(x.seqused_k), address(x.cache_leftpad))
        launch((lists.data_ptr(), *before, *lengths, *numbers, address(x.mask), *kind))
        return lists

    return run


def _steps(t: torch.Tensor) -> tuple[int, ...]:
    """The first three strides of a tensor, 0 where there is nothing to step to."""
    return tuple(s if n > 1 else 0 for n, s in zip(t.shape[:3], t.stride()[:3], strict=True))


def decode_of(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> Decode:
    """What runs a decode and merges its states, for calls that look like (x, out, lse)."""
    items = plan.tiles // max(1, plan.tiles_per_sequence)  # sequences, or packed tiles
    lanes = plan.lanes
    width, rows, count = 0, 0, 0
    if plan.workspace:
        width, rows = -(-x.v.shape[-1] // 8) * 8, min(plan.block_m, _rows(x) * plan.fold)
        count = plan.workspace // (4 * (width + 1))
    capacities = _capacities(x)
    growth = (x.early_new, k_capacity(x)) if x.early_lengths is not None else (0, OPEN_SIDE)
    new_tokens: Callable[[Inputs], tuple[int, ...]] = besides.no_new_tokens
    variant = constants(plan, x.q.shape[-1], x.v.shape[-1], x.q.dtype)
    if isinstance(x, AppendingInputs):
        growth, new_tokens = besides.new_tokens(x)
        variant |= rotary_constants(x.rotary_cos, x.rotary_sin, x.rotary_interleaved)
        if x.rotary_cos is not None:
            variant["ANGLE"] = ELEMENTS[x.rotary_cos.dtype]
    schedule = (
        x.batch,
        plan.tiles_per_sequence,
        *(plan.head_units, *division(plan.head_units)),
        *(lanes, *division(lanes)),
        plan.num_splits,
    )
    extents = (plan.extent, -(-plan.extent // plan.block_n))
    cuts = (plan.ranges, plan.even_ranges, plan.gap)
    fold = (width, rows, plan.fold, *division(plan.fold))
    results = (*out_strides(x, out), *lse_strides(x, lse))
    sides = band(x)
    chunk = x.attention_chunk or OPEN_SIDE
    order = (*schedule, *division(plan.num_splits), *cuts, _ahead(x), *extents)
    before = (*capacities, *growth, int(_reads_late(x)), *order)
    after = (
        *fold,
        *division(x.q.shape[-2] // x.k.shape[-2]),
        *_input_strides(x),
        *results,
        *_pages(x),
        *sides,
        *scales(x),
        chunk,
    )
    kernel, boxes = decode_kernel, Boxes()
    options = {"num_warps": plan.num_warps, "num_stages": plan.num_stages}
    feature_arguments: Callable[[Inputs], tuple[int, ...]] = besides.no_features
    if plan.appends and not plan.featured and x.rotary_cos is not None:
        feature_arguments = besides.rotation_alone(x)
    elif has_features(x):
        feature_arguments = besides.feature_arguments
    if plan.backend == "hopper":  # the same arguments without features, behind the boxes of K and V
        kernel, boxes, variant, options = hopper_decode.program(plan, x, variant)
        feature_arguments = new_tokens = hopper_decode.no_arguments
    ranges = plan.ranges or items * plan.num_splits
    launch = Launcher(kernel, (ranges * lanes,), variant, options, x.q.device)
    merge_before = (*capacities, *growth, *schedule, *cuts, *extents)
    merge_after = (*fold, *results, *sides, chunk)

    def others(x: Inputs) -> tuple[int, ...]:
        return *feature_arguments(x), *new_tokens(x)

    def arguments(
        boxes: tuple[Any, ...], tensors: tuple[int, ...], states: tuple[int, ...], others: tuple[int, ...]
    ) -> tuple[Any, ...]:
        return *boxes, *tensors, *before, *states, *after, *others

    def merge_arguments(tensors: tuple[int, ...], leftpad: int, states: tuple[int, ...]) -> tuple[int, ...]:
        return *tensors[3:9], leftpad, *merge_before, *states, *merge_after

    return Decode(
        launch=launch,
        arguments=arguments,
        boxes=boxes,
        besides=others,
        merge=_merge(plan, x, variant, items * lanes, rows) if plan.workspace else None,
        merge_arguments=merge_arguments,
        state_floats=count * width,
        floats=count * (width + 1),
        unwanted=lse.numel(),
    )


def _reads_late(x: Inputs) -> bool:
    """True where what a decode reads to know its share may come from the kernel just before it."""
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k, x.cache_leftpad)
    return x.early_lengths is None and any(t is not None for t in lengths)


def _ahead(x: Inputs) -> int:
    """1 where a decode asks for its first block of K and V before the kernel before it has ended, 0 where their rows are known
    too late, or by pages or picked rows.

    32:8 b1 s8192 takes 13.6 us with no block, 12.5 with 1, 13.0 with 2, 14.6 with 4; 16:2 d256 b1 s16384 15.0, 14.0, 14.9,
    16.3; calls of 500 MB do not change.
    """
    return int(not _reads_late(x) and x.page_table is None and x.cache_batch_idx is None)


def _merge(plan: Plan, x: Inputs, variant: dict[str, Any], tiles: int, rows: int) -> Launcher:
    """The launcher of what follows a decode whose tiles several programs share; `rows` is the height of a state."""
    # A stream has many rows, of which few are merged: each program looks for its sequence, so there are few programs.
    wide = plan.ranges > 0 or plan.extent > 0
    # With fixed extents always the same: the order of summation must not depend on how long a sequence may be.
    few = plan.num_splits <= FEW_STATES or plan.extent > 0
    wide = wide or (few and tiles * rows * -(-x.v.shape[-1] // MERGE_WIDTH) > MERGE_PROGRAMS)
    width = next_power_of_two(x.v.shape[-1]) if wide else MERGE_WIDTH
    columns = -(-x.v.shape[-1] // width)
    most = MERGE_STREAM if plan.ranges > 0 else MERGE_PROGRAMS
    programs = min(rows, max(MERGE_LEAST, most // (tiles * columns)))
    shared = ("ELEMENT", "HEAD_DIM_V", "BLOCK_M", "BLOCK_N", "ALIGN", "EARLY")
    merge_variant = {name: variant[name] for name in shared} | {
        "WIDTH": width,
        "STATES": FEW_STATES if few else 4 * FEW_STATES,
    }
    grid = (tiles, columns * programs)
    return Launcher(merge_kernel, grid, merge_variant, {"num_warps": 1 if few else 2}, x.q.device)


def _rows(x: Inputs) -> int:
    """Query positions of the longest sequence, at its bound."""
    capacity = q_capacity(x)
    return capacity if x.max_seqlen_q is None else min(x.max_seqlen_q, capacity)


def _capacities(x: Inputs) -> tuple[int, int]:
    """`sq_capacity` and `sk_capacity`."""
    ragged_k = x.cu_seqlens_k is not None or x.page_table is not None
    return (
        0 if x.cu_seqlens_q is not None else x.q.shape[1],
        0 if ragged_k else x.k.shape[1],
    )


def _input_strides(x: Inputs) -> tuple[int, ...]:
    """`q_stride_b` to `v_stride_h`. A paged cache's lengths may come as offsets, where a ragged cache's stand."""
    ragged_k = x.cu_seqlens_k is not None and x.page_table is None
    strides: list[int] = []
    for t, ragged in ((x.q, x.cu_seqlens_q is not None), (x.k, ragged_k), (x.v, ragged_k)):
        strides += (0, t.stride(0), t.stride(1)) if ragged else t.stride()[:3]
    return tuple(strides)


def _pages(x: Inputs) -> tuple[int, ...]:
    """`table_stride` to `page_shift`."""
    page_size = x.k.shape[1] if x.page_table is not None else 1
    return (x.page_table.stride(0) if x.page_table is not None else 0, page_size, *division(page_size))


def band(x: Inputs) -> tuple[int, int, int]:
    """`window_left`, `window_right` and `bottom_right`."""
    return (
        OPEN_SIDE if x.window_left < 0 else min(x.window_left, OPEN_SIDE),
        OPEN_SIDE if x.window_right < 0 else min(x.window_right, OPEN_SIDE),
        int(x.bottom_right),
    )


def scales(x: Inputs) -> tuple[float, float, float]:
    """`sign`, `scale_log2` and `softcap_scale`."""
    # tanh bounds the scores before the exponential: its factor takes the scale's place.
    scale, softcap_scale = (x.softcap, abs(x.scale) / x.softcap) if x.softcap > 0 else (x.scale, 0.0)
    return -1.0 if x.scale < 0 else 1.0, abs(scale) * math.log2(math.e), softcap_scale
