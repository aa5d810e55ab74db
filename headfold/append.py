"""Append: new keys and values written into a cache in place, keys rotated on the way. The operator headfold::append.

What a call takes, its checks, the operator, and the definition of the result. The GPU form is `kernels/append.py`,
launched once a call by `backends/append.py`; the CPU form `backends/cpu_append.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from headfold import backends, prepared
from headfold.backends.cpu_append import append_on_cpu, rotated_queries
from headfold.kept_calls import Step, note
from headfold.ops import register
from headfold.problem import DTYPES, MAX_HEAD_DIM, MAX_SEQLEN
from headfold.values import value_checks_enabled


@dataclass(slots=True)
class AppendInputs:
    """The arguments of one append, as the operator takes them.

    Shapes: caches (rows, sk, hk, d | dv), or (pages, page_size, hk, d | dv) with `page_table` (rows, max_pages);
    new `k`, `v` (b, s_new, hk, d | dv), or (total_new, hk, d | dv) with `cu_seqlens_k_new` (b + 1,). Sequence i
    uses row cache_batch_idx[i] of a dense cache or of the page table, or row i. Token t of it goes to position
    cache_seqlens[i] + t (None: t), and is rotated by the angles of rotary_seqlens[i] + t or else of that position.

    With angles `q` (b, sq, h, d), or (total_q, h, d) with `cu_seqlens_q` (b + 1,), is rotated too, query i of a sequence
    at the position of its first new token, plus i where `rotary_advances`: into a new tensor, rounded to q's dtype.

    The host does not know these values. A token beyond the capacity, or whose row or page is not there, is not
    written, and the length returned counts what is there: at most the capacity, 0 without a row. A position
    beyond rotary_cos makes NaN of the rotated columns. Sequences must not be appended to the same place: which
    one stays is undefined. HEADFOLD_CHECK=1 raises for all of these, before anything is written.
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache_seqlens: torch.Tensor | None = None
    cu_seqlens_k_new: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    rotary_cos: torch.Tensor | None = None
    rotary_sin: torch.Tensor | None = None
    rotary_seqlens: torch.Tensor | None = None
    rotary_interleaved: bool = True
    q: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    rotary_advances: bool = True
    caller: str = "append"

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.k.shape[0] if self.cu_seqlens_k_new is None else self.cu_seqlens_k_new.shape[0] - 1

    @property
    def cache_rows(self) -> int:
        """Rows that cache_batch_idx chooses from."""
        return (self.k_cache if self.page_table is None else self.page_table).shape[0]

    @property
    def capacity(self) -> int:
        """Keys that a row has room for."""
        size = self.k_cache.shape[1]
        return size if self.page_table is None else self.page_table.shape[1] * size


# ---- checks -------------------------------------------------------------------------------------------------


def _fail(x: AppendInputs, arg: str, got: str, need: str, kind: type[Exception] = ValueError) -> Exception:
    return kind(f"{x.caller}: {arg} {got}; {need}")


def _shape(shape: Sequence[int]) -> str:
    return "(" + ", ".join(str(n) for n in shape) + ")"


def check(x: AppendInputs) -> None:
    """Raise on the first argument that cannot be appended as documented. Reads no device memory.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or one that does not fit, named in the message.
        NotImplementedError: a call that needs the backward.
    """
    tensors = {"k_cache": x.k_cache, "v_cache": x.v_cache, "k": x.k, "v": x.v}
    for name, t in tensors.items():
        _check_tensor(x, name, t, DTYPES)
        if t.dtype != x.k_cache.dtype:
            raise _fail(x, name, f"has dtype {t.dtype}", f"it must have k_cache's dtype {x.k_cache.dtype}")
    for name, t in (("k_cache", x.k_cache), ("v_cache", x.v_cache)):
        if any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True)):
            raise _fail(x, name, "is expanded (a stride is 0)", "every element needs its own place")
    _check_shapes(x)
    _check_rotary(x)
    _check_queries(x)
    if x.q is not None:
        tensors["q"] = x.q
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise NotImplementedError(
            f"{x.caller}: an input requires a gradient, and an append in place has none; "
            "call it under torch.no_grad() or detach the inputs"
        )


