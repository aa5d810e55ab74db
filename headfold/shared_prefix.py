"""Shared prefixes: sequences whose page tables begin with the same pages read those pages once a group.

The queries of a group are one sequence of (all its queries) rows against the shared pages; what follows those pages is
attended to per sequence, with the padding of a cache before it; the states of a row are merged. On a Hopper GPU both parts
run side by side in one launch (`backends/hopper_pair.py`), elsewhere one after the other. All of it is one operator,
headfold::shared_attention (shared_attention_out): what it keeps on the device between calls is made by real
calls alone, never by fake ones, and it is opaque to torch.compile.

Which keys are shared is the caller's promise. It changes where keys are read, not what a result means.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch

from headfold import backends, prepared
from headfold.kept_calls import note
from headfold.merge import run_combine
from headfold.ops import ARGS, attend, check_inputs, check_results, empty_results, register
from headfold.planner.pair import plan_pair
from headfold.planner.sharing import sharing_pays
from headfold.problem import MAX_SEQLEN, Inputs, fail, k_capacity, problem_of
from headfold.values import check_shared_prefix, check_values, value_checks_enabled

Ints = int | Sequence[int]


@dataclass(frozen=True, slots=True)
class Groups:
    """The promise as it came: the shared keys of every group, and how many sequences each has (None: one has all)."""

    lengths: tuple[int, ...]
    sizes: tuple[int, ...] | None

    def of(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(shared keys, sequences) of every group, of checked groups; a group of one shares nothing."""
        sizes = (batch,) if self.sizes is None else self.sizes
        return tuple(n if s > 1 else 0 for n, s in zip(self.lengths, sizes, strict=True)), sizes


# ---- arguments ----------------------------------------------------------------------------------------------


def groups_of(caller: str, lengths: Any, sizes: Any) -> Groups | None:
    """shared_prefix_len and shared_prefix_groups as they came, as ints; None where neither is given, or a length of 0 alone.

    Raises:
        TypeError: something else than ints on the host.
        ValueError: groups without a length.
    """
    if lengths is None:
        if sizes is not None:
            raise ValueError(
                f"{caller}: shared_prefix_groups is given without shared_prefix_len; "
                "it says which sequences share so many keys"
            )
        return None
    groups = None if sizes is None else _ints(caller, "shared_prefix_groups", sizes)
    if isinstance(lengths, Sequence) and not isinstance(lengths, str):
        return Groups(_ints(caller, "shared_prefix_len", lengths), groups)
    length = _int(caller, "shared_prefix_len", lengths)
    if groups is None and type(length) is int and length == 0:
        return None  # a call like any other, which may append in its launch
    return Groups((length,) * (1 if groups is None else len(groups)), groups)


