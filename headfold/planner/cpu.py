"""Plans for the CPU backend."""

from __future__ import annotations

from typing import Literal

import torch

from headfold.planner.plan import Plan
from headfold.problem import Problem

# Folding wins up to these: it fills the kernel's 32-row blocks and reads K and V once for the group. s4096, CPU
# ms of one thread, as queries / folded: bf16 16:1 heads x 32 queries 12.7 / 6.0, 4:1 x 16 11.1 / 8.0, 4:1 x 64
# 14.4 / 15.7 (level); fp32 16:1 x 16 14.3 / 9.5, 4:1 x 64 58 / 47. SDPA on 64 or more queries is level.
DECODE_ROWS = 256
DECODE_QUERIES = 64
# Keys of one split. bf16 32:8 b1 s8192: 512 to 8192 keys are level (1.9 to 2.05 ms); smaller splits have more
# states to merge, larger ones leave fewer to share out over the threads.
SPLIT_KEYS = 1024
# States that one call leaves to merge may be this fraction of K and V.
STATE_SHARE = 20
# Rows from which PyTorch's bf16 kernel copies the K and V of a call into AMX order: a call over 33.6 MB of them
# held 0.3 MB at 32 rows and 34.2 MB at 64; fp16 and fp32 never did.
PACKED_ROWS = 64
# What one call copies may be this fraction of K and V. Pages are gathered and then packed: twice 1/32.
COPY_SHARE = 32
# Keys of one split of a prefill: pages are gathered a split at a time, and each split merges the output once more.
PREFILL_SPLIT_KEYS = 4096
# Keys from which a prefill that copies K and V goes head by head, so that one head's copy is held at a time. Below,
# the copy is small and the threads' barriers are not: bf16 32:8, of SDPA's speed in 8 parts / in 1, s1024 causal
# 0.80 / 0.98, full 0.81 / 0.94; s2048 causal 1.00 / 0.96, full 0.97 / 0.98.
PART_KEYS = 2048
# Queries of one additive mask in a prefill: the kernel's own largest block. So many folded rows are a block too.
MASK_ROWS = 256


def plan_cpu(p: Problem) -> Plan:
    """Folded rows and splits for few queries, PyTorch's own blocks over unexpanded K and V for many.

    Where a split ends depends on the rows alone, not on the layout or the capacity: paged and dense caches then
    give the same bits.
    """
    rows = p.max_seqlen_q * p.group
    few = rows <= DECODE_ROWS or p.max_seqlen_q < DECODE_QUERIES
    if p.softcap or p.tensor_mask or p.tokens_per_split:
        return _block_plan(p, "decode" if few else "prefill")
    return _decode_plan(p, rows) if few else _prefill_plan(p)


def _block_plan(p: Problem, kernel: Literal["decode", "prefill"]) -> Plan:
    """Blocks of folded rows and keys, for few queries and many; with tokens_per_split nothing but it decides."""
    forced = p.num_splits and not p.tokens_per_split
    extent = p.tokens_per_split or SPLIT_KEYS
    splits = p.num_splits if forced else -(-p.max_seqlen_k // extent)
    # Matrix products over more than one sequence would copy K; and how PyTorch's kernel cuts a call depends on all
    # that is in it, which with tokens_per_split must be one sequence.
    alone = p.softcap or p.tokens_per_split
    together = 1 if alone else max(1, min(p.batch, _copied_keys(p) // max(1, p.max_seqlen_k)))
    how = "of equal parts, as num_splits asks" if forced else f"of {extent} keys"
    return Plan(
        backend="cpu",
        kernel=kernel,
        fold=p.group,
        block_m=MASK_ROWS,
        block_n=0 if forced else extent,
        head_units=p.num_kv_heads,
        tiles=p.batch,
        tiles_per_sequence=1,
        num_splits=splits,
        num_stages=together,
        reasons=(
            f"{p.group} heads folded into rows, in blocks of {MASK_ROWS} at most; {splits} "
            f"split{'s' if splits > 1 else ''} {how}",
        ),
    )


def _decode_plan(p: Problem, rows: int) -> Plan:
    extent = SPLIT_KEYS
    splits = p.num_splits or -(-p.max_seqlen_k // extent)
    state = p.num_kv_heads * rows * (p.head_dim_v + 1) * 4
    together = max(1, min(splits if splits > 1 else p.batch, p.kv_bytes // STATE_SHARE // state))
    if _copies(p, rows):
        together = max(1, min(together, _copied_keys(p) // extent))
    how = f"of {extent} keys" if not p.num_splits else "of equal parts, as num_splits asks"
    return Plan(
        backend="cpu",
        kernel="decode",
        fold=p.group,
        block_m=rows,
        block_n=0 if p.num_splits else extent,
        head_units=p.num_kv_heads,
        tiles=p.batch,
        tiles_per_sequence=1,
        num_splits=splits,
        num_stages=together,
        reasons=(
            f"{p.group} heads x {p.max_seqlen_q} queries folded into {rows} rows; {splits} "
            f"split{'s' if splits > 1 else ''} {how}, {together} in one call",
        ),
    )


def _prefill_plan(p: Problem) -> Plan:
    packs = _packs(p, p.max_seqlen_q)
    splits = p.num_splits or -(-p.max_seqlen_k // PREFILL_SPLIT_KEYS)
    copies = packs or p.head_dim != p.head_dim_v
    units = p.num_kv_heads if copies and p.max_seqlen_k >= PART_KEYS else 1
    together = max(1, p.batch * units // COPY_SHARE) if copies else p.batch
    how = f"of {PREFILL_SPLIT_KEYS} keys" if not p.num_splits else "of equal parts, as num_splits asks"
    return Plan(
        backend="cpu",
        kernel="prefill",
        fold=1,
        block_m=MASK_ROWS,
        block_n=0 if p.num_splits else PREFILL_SPLIT_KEYS,
        head_units=units,
        tiles=p.batch,
        tiles_per_sequence=1,
        num_splits=splits,
        num_stages=together,
        reasons=(
            f"queries as they are; K and V unexpanded, {units} part{'s' if units > 1 else ''} of the heads; "
            f"{splits} split{'s' if splits > 1 else ''} {how}",
        ),
    )


def _packs(p: Problem, rows: int) -> bool:
    """True when PyTorch's kernel copies the K and V of a call into its own order before it multiplies."""
    return p.dtype == torch.bfloat16 and rows >= PACKED_ROWS


def _copies(p: Problem, rows: int) -> bool:
    """True when a decode call copies the K and V it takes: gathers, pads to one head dimension or packs."""
    return p.kv_layout == "paged" or p.head_dim != p.head_dim_v or _packs(p, rows)


def _copied_keys(p: Problem) -> int:
    """Keys that may be copied at a time; below one split the saving is not worth the calls."""
    return max(SPLIT_KEYS, p.total_k // COPY_SHARE)