def _check_tensor(x: AppendInputs, name: str, t: Any, dtypes: Sequence[torch.dtype]) -> None:
    if not isinstance(t, torch.Tensor):
        raise _fail(x, name, f"is a {type(t).__name__}", "it must be a torch.Tensor", TypeError)
    if t.dtype not in dtypes:
        need = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise _fail(x, name, f"has dtype {t.dtype}", f"it must be {need}")
    if t.device != x.k_cache.device:
        raise _fail(x, name, f"is on {t.device}", f"it must be on k_cache's device {x.k_cache.device}")
    if t.dim() > 0 and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise _fail(x, name, f"has last stride {t.stride(-1)}", "its last dimension must be contiguous")


def _check_index(x: AppendInputs, name: str, t: torch.Tensor | None, shape: tuple[int | str, ...]) -> None:
    """t is int32 of that shape; a size with a name may be any."""
    if t is None:
        return
    _check_tensor(x, name, t, (torch.int32,))
    if t.dim() != len(shape) or (t.shape[0] != shape[0] and not isinstance(shape[0], str)):
        want = f"({shape[0]},)" if len(shape) == 1 else f"({shape[0]}, {shape[1]})"
        raise _fail(x, name, f"has shape {_shape(t.shape)}", f"it must be {want}")


def _check_shapes(x: AppendInputs) -> None:
    ragged, paged = x.cu_seqlens_k_new is not None, x.page_table is not None
    kc, vc, k, v = x.k_cache.shape, x.v_cache.shape, x.k.shape, x.v.shape
    for name, t, dims in (("k_cache", kc, 4), ("v_cache", vc, 4), ("k", k, 4 - ragged), ("v", v, 4 - ragged)):
        if len(t) != dims:
            if "cache" in name:
                need = (
                    "(pages, page_size, hk, d), since page_table is given" if paged else "(rows, sk, hk, d)"
                )
            else:
                need = (
                    "(total_new, hk, d), since cu_seqlens_k_new is given" if ragged else "(b, s_new, hk, d)"
                )
            raise _fail(x, name, f"has shape {_shape(t)}", f"it must be {need}")
    for name, t, like, other in (("v_cache", vc, "k_cache", kc), ("v", v, "k", k)):
        if t[:-1] != other[:-1]:
            need = f"all but its last size must equal {like}'s {_shape(other)}"
            raise _fail(x, name, f"has shape {_shape(t)}", need)
    if kc[2] < 1:
        raise _fail(x, "k_cache", "has no heads", "at least one head is needed")
    for name, t, like, other in (("k", k, "k_cache", kc), ("v", v, "v_cache", vc)):
        if t[-2:] != other[-2:]:
            need = f"its heads and head dimension must equal {like}'s {_shape(other)}"
            raise _fail(x, name, f"has shape {_shape(t)}", need)
        if not 1 <= other[-1] <= MAX_HEAD_DIM:
            raise _fail(x, like, f"has head dimension {other[-1]}", f"it must be 1 to {MAX_HEAD_DIM}")
    _check_index(x, "cu_seqlens_k_new", x.cu_seqlens_k_new, ("b + 1",))
    batch = x.batch
    if batch < 0:
        raise _fail(x, "cu_seqlens_k_new", "is empty", "it must hold b + 1 offsets")
    rows: int | str = batch if x.cache_batch_idx is None else "rows"
    _check_index(x, "cache_seqlens", x.cache_seqlens, (batch,))
    _check_index(x, "cache_batch_idx", x.cache_batch_idx, (batch,))
    _check_index(x, "page_table", x.page_table, (rows, "max_pages"))
    if paged and kc[1] < 1:
        raise _fail(x, "k_cache", f"has shape {_shape(kc)}", "page_size must be at least 1")
    if not paged and x.cache_batch_idx is None and kc[0] != batch:
        need = f"without cache_batch_idx it must have one for each of the {batch} sequences"
        raise _fail(x, "k_cache", f"has {kc[0]} rows", need)
    capacity = x.capacity
    if capacity > MAX_SEQLEN:
        name = "page_table" if paged else "k_cache"
        raise _fail(x, name, f"allows {capacity} keys", f"a sequence may have at most {MAX_SEQLEN}")
    if not ragged and batch > 0 and k[1] > capacity:
        raise _fail(x, "k", f"has {k[1]} tokens a sequence", f"the cache has room for {capacity}")


