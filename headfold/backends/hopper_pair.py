"""Launch attention over shared prefixes and over what follows them, side by side, and the merge of their states."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from headfold.backends import Runner, hopper_decode
from headfold.backends.besides import OPEN_SIDE, address, division
from headfold.backends.launch import Launcher
from headfold.backends.triton import band, constants, lse_strides, out_strides, scales
from headfold.backends.workspace import workspace
from headfold.kernels.hopper.pair import hopper_pair_kernel
from headfold.kernels.pair_merge import pair_merge_kernel
from headfold.planner.pair import PairPlan
from headfold.planner.tiles import next_power_of_two
from headfold.problem import Inputs

# Programs that the merge has at the most, each of which takes rows of a tile in turn.
MERGE_PROGRAMS = 2048
MERGE_STATES = 16


Sources = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]


def prepare(
    plan: PairPlan,
    x: Inputs,
    out: torch.Tensor,
    lse: torch.Tensor,
    prefixes: torch.Tensor,
    pads: torch.Tensor,
    sources: Sources,
) -> Runner:
    """What runs a plan, for calls that look like (x, out, lse).

    Args:
        plan: the PairPlan.
        x, out, lse: checked inputs and where their results go.
        prefixes: (groups,) int32, lengths of the groups' prefixes.
        pads: (b,) int32, how many keys come before each sequence's own.
        sources: gives a call's first query of every group with the end, and the page table of the groups.
    """
    whole = plan.whole
    variant = constants(whole, x.q.shape[-1], x.v.shape[-1], x.q.dtype)
    kernel, boxes, variant, options = hopper_decode.program(whole, x, variant, hopper_pair_kernel)
    launch = Launcher(kernel, (plan.programs,), variant, options, x.q.device)
    merge_variant = {name: variant[name] for name in ("ELEMENT", "HEAD_DIM_V", "BLOCK_M", "ALIGN", "EARLY")}
    merge_variant |= {"WIDTH": next_power_of_two(x.v.shape[-1]), "STATES": MERGE_STATES}
    tiles = x.batch * plan.own.lanes
    programs = min(plan.own.state_rows, max(1, MERGE_PROGRAMS // tiles))
    merge = Launcher(pair_merge_kernel, (tiles, programs), merge_variant, {"num_warps": 1}, x.q.device)
    width = -(-x.v.shape[-1] // 8) * 8
    units = (whole.head_units, *division(whole.head_units))
    fold = (whole.fold, *division(whole.fold))
    by_group = division(x.q.shape[-2] // x.k.shape[-2])
    places = Places(plan, width)
    unwanted = lse.numel()  # floats where an LSE goes that nobody asked for
    _, right, _ = band(x)
    dense = x.cu_seqlens_q is None
    capacity = x.q.shape[1] if dense else 0
    strides = x.q.stride() if dense else (0, *x.q.stride())
    # Queries of a group lie behind one another.
    of_query = strides[0] if dense and capacity == 1 else strides[1]
    after = (strides[2], width, x.k.shape[1], scales(x)[1])
    results = (width, *out_strides(x, out), *lse_strides(x, lse))
    own, prefix = ((part.lanes, *division(part.lanes)) for part in (plan.own, plan.prefix))
    count = prefixes.shape[0]

    def run(x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        bounds, table = sources(x)
        memory = workspace(x.q, places.size if lse is not None else places.size + unwanted)
        lse_at = memory.data_ptr() + 4 * places.size if lse is None else lse.data_ptr()
        own_states, prefix_states = places.at(memory.data_ptr())
        assert x.page_table is not None
        launch(
            (
                *(*boxes.of(x.k, x.v), x.q.data_ptr(), whole.gap, *units, *fold, *by_group, *after),
                *(address(x.cu_seqlens_q), address(x.seqused_k), pads.data_ptr()),
                *(x.page_table.data_ptr(), x.page_table.stride(0), x.batch, capacity, *own),
                *(plan.own.weight, *own_states, strides[0], strides[1], right),
                *(bounds.data_ptr(), prefixes.data_ptr(), 0),
                *(table.data_ptr(), table.stride(0), count, 0, *prefix),
                *(plan.prefix.weight, *prefix_states, 0, of_query, OPEN_SIDE),
            )
        )
        merge(
            (
                *(out.data_ptr(), lse_at, *units, *fold, *results),
                *(address(x.cu_seqlens_q), capacity, *own[1:], bounds.data_ptr(), count),
                *(plan.own.lanes, *own_states, plan.prefix.lanes, *prefix_states),
            )
        )

    return run


class Places:
    """Where states, their LSEs and the ends of tiles lie in a workspace of `size` floats."""

    def __init__(self, plan: PairPlan, width: int) -> None:
        """`width` floats are a row of a state."""
        self._parts = (plan.own, plan.prefix)
        rows = [part.rows for part in self._parts]
        lses = width * sum(rows)
        ends = lses + sum(rows)
        self._offsets = (
            (0, 4 * lses, 4 * ends),
            (4 * width * rows[0], 4 * (lses + rows[0]), 4 * (ends + 2 * plan.own.tiles)),
        )
        self.size = ends + 2 * (plan.own.tiles + plan.prefix.tiles)

    def at(self, memory: int) -> Iterator[tuple[int, ...]]:
        """`states` to `state_rows` of both lists, in a workspace at address `memory`."""
        for part, offsets in zip(self._parts, self._offsets, strict=True):
            yield *(memory + n for n in offsets), part.uncut, part.state_rows
