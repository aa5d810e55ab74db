"""HEADFOLD_CHECK=1: checks of what lies on the device, lengths, offsets, rows and page indices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from headfold.problem import Inputs, fail, k_capacity, q_capacity

# What os.environ looks variables up in: for one that is not set it raises and catches, 1 us of a call that takes 20.
_environment: Any = os.environ._data  # type: ignore[attr-defined]
_CHECK: Any = os.environ.encodekey("HEADFOLD_CHECK")
_OFF, _EMPTY = os.environ.encodevalue("0"), os.environ.encodevalue("")


def value_checks_enabled() -> bool:
    """True under HEADFOLD_CHECK=1: lengths and page indices are read back and checked, at the price of a sync."""
    return _environment.get(_CHECK, _OFF) not in (_OFF, _EMPTY)


def check_values(x: Inputs) -> None:
    """Read the index tensors and raise on the first entry that is out of range, saying which one.

    Raises:
        ValueError: an offset, length, bound or page index that does not fit its tensor.
    """
    q_lens = _check_offsets(x, "cu_seqlens_q", x.cu_seqlens_q, x.q.shape[0])
    k_lens = _check_offsets(
        x, "cu_seqlens_k", x.cu_seqlens_k, None if x.page_table is not None else x.k.shape[0]
    )
    if x.page_table is not None and x.seqused_k is None:
        _check_paged_lengths(x, k_lens or [])
    q_used = _check_used(x, "seqused_q", x.seqused_q, q_lens, q_capacity(x))
    k_slots = k_lens if x.page_table is None or x.seqused_k is None else None
    k_used = _check_used(x, "seqused_k", x.seqused_k, k_slots, k_capacity(x))
    if x.early_lengths is not None and k_used:
        for i, n in enumerate(x.early_lengths.tolist()):
            if k_used[i] != min(n + x.early_new, k_capacity(x)):
                need = f"with early_new it must be what seqused_k holds, {k_used[i]}"
                raise fail(x, "early_lengths", f"[{i}] is {n}", need)
    for name, bound, used in (
        ("max_seqlen_q", x.max_seqlen_q, q_used),
        ("max_seqlen_k", x.max_seqlen_k, k_used),
    ):
        if bound is not None and used and max(used) > bound:
            i = used.index(max(used))
            raise fail(
                x, name, f"is {bound}", f"sequence {i} has length {used[i]}, and it must bound them all"
            )
    _check_rotary(x, q_used)
    rows = _check_cache_rows(x)
    pads = [0] * x.batch
    if x.cache_leftpad is not None:
        pads = _check_used(x, "cache_leftpad", x.cache_leftpad, k_used, k_capacity(x)) or pads
    if x.page_table is not None:
        pages, page_size = x.k.shape[:2]
        table = x.page_table.tolist()
        for i, (row, n) in enumerate(zip(rows, k_used or [], strict=True)):
            first = pads[i] // page_size
            for j, page in enumerate(table[row][first : -(-n // page_size)], first):
                if not 0 <= page < pages:
                    raise fail(
                        x, "page_table", f"[{row}, {j}] is {page}", f"a page index must be 0 to {pages - 1}"
                    )


def check_shared_prefix(
    x: Inputs, lengths: Sequence[int], sizes: Sequence[int], new: Sequence[int] | None = None
) -> None:
    """Read lengths and page table and raise on the first sequence that breaks the promise of its group's prefix.

    Args:
        x: checked inputs with a page table.
        lengths: shared keys of each group, of whole pages.
        sizes: sequences of each group.
        new: keys that are still to be appended to each sequence, None for none.

    Raises:
        ValueError: a sequence whose first pages are others than those of its group's first sequence, or of which some
            query does not see the whole prefix.
    """
    assert x.page_table is not None
    assert x.seqused_k is not None
    table, keys = x.page_table.tolist(), x.seqused_k.tolist()
    queries = [x.q.shape[1]] * x.batch if x.cu_seqlens_q is None else _lengths(x.cu_seqlens_q)
    first = 0
    for shared, size in zip(lengths, sizes, strict=True):
        pages = table[first][: shared // x.k.shape[1]]
        for i in range(first, first + size if shared else first):
            for j, (page, other) in enumerate(zip(table[i], pages, strict=False)):
                if page != other:
                    need = (
                        f"it must be {other} as in row {first}, if the first {shared} keys of both are shared"
                    )
                    raise fail(x, "page_table", f"[{i}, {j}] is {page}", need)
            there = keys[i] + (new[i] if new else 0)
            least = shared + _keys_past_a_prefix(x, queries[i])
            if there < least:
                need = f"sequence {i} has {there} keys, and all of its {queries[i]} queries see so many from {least} on"
                raise fail(x, "shared_prefix_len", f"is {shared}", need)
        first += size


def _keys_past_a_prefix(x: Inputs, queries: int) -> int:
    """Keys that must follow a prefix for every query to see all of it."""
    if x.tree_mask is not None:
        return queries
    return max(0, queries - 1 - x.window_right) if x.window_right >= 0 else 0


def _lengths(offsets: torch.Tensor) -> list[int]:
    return [b - a for a, b in pairwise(offsets.tolist())]


def check_combine_values(
    caller: str, rows: int, batch: int, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None
) -> None:
    """Read the offsets and lengths of a merge and raise on the first that is out of range, saying which one.

    Args:
        caller: what the user called.
        rows: of the whole batch with cu_seqlens, of one sequence without.
        batch: number of sequences.
        cu_seqlens, seqused: int32 (batch + 1,) and (batch,), or None.

    Raises:
        ValueError: an offset or length that does not fit.
    """
    room = [rows] * batch
    if cu_seqlens is not None:
        offsets = cu_seqlens.tolist()
        wrong = _wrong_offset(offsets, rows)
        if wrong is not None:
            raise ValueError(f"{caller}: cu_seqlens {wrong[0]}; {wrong[1]}")
        room = [b - a for a, b in pairwise(offsets)]
    for i, n in enumerate([] if seqused is None else seqused.tolist()):
        if not 0 <= n <= room[i]:
            raise ValueError(f"{caller}: seqused [{i}] is {n}; that sequence has room for 0 to {room[i]}")


def _check_rotary(x: Inputs, q_used: list[int] | None) -> None:
    """The angles of every query are there."""
    if x.rotary_cos is None or x.rotary_positions is None:
        return
    there = x.rotary_cos.shape[0]
    counts = q_used or [q_capacity(x)] * x.batch
    for i, (first, n) in enumerate(zip(x.rotary_positions.tolist(), counts, strict=True)):
        last = first + (n - 1 if x.rotary_advances else 0)
        if n and not 0 <= first <= last < there:
            need = f"the queries of sequence {i} are rotated at {first} to {last}"
            raise fail(x, "rotary_cos", f"has {there} positions", need)


def _check_cache_rows(x: Inputs) -> list[int]:
    """The row of the cache or page table that each sequence uses."""
    if x.cache_batch_idx is None:
        return list(range(x.batch))
    rows, there = x.cache_batch_idx.tolist(), (x.k if x.page_table is None else x.page_table).shape[0]
    for i, row in enumerate(rows):
        if not 0 <= row < there:
            raise fail(x, "cache_batch_idx", f"[{i}] is {row}", f"a row must be 0 to {there - 1}")
    return rows


def _check_offsets(x: Inputs, name: str, t: torch.Tensor | None, total: int | None) -> list[int] | None:
    if t is None:
        return None
    offsets = t.tolist()
    wrong = _wrong_offset(offsets, total)
    if wrong is not None:
        raise fail(x, name, *wrong)
    return [b - a for a, b in pairwise(offsets)]


def _wrong_offset(offsets: list[int], total: int | None) -> tuple[str, str] | None:
    """What the first wrong offset is and what it must be, if there is one."""
    if offsets[0] != 0:
        return f"[0] is {offsets[0]}", "the first offset must be 0"
    for i, (a, b) in enumerate(pairwise(offsets)):
        if b < a:
            return f"[{i + 1}] is {b}, below [{i}] = {a}", "offsets must not decrease"
    if total is not None and offsets[-1] > total:
        return f"[{len(offsets) - 1}] is {offsets[-1]}", f"only {total} rows are there"
    return None


def _check_paged_lengths(x: Inputs, lengths: list[int]) -> None:
    room = k_capacity(x)
    for i, n in enumerate(lengths):
        if n > room:
            raise fail(
                x,
                "cu_seqlens_k",
                f"gives sequence {i} {n} keys",
                f"its row of page_table has room for {room}",
            )


def _check_used(
    x: Inputs, name: str, t: torch.Tensor | None, slots: list[int] | None, capacity: int
) -> list[int] | None:
    if t is None:
        return slots
    used = t.tolist()
    for i, n in enumerate(used):
        room = slots[i] if slots is not None else capacity
        if not 0 <= n <= room:
            raise fail(x, name, f"[{i}] is {n}", f"that sequence has room for 0 to {room}")
    return used