def _check_rotary(x: AppendInputs) -> None:
    cos, sin, d = x.rotary_cos, x.rotary_sin, x.k_cache.shape[-1]
    if not isinstance(x.rotary_interleaved, bool):
        got = f"is {x.rotary_interleaved!r}"
        raise _fail(x, "rotary_interleaved", got, "it must be True or False", TypeError)
    if cos is None or sin is None:
        for name, t in (("rotary_cos", cos), ("rotary_sin", sin), ("rotary_seqlens", x.rotary_seqlens)):
            if t is not None:
                raise _fail(x, name, "is given alone", "rotary_cos and rotary_sin must come together")
        return
    dtypes = (torch.float32, x.k_cache.dtype)[: 1 + (x.k_cache.dtype != torch.float32)]
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_tensor(x, name, t, dtypes)
        if t.dim() != 2 or t.shape[0] < 1 or not 1 <= t.shape[1] <= d // 2:
            need = f"it must be (max_len, rotary_dim / 2), max_len >= 1 and 2 <= rotary_dim <= d = {d}"
            raise _fail(x, name, f"has shape {_shape(t.shape)}", need)
    if sin.shape != cos.shape or sin.dtype != cos.dtype:
        need = f"it must be rotary_cos's {cos.dtype} {_shape(cos.shape)}"
        raise _fail(x, "rotary_sin", f"is {sin.dtype} {_shape(sin.shape)}", need)
    if cos.shape[0] > MAX_SEQLEN:
        raise _fail(x, "rotary_cos", f"has {cos.shape[0]} positions", f"at most {MAX_SEQLEN} are supported")
    _check_index(x, "rotary_seqlens", x.rotary_seqlens, (x.batch,))


def _check_queries(x: AppendInputs) -> None:
    if x.q is None:
        if x.cu_seqlens_q is not None:
            raise _fail(x, "cu_seqlens_q", "is given without q", "it holds the offsets of ragged queries")
        return
    _check_tensor(x, "q", x.q, (x.k_cache.dtype,))
    if x.rotary_cos is None:
        raise _fail(x, "q", "is given without rotary_cos", "it is only rotated here")
    if not isinstance(x.rotary_advances, bool):
        raise _fail(x, "rotary_advances", f"is {x.rotary_advances!r}", "it must be True or False", TypeError)
    _check_index(x, "cu_seqlens_q", x.cu_seqlens_q, (x.batch + 1,))
    d, ragged = x.k_cache.shape[-1], x.cu_seqlens_q is not None
    if x.q.dim() != 4 - ragged or x.q.shape[-1] != d or (not ragged and x.q.shape[0] != x.batch):
        need = f"(total_q, h, {d})" if ragged else f"({x.batch}, sq, h, {d})"
        raise _fail(x, "q", f"has shape {_shape(x.q.shape)}", f"it must be {need}")


