"""Run a Plan through the Gluon kernel of Hopper GPUs: turn tensors into descriptors and arguments, nothing else."""

from __future__ import annotations

import math
from typing import Any

import torch

from headfold.backends.besides import OPEN_SIDE, address, division, kind
from headfold.backends.launch import Launcher, compile_instead, compiling
from headfold.kernels.hopper.compat import TensorDescriptor
from headfold.kernels.hopper.layouts import groups_layout, shared_layout
from headfold.kernels.hopper.prefill import MAX_REGISTERS, prefill_kernel
from headfold.kernels.tile_list import CHUNK, tile_list_kernel
from headfold.planner.hopper import GROUP_ROWS
from headfold.planner.plan import Plan
from headfold.problem import Inputs, k_capacity, q_capacity

# Stands for a softmax scale of 0: every score becomes 0 to the last bit, and a hidden one stays -inf.
NO_SCALE = 1e-30

# Bytes of a row of shared memory as it is swizzled.
SWIZZLED = 128
# Rows of a page from which on a prefill's boxes bring a swizzled row's columns of them, not whole rows.
MANY_ROWS = 64

# Launches captured into graphs, over the process's life, that find a counter without clearing one in every replay.
CAPTURED = 65536

# By device and stream; by device, one pair a captured launch, and how many are taken.
_counters: dict[tuple[int, int], torch.Tensor] = {}
_pairs: dict[int, torch.Tensor] = {}
_captured: dict[int, int] = {}


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Launch what the plan says. `out` (x.out_shape) and `lse` (x.lse_shape, float32) are written in full."""
    launch(plan, x, out, x.empty_lse() if lse is None else lse, list_tiles(plan, x))


def launch(
    plan: Plan,
    x: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    tile_list: torch.Tensor | None,
    beside: bool = False,
) -> None:
    """Launch the kernel; `tile_list` is what `list_tiles` returns.

    With `beside` it starts while the kernel before it runs, as soon as that one allows, and ends after it. What it reads must
    be there when that one starts.
    """
    arguments, variant = launch_arguments(plan, x, out, lse, tile_list)
    if beside:
        variant["launch_pdl"] = True
    if compiling():  # where no stream is, and so no counter
        zeros = x.q.new_empty(2, dtype=torch.int32)
        compile_instead(prefill_kernel, (plan.workers,), (*arguments, zeros), variant)
        return
    with torch.cuda.device(x.q.device):
        counter = _counter(x.q.device)
        prefill_kernel[(plan.workers,)](*arguments, counter, **variant)


def list_tiles(plan: Plan, x: Inputs) -> torch.Tensor | None:
    """Which sequences have how many tiles, (2 * b + 1,) int32 made on the device; None where no length lies there.

    Programs are a budget: softcap's are those for lengths on the device, whether there are any or not.
    """
    lengths = _lengths(x)
    if all(t is None for t in lengths) and not plan.softcap:
        return None
    found = x.q.new_empty(2 * x.batch + 1, dtype=torch.int32)
    grid = (-(-x.batch // CHUNK.value),)
    launch = Launcher(tile_list_kernel, grid, {}, {"num_warps": 8}, x.q.device)
    pointers = (0 if t is None else t.data_ptr() for t in (found, *lengths))
    launch((*pointers, q_capacity(x), k_capacity(x), x.batch, plan.block_m))
    return found


def launch_arguments(
    plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor, tile_list: torch.Tensor | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The kernel's run-time arguments but the counter, and its compile-time ones with Triton's options.

    `tile_list` is what `list_tiles` returns.
    """
    rows, keys = GROUP_ROWS, plan.block_n
    consumers = plan.block_m // rows
    copied = plan.page_rows == 1
    d, dv = sum(plan.d_parts), sum(plan.dv_parts)
    piece = SWIZZLED // x.q.element_size()
    q, k, v = (by_head(t) for t in (x.q, x.k, x.v))
    mask, mask_steps = None, (0, 0)
    if x.mask is not None:
        dense = _unexpanded(x.mask)
        mask, mask_steps = boxes(dense, rows, keys), (int(dense.shape[0] > 1), int(dense.shape[1] > 1))
    lengths = _lengths(x)
    given = [t is not None for t in lengths]
    ragged = x.cu_seqlens_q is not None
    out_strides = (0, *out.stride()[:2]) if ragged else out.stride()[:3]
    lse_strides = (
        (0, lse.stride(1), lse.stride(0)) if ragged else (lse.stride(0), lse.stride(2), lse.stride(1))
    )
    chunk = x.attention_chunk or OPEN_SIDE
    # tanh bounds the scores before the exponential: twice the cap takes the scale's place (`kernels/hopper/softmax.py`).
    scale, cap_factor = max(x.scale, NO_SCALE), 0.0
    if plan.softcap:
        scale, cap_factor = 2 * x.softcap, 2 * math.log2(math.e) * x.scale / x.softcap
    k_boxes, v_boxes, *page_groups = cache_boxes(plan, k, v)
    arguments = (
        boxes(q, rows, _width(plan.d_parts, piece)),
        k_boxes,
        v_boxes,
        mask,
        boxes(by_head(out), rows, _box_columns(plan, piece)) if _sent(plan, x) else None,
        out,
        lse,
        *(_any(t, (*lengths, tile_list)) for t in lengths),
        *(int(one) for one in given),
        q.shape[2],
        k.shape[2],
        int(x.bottom_right),
        q.shape[1],
        q.shape[1] // k.shape[1],
        plan.tiles_per_sequence,
        plan.section,
        x.batch * q.shape[1],
        OPEN_SIDE if x.window_left < 0 else min(x.window_left, OPEN_SIDE),
        OPEN_SIDE if x.window_right < 0 else min(x.window_right, OPEN_SIDE),
        *(chunk, *division(chunk)),
        *(address(x.sink), kind(x.sink)),
        *mask_steps,
        *(s // 8 for s in out_strides),
        *lse_strides,
        scale * math.log2(math.e),
        cap_factor,
        x.page_table,
        0 if x.page_table is None else x.page_table.stride(0),
        k.shape[2],
        keys // (plan.page_rows or keys),
        *page_groups,
        *((x.k, x.v) if copied else (None, None)),
        *(t.stride(i) // 8 for t in (k, v) for i in (0, 2, 1)),
        tile_list,
    )
    variant = {
        "HEAD_DIM": d,
        "HEAD_DIM_V": dv,
        "COLUMNS_K": x.k.shape[-1] if copied else d,
        "COLUMNS": x.v.shape[-1],
        "BLOCK_N": keys,
        "STAGES": plan.num_stages,
        "Q_STAGES": plan.query_stages,
        "VALUES": plan.value_stages,
        "MASKED": mask is not None,
        "VARLEN": tile_list is not None,
        "LEFT": plan.left_edge,
        "SOFTCAP": plan.softcap,
        "PAGE_ROWS": plan.page_rows,
        "FAR": plan.far,
        "GROUPED": any(page_groups),
        "GROUPS": consumers,
        "num_warps": 4,
        "maxnreg": MAX_REGISTERS[consumers, plan.resident],
        "enable_fp_fusion": True,  # Triton's default up to 3.9
    }
    return arguments, variant


def _lengths(x: Inputs) -> tuple[torch.Tensor | None, ...]:
    """What says on the device where sequences begin and end."""
    return x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k


def _sent(plan: Plan, x: Inputs) -> bool:
    """Whether results leave through the copy engine; of ragged batches those that fill a consumer's rows.

    Beside masks, and where blocks of 128 keys are wider than 128, results lie where the queries do, which cannot wait for it.
    """
    short = sum(plan.d_parts) > 128 and plan.block_n > 64
    return not short and x.mask is None


def _box_columns(plan: Plan, piece: int) -> int:
    """Columns of a box of results: those that are staged in one piece."""
    first, rest = plan.dv_parts
    return piece if rest else min(first, 128)


def by_head(t: torch.Tensor) -> torch.Tensor:
    """(batch, heads, rows, columns), a view; ragged tensors have one batch entry."""
    return (t if t.dim() == 4 else t.unsqueeze(0)).transpose(1, 2)


def _any(t: torch.Tensor | None, others: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    """`t`, or in its place a pointer that is not followed, so that calls that lack some lengths share a variant."""
    return t if t is not None else next((one for one in others if one is not None), None)


def boxes(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor for boxes (1, 1, rows, columns) of a tensor with four dimensions; what lies outside reads as 0."""
    vector = 16 // t.element_size()
    # The stride of a dimension of size 1 is never walked, but must be one that the copy engine takes.
    strides = [s if n > 1 else vector for n, s in zip(t.shape, t.stride(), strict=True)]
    strides[3] = 1
    layout = shared_layout(rows, columns, t.element_size() * 8, 4)
    return TensorDescriptor(t, list(t.shape), strides, [1, 1, rows, columns], layout)


def cache_boxes(
    plan: Plan, k: torch.Tensor, v: torch.Tensor
) -> tuple[TensorDescriptor | None, TensorDescriptor | None, int, int]:
    """How K and V (batch or pages, heads, rows, columns) are fetched.

    (boxes of K, of V, None where rows are copied one by one; groups of 8 rows from one page of K and of V to the next where
    boxes bring whole rows, else 0.)
    """
    if plan.page_rows == 1:
        return None, None, 0, 0
    rows, piece = plan.page_rows or plan.block_n, SWIZZLED // k.element_size()
    if _in_groups(plan) and whole(k, piece) and whole(v, piece):
        k_groups, v_groups = (t.stride(0) // (8 * t.stride(2)) for t in (k, v))
        return groups(k, rows, piece), groups(v, rows, piece), k_groups, v_groups
    # Boxes of pages go into shared memory one by one: they are as wide as what lies there in one piece.
    k_width, v_width = (
        piece if plan.page_rows else _width(one, piece) for one in (plan.d_parts, plan.dv_parts)
    )
    return boxes(k, rows, k_width), boxes(v, rows, v_width), 0, 0


def _in_groups(plan: Plan) -> bool:
    """Whether boxes are to bring whole rows of pages.

    In prefills of heads up to 128 not 64 at once. 32:8 d128 b4 8192, causal, in pages of 64 takes 3619 us with whole rows, 3580
    with boxes of a swizzled row's columns, in pages of 256 3626 and 3582, d64 2382 and 2366, 512 queries on 16384 keys in pages
    of 64 906 and 898.
    """
    few = plan.page_rows < MANY_ROWS or max(plan.d_parts[0], plan.dv_parts[0]) > 128
    return plan.page_rows > 0 and (plan.kernel == "decode" or few)


def _width(columns: tuple[int, int], piece: int) -> int:
    """Columns of a box of rows that are no pages': all where they lie in one part, else those of a swizzled row."""
    first, rest = columns
    return piece if rest else first


def whole(t: torch.Tensor, piece: int) -> bool:
    """Whether one box can bring whole rows of a page of a cache (pages, heads, rows, columns)."""
    return t.shape[3] in (piece, 2 * piece, 4 * piece) and t.stride(0) % (8 * t.stride(2)) == 0


def groups(t: torch.Tensor, rows: int, piece: int) -> TensorDescriptor:
    """A descriptor for boxes of `rows` whole rows of a paged cache, in groups of 8 that are counted across pages."""
    per_page = t.stride(0) // (8 * t.stride(2))
    count = (t.shape[0] - 1) * per_page + t.shape[2] // 8
    pieces = t.shape[3] // piece
    shape = [t.shape[1], count, pieces, 8, piece]
    head = t.stride(1) if t.shape[1] > 1 else 8
    strides = [head, 8 * t.stride(2), piece, t.stride(2), 1]
    layout = groups_layout(t.element_size() * 8)
    return TensorDescriptor(t, shape, strides, [1, rows // 8, pieces, 8, piece], layout)


def _unexpanded(mask: torch.Tensor) -> torch.Tensor:
    """A mask (b, h, sq, sk) with a size of 1 where batch or heads are expanded; a bool one as the bytes it is."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    return mask[: None if mask.stride(0) else 1, : None if mask.stride(1) else 1]


def _counter(device: torch.device) -> torch.Tensor:
    """Two zeros for the launch at hand; the kernel leaves them at zero when it ends.

    So launches of a stream share a pair. A captured launch has one to itself for good: graphs may run beside each
    other. Those pairs are cleared once, before any capture; when they are used up, or nothing ran before a capture,
    the graph clears a pair of its own in every replay.
    """
    index = torch.cuda.current_device()
    if torch.cuda.is_current_stream_capturing():
        used = _captured.get(index, CAPTURED)
        if used == CAPTURED:
            return torch.zeros(2, dtype=torch.int32, device=device)
        _captured[index] = used + 1
        return _pairs[index][used, :2]  # 16 bytes apart
    key = (index, torch.cuda.current_stream().cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(2, dtype=torch.int32, device=device)
    if index not in _pairs:
        _pairs[index] = torch.zeros(CAPTURED, 4, dtype=torch.int32, device=device)
        torch.cuda.current_stream().synchronize()  # once a process: a graph may run on any stream
        _captured[index] = 0
    return _counters[key]