def _ints(caller: str, name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(f"{caller}: {name} is {values!r}; it must be a sequence of ints on the host")
    if set(map(type, values)) <= {int}:  # a step has as many groups as it likes
        return tuple(values)
    return tuple([_int(caller, f"{name}[{i}]", n) for i, n in enumerate(values)])


def _int(caller: str, name: str, value: Any) -> int:
    """An int on the host. No tensors: reading one from a device would wait for it."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        try:
            if isinstance(value, bool | torch.Tensor):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{caller}: {name} is {value!r}; it must be an int on the host") from None
    return value


def check_groups(x: Inputs, groups: Groups) -> None:
    """Raise unless the groups fit checked inputs. Reads no device memory.

    Raises:
        ValueError: a length or size that does not fit, named in the message.
    """
    sizes = groups.sizes
    if sizes is not None:
        for i, size in enumerate(sizes):
            if size < 1:
                raise fail(x, f"shared_prefix_groups[{i}]", f"is {size}", "a group has at least 1 sequence")
        if sum(sizes) != x.batch:
            need = f"they must sum to the batch of {x.batch}"
            raise fail(x, "shared_prefix_groups", f"has sizes that sum to {sum(sizes)}", need)
    count = 1 if sizes is None else len(sizes)
    if len(groups.lengths) != count:
        got = f"has {len(groups.lengths)} entries"
        raise fail(
            x,
            "shared_prefix_len",
            got,
            f"there {'is' if count == 1 else 'are'} {count} group{'s' * (count != 1)}",
        )
    for n in groups.lengths:
        _check_length(x, n)


def _check_length(x: Inputs, n: int) -> None:
    name = "shared_prefix_len"
    if n < 0:
        raise fail(x, name, f"is {n}", "it must be >= 0, and 0 shares nothing")
    if n == 0:
        return
    if x.page_table is None:
        raise fail(x, name, f"is {n} without a page_table", "what sequences share are pages")
    size, room = x.k.shape[1], k_capacity(x)
    if n % size:
        need = f"it must be a multiple of the page_size {size}: use {n // size * size}"
        raise fail(x, name, f"is {n}", need)
    if n > room:
        raise fail(x, name, f"is {n}", f"the page table has room for {room} keys")


def check_append(
    tensors: tuple[torch.Tensor | None, ...],
    options: dict[str, Any],
    groups: Groups,
    k: torch.Tensor,
    cu_seqlens_k_new: torch.Tensor | None,
) -> None:
    """`check_groups` for a checked call that first appends `k`; HEADFOLD_CHECK=1 checks the promise as it then will be.

    Raises:
        ValueError: groups that do not fit, or a promise that will not hold.
    """
    # The append rotates q.
    plain = {name: value for name, value in options.items() if not name.startswith("rotary")}
    x = Inputs(*tensors, **plain)  # type: ignore[arg-type]
    check_groups(x, groups)
    if value_checks_enabled() and can_share(x):
        offsets = None if cu_seqlens_k_new is None else cu_seqlens_k_new.tolist()
        new = [k.shape[1]] * x.batch if offsets is None else [b - a for a, b in pairwise(offsets)]
        check_shared_prefix(x, *groups.of(x.batch), new)


# ---- how it runs --------------------------------------------------------------------------------------------

_forced: bool | None = None


@contextmanager
def force(share: bool) -> Iterator[None]:
    """Share wherever it is possible, or nowhere, whether it pays or not. For tests; not thread-safe."""
    global _forced
    before, _forced = _forced, share
    try:
        yield
    finally:
        _forced = before


def can_share(x: Inputs) -> bool:
    """True when every query of a group sees a prefix alike, in pages that the rows of the table name.

    Left windows, chunks and ALiBi look at positions, and a rotation turns each sequence's queries by its own. Left padding
    is what this module tells the own part by; picked rows of the table are no neighbours.
    """
    by_position = x.window_left >= 0 or x.attention_chunk > 0 or x.alibi_slopes is not None
    moved = x.cache_leftpad is not None or x.cache_batch_idx is not None or x.rotary_cos is not None
    # Offsets of dense queries, which a group has behind one another, must fit.
    rows = x.q.shape[0] * (x.q.shape[1] if x.cu_seqlens_q is None else 1)
    plain = x.page_table is not None and x.seqused_k is not None and x.seqused_q is None and x.bottom_right
    return plain and not by_position and not moved and 0 < rows <= MAX_SEQLEN and x.batch > 0


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """How a call is parted, kept between calls. Tensors are int32 on the device of the queries unless said.

    `bounds` (groups + 1,): the first query of every group and the end, of dense q; the first sequence, of ragged q.
    `prefixes` (groups,): keys of the shared part. `pads` (b,): keys before the own part. `rows`: the row of the page table
    of each group, a slice or (groups,) int64. `pages`: columns of it that hold the longest prefix. `largest`: sequences of
    the largest group.
    """

    bounds: torch.Tensor
    prefixes: torch.Tensor
    pads: torch.Tensor
    rows: slice | torch.Tensor
    pages: int
    largest: int


@dataclass(frozen=True, slots=True, eq=False)
class Way:
    """How a call runs: its parts, and what runs both of them at once, None for one after the other."""

    parts: Parts
    pair: backends.Runner | None


_kept: dict[tuple[Any, ...], Way | None] = {}  # by all that a call looks like
_made: dict[tuple[Any, ...], Parts] = {}  # by what they are made from
# A captured graph holds the addresses of the tensors it was captured with: they stay.
_captured: dict[int, Parts] = {}


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def parts_of(x: Inputs, groups: Groups) -> Parts | None:
    """How checked inputs are parted, None where they run as without groups."""
    lengths, sizes = groups.of(x.batch)
    if not (can_share(x) and any(lengths) and _pays(x, lengths, sizes)):
        return None
    per_sequence = x.q.shape[1] if x.cu_seqlens_q is None else 1
    made_from = (x.q.device, per_sequence, x.k.shape[1], lengths, sizes)
    parts = _made.get(made_from)
    if parts is None:
        if _is_capturing(x.q.device):
            raise RuntimeError(
                f"{x.caller}: shared_prefix_len and shared_prefix_groups are new in a call that is captured, and "
                "cannot be copied to the device there; make the same call once before the capture"
            )
        parts = prepared.keep(made_from, _make_parts(*made_from), _made)
    return parts


def _pays(x: Inputs, lengths: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    if _forced is not None:
        return _forced
    return sharing_pays(problem_of(x), backends.device_of(x.q.device), lengths, sizes)


def _make_parts(
    device: torch.device, per_sequence: int, page_size: int, lengths: tuple[int, ...], sizes: tuple[int, ...]
) -> Parts:
    firsts = list(accumulate(sizes, initial=0))
    with torch.inference_mode(False):  # kept for calls outside it too

        def on_device(values: Sequence[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return Parts(
            bounds=on_device([n * per_sequence for n in firsts]),
            prefixes=on_device(lengths),
            pads=on_device([n for n, s in zip(lengths, sizes, strict=True) for _ in range(s)]),
            rows=slice(None, None, sizes[0]) if len(set(sizes)) == 1 else on_device(firsts[:-1], torch.int64),
            pages=max(lengths) // page_size,
            largest=max(sizes),
        )


def way_of(x: Inputs, groups: Groups, out: torch.Tensor, lse: torch.Tensor) -> Way | None:
    """How checked inputs run, None where that is as without groups."""
    parts = parts_of(x, groups)
    if parts is None:
        return None
    q = x.q
    in_a_row = x.cu_seqlens_q is not None or q.shape[1] == 1 or q.stride(0) == q.shape[1] * q.stride(1)
    plan = (
        plan_pair(problem_of(x, out), backends.device_of(q.device), groups.of(x.batch)[1])
        if in_a_row
        else None
    )
    if plan is None:
        return Way(parts, None)
    from headfold.backends.hopper_pair import prepare

    return Way(parts, prepare(plan, x, out, lse, parts.prefixes, parts.pads, lambda x: sources_of(x, parts)))


def sources_of(x: Inputs, parts: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """(the first query of every group and the end, the groups' rows of the page table) of a call that has these parts."""
    assert x.page_table is not None
    offsets, rows = parts.bounds, parts.rows
    if x.cu_seqlens_q is not None:
        offsets = x.cu_seqlens_q.index_select(0, offsets)
    return offsets, x.page_table[rows] if isinstance(rows, slice) else x.page_table.index_select(0, rows)


def _run(x: Inputs, parts: Parts, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Both parts into states side by side, then their merge."""
    heads, ragged = x.q.shape[-2], x.cu_seqlens_q is not None
    q = x.q if ragged else x.q.flatten(0, 1)  # a view for one query a sequence, and for tokens side by side
    states = q.new_empty((2, *q.shape[:-1], x.v.shape[-1]))
    lses = q.new_empty((2, heads, q.shape[0]), dtype=torch.float32)
    attend(_shared_part(x, parts, q), states[0], lses[0])
    own = replace(x, cache_leftpad=parts.pads)
    if ragged:
        attend(own, states[1], lses[1])
        run_combine(states, lses.transpose(1, 2), None, None, out, lse.transpose(0, 1))
        return
    states, lses = states.unflatten(1, x.q.shape[:2]), lses.unflatten(2, x.q.shape[:2])
    attend(own, states[1], lses[1].transpose(0, 1))
    run_combine(states, lses.permute(0, 2, 3, 1), None, None, out, lse.transpose(1, 2))


def _shared_part(x: Inputs, parts: Parts, q: torch.Tensor) -> Inputs:
    """The queries (rows, h, d) of every group as one sequence over its shared keys, all of which all of them see."""
    assert x.page_table is not None
    table = x.page_table[:, : parts.pages]
    rows = parts.rows
    offsets, per_sequence = parts.bounds, x.q.shape[1]
    if x.cu_seqlens_q is not None:
        offsets, per_sequence = x.cu_seqlens_q.index_select(0, parts.bounds), q.shape[0]
        if x.max_seqlen_q is not None:
            per_sequence = x.max_seqlen_q
    return Inputs(
        q,
        x.k,
        x.v,
        cu_seqlens_q=offsets,
        seqused_k=parts.prefixes,
        page_table=table[rows] if isinstance(rows, slice) else table.index_select(0, rows),
        max_seqlen_q=min(q.shape[0], parts.largest * per_sequence),
        softmax_scale=x.softmax_scale,
        num_splits=x.num_splits,
        pack_gqa=x.pack_gqa,
        sm_margin=x.sm_margin,
        softcap=x.softcap,
        tokens_per_split=x.tokens_per_split,
        caller=x.caller,
    )


# ---- operators ----------------------------------------------------------------------------------------------

_GROUPS = "SymInt[] prefix_lengths, SymInt[]? group_sizes=None"
lib = torch.library.Library("headfold", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
lib.define(f"shared_attention({ARGS}, *, {_GROUPS}) -> (Tensor, Tensor)", tags=_TAGS)
lib.define(
    f"shared_attention_out({ARGS}, *, {_GROUPS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    tags=_TAGS,
)


def _groups(prefix_lengths: Sequence[int], group_sizes: Sequence[int] | None) -> Groups:
    return Groups(tuple(prefix_lengths), None if group_sizes is None else tuple(group_sizes))


def _attend_shared(
    x: Inputs, groups: Groups, results: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    note(None)  # several launches, and tensors of its own
    facts = (prepared.facts_of(x, *(results or ())), groups, _forced)
    known = facts in _kept
    if not known:
        check_inputs(x)
        check_groups(x, groups)
        if results is not None:
            check_results(x, *results)
    if value_checks_enabled():
        check_values(x)
        if can_share(x):
            check_shared_prefix(x, *groups.of(x.batch))
    out, lse = results or empty_results(x)
    if not known:
        prepared.keep(facts, way_of(x, groups, out, lse), _kept)
    way = _kept[facts]
    if way is None:
        attend(x, out, lse)
        return out, lse
    if _is_capturing(x.q.device):
        _captured[id(way.parts)] = way.parts
    if way.pair is not None:
        way.pair(x, out, lse)
    else:
        _run(x, way.parts, out, lse)
    return out, lse


def _shared_attention(
    *args: Any, prefix_lengths: Sequence[int], group_sizes: Sequence[int] | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return _attend_shared(Inputs(*args, **kwargs), _groups(prefix_lengths, group_sizes), None)


def _shared_attention_fake(
    *args: Any, prefix_lengths: Sequence[int], group_sizes: Sequence[int] | None = None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    x = Inputs(*args, **kwargs)
    check_inputs(x)
    check_groups(x, _groups(prefix_lengths, group_sizes))
    return empty_results(x)


def _shared_attention_out(
    *args: Any,
    prefix_lengths: Sequence[int],
    group_sizes: Sequence[int] | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
    **kwargs: Any,
) -> None:
    _attend_shared(Inputs(*args, **kwargs), _groups(prefix_lengths, group_sizes), (out, lse))


def _shared_attention_out_fake(
    *args: Any,
    prefix_lengths: Sequence[int],
    group_sizes: Sequence[int] | None = None,
    out: torch.Tensor,
    lse: torch.Tensor,
    **kwargs: Any,
) -> None:
    x = Inputs(*args, **kwargs)
    check_inputs(x)
    check_groups(x, _groups(prefix_lengths, group_sizes))
    check_results(x, out, lse)


for _name, _impl, _fake in (
    ("shared_attention", _shared_attention, _shared_attention_fake),
    ("shared_attention_out", _shared_attention_out, _shared_attention_out_fake),
):
    register(lib, _name, _impl, _fake)

OPERATORS = (torch.ops.headfold.shared_attention.default, torch.ops.headfold.shared_attention_out.default)