def check_values(x: AppendInputs) -> None:
    """Read the index tensors and raise on the first token that has no place of its own, before any is written.

    Raises:
        ValueError: offsets, a length, row, page or rotary position that does not fit, or a place written twice.
    """
    counts = _new_tokens(x)
    start = [0] * x.batch if x.cache_seqlens is None else x.cache_seqlens.tolist()
    row = list(range(x.batch)) if x.cache_batch_idx is None else x.cache_batch_idx.tolist()
    first = start if x.rotary_seqlens is None else x.rotary_seqlens.tolist()
    owners: dict[int, int] = {}
    for i, n in enumerate(counts):
        if not 0 <= start[i] <= x.capacity - n:
            arg, got = ("k", "") if x.cache_seqlens is None else ("cache_seqlens", f"[{i}] is {start[i]}")
            need = f"sequence {i} gets {n} new tokens and has room for {x.capacity}"
            raise _fail(x, arg, got or "does not fit", need)
        if not 0 <= row[i] < x.cache_rows:
            raise _fail(x, "cache_batch_idx", f"[{i}] is {row[i]}", f"a row must be 0 to {x.cache_rows - 1}")
        if n and x.page_table is None and owners.setdefault(row[i], i) != i:
            need = f"sequence {owners[row[i]]} is appended to the same row"
            raise _fail(x, "cache_batch_idx", f"[{i}] is {row[i]}", need)
        if x.rotary_cos is not None and n and not 0 <= first[i] <= x.rotary_cos.shape[0] - n:
            need = f"sequence {i} is rotated at {first[i]} to {first[i] + n - 1}"
            raise _fail(x, "rotary_cos", f"has {x.rotary_cos.shape[0]} positions", need)
    if x.page_table is not None:
        _check_pages(x, x.page_table.tolist(), row, start, counts)


def _new_tokens(x: AppendInputs) -> list[int]:
    if x.cu_seqlens_k_new is None:
        return [x.k.shape[1]] * x.batch
    name, offsets = "cu_seqlens_k_new", x.cu_seqlens_k_new.tolist()
    if offsets[0] != 0:
        raise _fail(x, name, f"[0] is {offsets[0]}", "the first offset must be 0")
    for i, (a, b) in enumerate(pairwise(offsets)):
        if b < a:
            raise _fail(x, name, f"[{i + 1}] is {b}, below [{i}] = {a}", "offsets must not decrease")
    if offsets[-1] > x.k.shape[0]:
        raise _fail(x, name, f"[{x.batch}] is {offsets[-1]}", f"k has {x.k.shape[0]} tokens")
    return [b - a for a, b in pairwise(offsets)]


