"""Plan: how one Problem will run. What the planner decided, and exactly what the backend launches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from headfold.planner.device import Device
from headfold.planner.work import visible_pairs, visible_tokens
from headfold.problem import Problem

Backend = Literal["cpu", "triton", "hopper"]
Kernel = Literal["decode", "prefill", "none"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a Problem runs on a Device. A pure function of both; launchers add nothing to it.

    `fold` heads of a group share a tile of `block_m` rows; a block is `block_n` keys. `head_units` is the
    number of tiles side by side in the head dimension (KV heads when the whole group is folded). `tiles` bounds
    the tiles of one head unit over the whole batch. `d_parts` and `dv_parts` cut a head dimension into two
    powers of two (the second 0 where one suffices), so that d = 96 does not pay for 128. `featured` asks for the
    program that knows more than plain attention, `tensor_mask` for one that reads masks too, `rotary` for one that
    turns q; `wide_mask` is the element size of the masks that it reads in wide loads, 0 for any. `workspace` is in bytes.
    `appends` is set where every program writes the new tokens of its share before it reads them.
    `own_tile` is set where the tile comes from the machine's own table.
    `mask_lists` counts the lists of blocks that a mask leaves alive, (sequences, head units, tiles), 1 where all share
    and 0 where no kernel makes them, `mask_list_blocks` the blocks that each may hold.
    `workers` programs of a persistent kernel share the tiles (0: a program each); `section` heads at a time have
    their K and V in the L2 cache; where it fetches pages, `page_rows` keys come in one box from one of them (1: each is
    copied by itself; 0: no pages). It has `query_stages` buffers of Q, `num_stages` of K and `value_stages` of V.
    `left_edge` asks for its program whose rows need not see a sequence's first keys, `softcap` for the one that caps scores.
    `short` is set for a mixed batch: the plan of its sequences of up to `short_queries` queries, which runs first, and
    this plan leaves those sequences out. With `beside` both run at the same time.
    How the CPU backend reads a Plan is said in `backends/cpu.py`.
    """

    backend: Backend
    kernel: Kernel
    fold: int = 1
    block_m: int = 0
    block_n: int = 0
    head_units: int = 0
    tiles: int = 0
    tiles_per_sequence: int = 0
    num_splits: int = 1
    stream: bool = False
    ranges: int = 0
    even_ranges: int = 0
    gap: int = 0
    extent: int = 0
    resident: int = 1
    own_tile: bool = False
    early: bool = False
    appends: bool = False
    num_warps: int = 4
    num_stages: int = 1
    value_stages: int = 0
    query_stages: int = 0
    d_parts: tuple[int, int] = (0, 0)
    dv_parts: tuple[int, int] = (0, 0)
    use_tma: bool = False
    search_tiles: bool = False
    aligned: bool = True
    paged: bool = False
    page_rows: int = 0
    left_edge: bool = False
    softcap: bool = False
    far: bool = False
    featured: bool = False
    tensor_mask: bool = False
    rotary: bool = False
    wide_mask: int = 0
    workspace: int = 0
    mask_lists: tuple[int, int, int] = (0, 0, 0)
    mask_list_blocks: int = 0
    workers: int = 0
    section: int = 0
    shared_memory: int = 0
    reasons: tuple[str, ...] = ()
    short_queries: int = 0
    short: Plan | None = None
    beside: bool = False

    @property
    def programs(self) -> int:
        """Programs that the main kernel launches."""
        if self.ranges:
            return self.ranges * self.lanes
        return self.tiles * self.head_units * self.num_splits

    @property
    def lanes(self) -> int:
        """Programs of a range: every tile of a sequence for every head unit; packed tiles come one at a time."""
        return self.head_units * max(1, self.tiles_per_sequence)

    @property
    def rows_paid(self) -> int:
        """Matmul rows that the tiles hold, used or not, over the whole batch."""
        return self.tiles * self.head_units * self.block_m

    @property
    def mask_list_bytes(self) -> int:
        """Bytes of all lists of live blocks, each with its length, 4 bytes a number."""
        return 4 * math.prod(self.mask_lists) * (self.mask_list_blocks + 1)

    def explain(self, problem: Problem, device: Device) -> str:
        """Say in plain words what will run and why. Lengths are taken at their bounds.

        Args:
            problem: the Problem this plan was made for.
            device: the Device this plan was made for.
        """
        lines = [_headline(problem)]
        if self.kernel == "none":
            return "\n".join(
                [*lines, "Nothing to compute: no query row, or no key. Outputs are filled, nothing runs."]
            )
        lines.append(f"Runs on {device.name} as the {self.backend} {self.kernel} kernel.")
        lines += [f"  {reason}" for reason in self.reasons]
        lines += [f"  {line}" for line in self._work_lines(problem, device)]
        if self.short is not None:
            when = "beside it" if self.beside else "before"
            lines.append(
                f"Sequences of up to {self.short_queries} queries run {when}, as the {self.short.backend} "
                f"{self.short.kernel} kernel."
            )
            lines += [f"  {reason}" for reason in self.short.reasons]
        return "\n".join(lines)

    def _work_lines(self, p: Problem, device: Device) -> list[str]:
        bytes_moved = bytes_to_move(p)
        flops = flops_of(p)
        read, compute = bytes_moved / device.bandwidth, flops / device.matmul_flops
        bound = "memory" if read >= compute else "arithmetic"
        lines = [
            f"must move {bytes_moved / 1e6:,.1f} MB and do {flops / 1e9:,.1f} GFLOP: bound by {bound}, "
            f"no faster than {max(read, compute) * 1e6:,.1f} us on this device"
            + (" (rough: a CPU's rates are estimates)" if device.is_cpu else ""),
        ]
        if self.backend == "cpu":
            return lines
        used = p.total_q * p.num_heads
        lines.insert(
            0,
            f"tile of {self.block_m} rows x block of {self.block_n} keys, {self.num_warps} warps, "
            f"{self.num_stages} stages, about {self.shared_memory / 1024:.0f} KB of shared memory",
        )
        lines.insert(
            1, f"rows used of rows paid for: {used} of {self.rows_paid} ({used / self.rows_paid:.0%})"
        )
        if self.workers:
            lines.append(
                f"{self.programs} tiles taken by {self.workers} programs"
                + (f", {self.resident} a multiprocessor" if self.resident > 1 else "")
                + ", the longest first, "
                f"{self.section} heads at a time"
            )
        else:
            slots = device.sms * self.resident
            waves = -(-self.programs // slots)
            busy = self.programs / (waves * slots)
            lines.append(
                f"{self.programs} programs on {device.sms} multiprocessors"
                + (f", {self.resident} on each" if self.resident > 1 else "")
                + f": {waves} "
                f"wave{'s' if waves > 1 else ''}, {1 - busy:.0%} of the last slots idle"
            )
        if self.mask_list_bytes:
            lists = math.prod(self.mask_lists)
            lines.append(
                f"blocks that the mask hides from all rows of a tile are left out: one more kernel lists the others, "
                f"{lists} list{'s' if lists > 1 else ''} of up to {self.mask_list_blocks} in "
                f"{self.mask_list_bytes / 1e6:,.2f} MB"
            )
        if self.workspace:
            states = f"{self.num_splits} states a row"
            if self.ranges and not self.extent:
                states = "states of the rows whose keys several ranges share"
            lines.append(
                f"fixup: {states} through {self.workspace / 1e6:,.2f} MB of workspace "
                f"({2 * self.workspace / bytes_moved:.1%} of the bytes, written and read once at the most)"
            )
        else:
            lines.append("fixup: none, every tile is finished by one program")
        return lines


def _headline(p: Problem) -> str:
    dims = f"d{p.head_dim}" if p.head_dim == p.head_dim_v else f"d{p.head_dim}/{p.head_dim_v}"
    mask = "no mask"
    if p.window_left is not None or p.window_right is not None:
        left = "open" if p.window_left is None else p.window_left
        right = "open" if p.window_right is None else p.window_right
        corner = "bottom-right" if p.bottom_right else "top-left"
        mask = f"window ({left}, {right}) aligned {corner}"
    paged = f", pages of {p.page_size}" if p.kv_layout == "paged" else ""
    return (
        f"{p.num_heads}:{p.num_kv_heads} heads (group of {p.group}), {dims}, {str(p.dtype).removeprefix('torch.')}, "
        f"batch {p.batch}, queries <= {p.max_seqlen_q} ({p.q_layout}), keys <= {p.max_seqlen_k} "
        f"({p.kv_layout}{paged}), {mask}"
    )


def bytes_to_move(p: Problem) -> int:
    """Bytes that must cross memory at the bounds: visible K and V once, q and the output once."""
    tokens = visible_tokens(p)
    kv = tokens * p.num_kv_heads * (p.head_dim + p.head_dim_v) * p.dtype.itemsize
    return kv + p.total_q * p.num_heads * (p.head_dim + p.head_dim_v) * p.dtype.itemsize


def flops_of(p: Problem) -> int:
    """Floating-point operations of both matrix products at the bounds, masked pairs left out."""
    return 2 * visible_pairs(p) * p.num_heads * (p.head_dim + p.head_dim_v)