def _check_pages(
    x: AppendInputs, table: list[list[int]], row: list[int], start: list[int], counts: list[int]
) -> None:
    """Every page that is written exists, and belongs to one place of one sequence."""
    pages, size = x.k_cache.shape[:2]
    owners: dict[int, int] = {}
    for i, n in enumerate(counts):
        for j in range(start[i] // size, -(-(start[i] + n) // size) if n else 0):
            page, got = table[row[i]][j], f"[{row[i]}, {j}] is {table[row[i]][j]}"
            if not 0 <= page < pages:
                raise _fail(x, "page_table", got, f"a page index must be 0 to {pages - 1}")
            if page in owners:
                raise _fail(x, "page_table", got, f"sequence {owners[page]} is appended to the same page")
            owners[page] = i


# ---- operator -----------------------------------------------------------------------------------------------

lib = torch.library.Library("headfold", "FRAGMENT")
lib.define(
    "append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor? cache_seqlens=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? page_table=None, Tensor? cache_batch_idx=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? rotary_seqlens=None, "
    "bool rotary_interleaved=True, Tensor? q=None, Tensor? cu_seqlens_q=None, bool rotary_advances=True, "
    'str caller="append") -> (Tensor, Tensor)',
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def facts_of(x: AppendInputs) -> tuple[Any, ...]:
    """Everything that checks and launcher look at, as in `prepared.facts_of`."""
    tensors = (
        x.k_cache,
        x.v_cache,
        x.k,
        x.v,
        x.cache_seqlens,
        x.cu_seqlens_k_new,
        x.page_table,
        x.cache_batch_idx,
        x.rotary_cos,
        x.rotary_sin,
        x.rotary_seqlens,
        x.q,
        x.cu_seqlens_q,
    )
    flags = (x.rotary_interleaved, x.rotary_advances, x.caller)
    return ("append", *prepared.tensor_facts(tensors), torch.is_grad_enabled(), backends.forced(), *flags)


def _append(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = AppendInputs(*args, **kwargs)
    facts = facts_of(x)
    run = prepared.find(facts)
    if run is None:
        check(x)
    if value_checks_enabled():
        check_values(x)
    if run is None:
        run = prepared.keep(facts, _prepare(x))
    results = run(x)
    note(Step(x, results, run))
    return results


def _prepare(x: AppendInputs) -> Callable[[AppendInputs], tuple[torch.Tensor, torch.Tensor]]:
    """What carries out a checked append, and any that looks like it."""
    if backends.device_of(x.k_cache.device).is_cpu:
        return _append_on_cpu
    if not x.batch:
        return _empty_results
    from headfold.backends.append import prepare

    launch = prepare(x, *_empty_results(x))

    def run(x: AppendInputs) -> tuple[torch.Tensor, torch.Tensor]:
        lengths, turned = _empty_results(x)
        launch(x, lengths, turned)
        return lengths, turned

    return run


def _append_on_cpu(x: AppendInputs) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = append_on_cpu(x)
    return lengths, x.k.new_empty((0,)) if x.q is None else rotated_queries(x)


def _append_fake(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = AppendInputs(*args, **kwargs)
    check(x)
    return _empty_results(x)


def _empty_results(x: AppendInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(lengths (b,) int32, q rotated: contiguous, of q's shape; (0,) where there is no q)."""
    return x.k.new_empty((x.batch,), dtype=torch.int32), x.k.new_empty((0,) if x.q is None else x.q.shape)


register(lib, "append", _append, _append_fake)

append = torch.ops.headfold.append.default


# ---- reference ----------------------------------------------------------------------------------------------


def reference_append(x: AppendInputs) -> torch.Tensor:
    """The definition of the lengths and caches, one token at a time at float64; float64 caches keep it.

    A token without a place, and a length beyond the capacity, are as `append` treats them.
    """
    lengths = torch.zeros(x.batch, dtype=torch.int32)
    for i in range(x.batch):
        new: int | slice = i
        if x.cu_seqlens_k_new is not None:
            new = slice(int(x.cu_seqlens_k_new[i]), int(x.cu_seqlens_k_new[i + 1]))
        k, v = x.k[new], x.v[new]
        start = 0 if x.cache_seqlens is None else int(x.cache_seqlens[i])
        first = start if x.rotary_seqlens is None else int(x.rotary_seqlens[i])
        row = i if x.cache_batch_idx is None else int(x.cache_batch_idx[i])
        if not 0 <= row < x.cache_rows:
            continue
        lengths[i] = max(0, min(start + k.shape[0], x.capacity))
        for t in range(k.shape[0]):
            page, spot = row, start + t
            if not 0 <= spot < x.capacity:
                continue
            if x.page_table is not None:
                number, spot = divmod(spot, x.k_cache.shape[1])
                page = int(x.page_table[row, number])
            if not 0 <= page < x.k_cache.shape[0]:
                continue
            x.k_cache[page, spot] = _turned(k[t].double(), x, first + t).to(x.k_cache.dtype)
            x.v_cache[page, spot] = v[t]
    return lengths


def reference_queries(x: AppendInputs) -> torch.Tensor:
    """The definition of the rotated q, one query at a time, at float64."""
    assert x.q is not None
    at = x.cache_seqlens if x.rotary_seqlens is None else x.rotary_seqlens
    turned = x.q.double()
    for i in range(x.batch):
        q = turned[i]
        if x.cu_seqlens_q is not None:
            q = turned[int(x.cu_seqlens_q[i]) : int(x.cu_seqlens_q[i + 1])]
        for t in range(q.shape[0]):
            q[t] = _turned(q[t], x, (0 if at is None else int(at[i])) + t * int(x.rotary_advances))
    return turned


def _turned(k: torch.Tensor, x: AppendInputs, position: int) -> torch.Tensor:
    """k (hk, d) as pairs of columns, each turned by its angle."""
    if x.rotary_cos is None or x.rotary_sin is None:
        return k
    half, known, k = x.rotary_cos.shape[1], 0 <= position < x.rotary_cos.shape[0], k.clone()
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if x.rotary_interleaved else (j, j + half)
        cos, sin = (float(t[position, j]) if known else float("nan") for t in (x.rotary_cos, x.rotary_sin))
        k[:, a], k[:, b] = k[:, a] * cos - k[:, b] * sin, k[:, b] * cos + k[:, a] * sin
    return k
