"""flash_attn_with_kvcache: the decoding step, and the metadata that decides its splits ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headfold import appending, shared_prefix
from headfold.append import append
from headfold.arguments import (
    Result,
    Window,
    allow_tensors,
    bound,
    check_call,
    check_flags,
    features,
    integer,
    plain_options,
    refuse,
    require_tensors,
    run,
)
from headfold.backends import device_of
from headfold.kept_calls import VALUES, kept
from headfold.planner import make_plan
from headfold.problem import DTYPES, MAX_GROUP, MAX_HEAD_DIM, MAX_SEQLEN, MAX_SPLITS, Problem


@kept
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
    *,
    learnable_sink: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    tree_mask: torch.Tensor | None = None,
    tokens_per_split: int | None = None,
    out: torch.Tensor | None = None,
    shared_prefix_len: int | Sequence[int] | None = None,
    shared_prefix_groups: Sequence[int] | None = None,
) -> Result:
    """Attention against a cache: the decoding step of a language model.

    Args:
        q: (b, sq, h, d), or (total_q, h, d) with cu_seqlens_q.
        k_cache, v_cache: (b, sk, hk, d | dv), or (pages, page_size, hk, d | dv) with page_table.
        cache_seqlens: int or (b,) int32, how many keys of each sequence count; None is the capacity (dense
            caches only). Bytes past it are never read.
        page_table: (b, max_pages) int32; entries past a sequence's end are never read. Any page size.
        cu_seqlens_q, max_seqlen_q: offsets of ragged queries, and an upper bound of their lengths.
        return_softmax_lse: also return the LSE, (b, h, sq) or (h, total_q), float32.
        k, v: (b, s_new, hk, d | dv), or (total_new, hk, d | dv) with cu_seqlens_k_new: new keys and values, written
            into the cache at cache_seqlens, rotated, and then attended to. cache_seqlens itself is not changed.
            The cache must have room; HEADFOLD_CHECK=1 checks it.
        rotary_cos, rotary_sin: (max_len, rotary_dim / 2), q's dtype or float32: rotate new k at cache_seqlens + i,
            and q at cache_seqlens + i with causal or a window, at cache_seqlens otherwise.
        rotary_interleaved: the rotated pairs are columns (0, 1), (2, 3)...; else (i, i + rotary_dim / 2).
        rotary_seqlens: (b,) int32, positions to rotate at instead of cache_seqlens.
        cache_batch_idx: (b,) int32, the cache row of each sequence; with a page_table, its row of the table.
        cache_leftpad: (b,) int32, first valid key of a row; keys before it are not read, and sk and j count from
            it (rotary positions do not).
        tree_mask: bool (b, sq, sq), or its bits packed little-endian into uint8 (b, sq, ceil(sq / 8)): which of
            the newest sq keys each query sees, on top of every earlier key.
        scheduler_metadata: what `get_scheduler_metadata` returned.
        shared_prefix_len: so many leading keys of every sequence of a group lie in the same pages: a multiple of
            page_size, an int on the host for all groups or a sequence of one for each; 0 or None shares nothing. Those
            pages are then read once a group (once for every 64 to 128 of its folded rows), not once a sequence,
            wherever that saves more time than it costs. Needs a page_table: a dense cache is refused, also one of
            which cache_batch_idx picks a row for several sequences.
        shared_prefix_groups: sizes of the groups of neighbouring sequences, ints on the host which sum to b; None is
            one group of all. A group of one shares nothing. `PagedKVCache.shared_prefix` tells both.

    A shared prefix is a promise about memory: it changes speed and the last bits, never the meaning. The table rows of
    a group begin with the same pages, and every query sees the whole prefix: with causal a sequence has at least
    shared_prefix_len + its queries - 1 keys (those appended by the call included), with a tree mask
    shared_prefix_len + its queries. HEADFOLD_CHECK=1 reads that back; without it a broken promise gives wrong results.
    With a left window, attention_chunk, alibi_slopes, cache_leftpad, cache_batch_idx, or a rotation of q without new
    keys the argument changes nothing: the pages are then read once per sequence. With tokens_per_split the prefix and
    the rest are split each for itself, and a sequence's bits depend on its group. A call must have run once with its
    groups before it is captured into a CUDA graph.

    The rest, the errors and the meaning are those of `flash_attn_func`.
    """
    caller = "flash_attn_with_kvcache"
    require_tensors(caller, q=q, k_cache=k_cache, v_cache=v_cache)
    refuse(caller, qv=qv, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    allow_tensors(
        caller,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_seqlens=rotary_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        cu_seqlens_k_new=cu_seqlens_k_new,
        page_table=page_table,
        cu_seqlens_q=cu_seqlens_q,
        tree_mask=tree_mask,
        out=out,
    )
    check_flags(
        caller, causal=causal, rotary_interleaved=rotary_interleaved, return_softmax_lse=return_softmax_lse
    )
    options = plain_options(caller, softmax_scale, causal, window_size, num_splits, pack_gqa, sm_margin)
    options |= features(caller, softcap, attention_chunk, tokens_per_split, learnable_sink, alibi_slopes)
    options["max_seqlen_q"] = bound(caller, "max_seqlen_q", max_seqlen_q)
    options["num_splits"] = _splits_of(scheduler_metadata, options["num_splits"])
    options |= {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad}
    groups = shared_prefix.groups_of(caller, shared_prefix_len, shared_prefix_groups)
    options["tree_mask"] = (
        None if tree_mask is None else _tree_bits(q, tree_mask, options["max_seqlen_q"], cu_seqlens_q)
    )
    appends = k is not None or v is not None
    if not appends and cu_seqlens_k_new is not None:
        raise ValueError(f"{caller}: cu_seqlens_k_new is given without k; it holds the offsets of new keys")
    rotates = rotary_cos is not None or rotary_sin is not None
    lengths = cache_seqlens
    if lengths is not None and not isinstance(lengths, torch.Tensor):
        n = integer(caller, "cache_seqlens", lengths)
        if appends or rotates or cache_leftpad is not None:
            new = k.shape[1] if k is not None and k.dim() == 4 else 0
            lengths = _filled(q, cu_seqlens_q, k_cache, page_table, n, new)
        else:
            k_cache, v_cache, lengths = _constant_length(
                caller, q, k_cache, v_cache, page_table, cu_seqlens_q, n
            )
    if rotates:
        positions = rotary_seqlens if rotary_seqlens is not None else lengths
        options |= {
            "rotary_cos": rotary_cos,
            "rotary_sin": rotary_sin,
            "rotary_positions": positions,
            "rotary_interleaved": rotary_interleaved,
            "rotary_advances": options["window_left"] >= 0 or options["window_right"] >= 0,
        }
    elif rotary_seqlens is not None:
        raise ValueError(
            f"{caller}: rotary_seqlens is given without rotary_cos and rotary_sin; it needs both"
        )
    if appends:
        if k is None or v is None:
            name = "k" if k is None else "v"
            raise ValueError(f"{caller}: {name} is None; new k and v come together")
        if lengths is None:
            raise ValueError(
                f"{caller}: cache_seqlens is None; appending needs to know where the new keys go"
            )
        # Everything that can be refused is refused before the cache is written.
        tensors: tuple[torch.Tensor | None, ...] = (
            *(q, k_cache, v_cache, cu_seqlens_q, None, None, lengths, page_table),
        )
        check_call(tensors, options, out)
        _check_new_batch(k, cu_seqlens_k_new, _batch(q, cu_seqlens_q))
        if cu_seqlens_k_new is None and groups is None:
            x = appending.AppendingInputs(*tensors, **{**options, "new_k": k, "new_v": v})  # type: ignore[arg-type]
            if appending.writes_inside(x, out):
                options |= {"new_k": k, "new_v": v}
                return run(tensors, options, out, return_softmax_lse, appending.OPERATORS)
        if groups is not None:
            shared_prefix.check_append(tensors, options, groups, k, cu_seqlens_k_new)
        before = lengths
        lengths, turned = append(
            k_cache,
            v_cache,
            k,
            v,
            lengths,
            cu_seqlens_k_new,
            page_table,
            cache_batch_idx,
            rotary_cos,
            rotary_sin,
            rotary_seqlens,
            rotary_interleaved,
            q if rotates else None,
            cu_seqlens_q if rotates else None,
            options.get("rotary_advances", True),
            caller,
        )
        if cu_seqlens_k_new is None and cache_batch_idx is None and groups is None:
            # What the append makes of lengths is known without waiting for it.
            options |= {"early_lengths": before, "early_new": k.shape[1]}
        if rotates:
            # The append has rotated it in its launch: the angles' loads would stand at the head of every program here.
            q = turned
            options = {name: value for name, value in options.items() if not name.startswith("rotary")}
    tensors = (q, k_cache, v_cache, cu_seqlens_q, None, None, lengths, page_table)
    if groups is None:
        return run(tensors, options, out, return_softmax_lse)
    options |= {"prefix_lengths": groups.lengths, "group_sizes": groups.sizes}
    return run(tensors, options, out, return_softmax_lse, shared_prefix.OPERATORS)


@dataclass(frozen=True, slots=True)
class SchedulerMetadata:
    """How a decoding step will be split: computed once from bounds, good for every step within them."""

    problem: Problem
    num_splits: int


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: torch.Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,
    headdim_v: int | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> SchedulerMetadata:
    """Decide the splits of `flash_attn_with_kvcache` calls ahead, from bounds alone.

    Nothing is read from the device: the result holds for any lengths up to max_seqlen_k, and may be passed as
    scheduler_metadata again and again. Without it a call decides the same from the cache's capacity.

    Args:
        batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, headdim_v: the shapes' bounds;
            max_seqlen_k_new more keys will be appended.
        cache_seqlens: (b,) int32; only its device is used.
        page_size: of a paged cache; None for a dense one.
        cu_seqlens_q: given when q is ragged. cu_seqlens_k_new, cache_leftpad: accepted, they change nothing.

    The other arguments are those of `flash_attn_with_kvcache`.
    """
    caller = "get_scheduler_metadata"
    require_tensors(caller, cache_seqlens=cache_seqlens)
    allow_tensors(
        caller, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k_new=cu_seqlens_k_new, cache_leftpad=cache_leftpad
    )
    check_flags(caller, causal=causal, has_softcap=has_softcap)
    options = plain_options(caller, None, causal, window_size, num_splits, pack_gqa, sm_margin)
    head_dim_v = headdim if headdim_v is None else headdim_v
    for name, value, least, most in (
        ("batch_size", batch_size, 0, None),
        ("max_seqlen_q", max_seqlen_q, 0, MAX_SEQLEN),
        ("max_seqlen_k", max_seqlen_k, 0, MAX_SEQLEN),
        ("max_seqlen_k_new", max_seqlen_k_new, 0, MAX_SEQLEN),
        ("num_heads_q", num_heads_q, 1, None),
        ("num_heads_kv", num_heads_kv, 1, None),
        ("headdim", headdim, 1, MAX_HEAD_DIM),
        ("headdim_v", head_dim_v, 1, MAX_HEAD_DIM),
        ("page_size", 1 if page_size is None else page_size, 1, MAX_SEQLEN),
        ("attention_chunk", attention_chunk, 0, MAX_SEQLEN),
        ("num_splits", num_splits, 0, MAX_SPLITS),
        ("sm_margin", sm_margin, 0, None),
    ):
        if integer(caller, name, value) < least or (most is not None and value > most):
            need = f">= {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"{caller}: {name} is {value}; it must be {need}")
    for side in ("left", "right"):
        if options[f"window_{side}"] < -1:
            raise ValueError(
                f"{caller}: window_size has {side} side {options[f'window_{side}']}; "
                "a side is None or -1 (open), or >= 0"
            )
    if num_heads_q % num_heads_kv != 0 or num_heads_q > MAX_GROUP * num_heads_kv:
        raise ValueError(
            f"{caller}: num_heads_q is {num_heads_q}; it must be a multiple of the {num_heads_kv} KV heads, "
            f"at most {MAX_GROUP} times as many"
        )
    if not isinstance(qkv_dtype, torch.dtype):
        raise TypeError(f"{caller}: qkv_dtype is {qkv_dtype!r}; it must be a torch.dtype")
    if qkv_dtype not in DTYPES:
        raise ValueError(f"{caller}: qkv_dtype is {qkv_dtype}; it must be float16, bfloat16 or float32")
    if cache_seqlens.dtype != torch.int32 or cache_seqlens.shape != (batch_size,):
        raise ValueError(
            f"{caller}: cache_seqlens is {cache_seqlens.dtype} of shape {tuple(cache_seqlens.shape)}; "
            f"it must be int32 of shape ({batch_size},)"
        )
    keys = max_seqlen_k + max_seqlen_k_new
    if keys > MAX_SEQLEN:
        raise ValueError(
            f"{caller}: max_seqlen_k_new is {max_seqlen_k_new}; with max_seqlen_k it may be at most {MAX_SEQLEN}"
        )
    problem = Problem(
        device_type=cache_seqlens.device.type,
        dtype=qkv_dtype,
        batch=batch_size,
        num_heads=num_heads_q,
        num_kv_heads=num_heads_kv,
        head_dim=headdim,
        head_dim_v=head_dim_v,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=keys,
        total_q=batch_size * max_seqlen_q,
        total_k=batch_size * keys,
        q_layout="dense" if cu_seqlens_q is None else "ragged",
        kv_layout="dense" if page_size is None else "paged",
        page_size=page_size or 0,
        window_left=None if options["window_left"] < 0 else options["window_left"],
        window_right=None if options["window_right"] < 0 else options["window_right"],
        lengths_on_device=True,
        num_splits=options["num_splits"],
        pack_gqa=pack_gqa,
        sm_margin=options["sm_margin"],
        softcap=has_softcap,
        attention_chunk=attention_chunk,
    )
    plan = make_plan(problem, device_of(cache_seqlens.device))
    # A list that is cut on the device has no number of splits to fix ahead, and the Gluon kernel takes none that is asked for;
    # 0 leaves a call to the same plan.
    fixed = plan.kernel == "decode" and plan.backend != "hopper" and not plan.ranges
    return SchedulerMetadata(problem, plan.num_splits if fixed else 0)


# What a call does with it depends on what it is equal to.
VALUES.add(SchedulerMetadata)


def _splits_of(metadata: Any, num_splits: int) -> int:
    if metadata is None:
        return num_splits
    if not isinstance(metadata, SchedulerMetadata):
        raise TypeError(
            f"flash_attn_with_kvcache: scheduler_metadata is a {type(metadata).__name__}; "
            "it must be what get_scheduler_metadata returned"
        )
    return num_splits or metadata.num_splits


def _tree_bits(
    q: torch.Tensor, tree: torch.Tensor, max_seqlen_q: int | None, cu_seqlens_q: torch.Tensor | None
) -> torch.Tensor:
    """A tree mask as bool: packed bits are unpacked, least significant first."""
    if tree.dtype != torch.uint8:
        return tree
    batch, lead = _batch(q, cu_seqlens_q), 0 if cu_seqlens_q is not None else 1
    if q.dim() <= lead:
        return tree  # problem.check says what is wrong
    sq = q.shape[lead] if max_seqlen_q is None else min(q.shape[lead], max_seqlen_q)
    if (
        tree.dim() != 3
        or tree.shape[0] != batch
        or tree.shape[1] < sq
        or tree.shape[2] != -(-tree.shape[1] // 8)
    ):
        raise ValueError(
            f"flash_attn_with_kvcache: tree_mask has shape {tuple(tree.shape)}; packed bits must be "
            f"(b, sq, ceil(sq / 8)) with b = {batch} and sq >= {sq}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=tree.device)
    return ((tree.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : tree.shape[1]].bool()


def _batch(q: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> int:
    if cu_seqlens_q is not None:
        return max(0, cu_seqlens_q.numel() - 1)
    return q.shape[0] if q.dim() else 0  # problem.check says what is wrong


def _check_new_batch(k: torch.Tensor, cu_seqlens_k_new: torch.Tensor | None, batch: int) -> None:
    """The new keys are for the queries' sequences; all else about them is checked by append."""
    caller = "flash_attn_with_kvcache"
    if cu_seqlens_k_new is None:
        if k.dim() == 4 and k.shape[0] != batch:
            raise ValueError(f"{caller}: k has batch {k.shape[0]}; it must have the queries' batch {batch}")
    elif cu_seqlens_k_new.dim() == 1 and cu_seqlens_k_new.shape[0] != batch + 1:
        raise ValueError(
            f"{caller}: cu_seqlens_k_new has shape ({cu_seqlens_k_new.shape[0]}); "
            f"it must be ({batch + 1}) for this batch"
        )


def _filled(
    q: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    k_cache: torch.Tensor,
    page_table: torch.Tensor | None,
    n: int,
    new: int,
) -> torch.Tensor:
    """The same length for every sequence, on the device, with room for `new` more keys."""
    if k_cache.dim() == 4 and (page_table is None or page_table.dim() == 2):
        room = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
        if not 0 <= n <= room - new:
            more = f", {new} of them new" if new else ""
            raise ValueError(
                f"flash_attn_with_kvcache: cache_seqlens is {n}; there is room for 0 to {room} keys{more}"
            )
    return torch.full((_batch(q, cu_seqlens_q),), n, dtype=torch.int32, device=q.device)


def _constant_length(
    caller: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    n: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A length that the host knows: a shorter view of a dense cache, a filled tensor for a paged one."""
    if k_cache.dim() != 4 or v_cache.dim() != 4 or k_cache.shape[:-1] != v_cache.shape[:-1]:
        return k_cache, v_cache, None  # problem.check says what is wrong
    if page_table is None:
        if not 0 <= n <= k_cache.shape[1]:
            raise ValueError(f"{caller}: cache_seqlens is {n}; the cache holds 0 to {k_cache.shape[1]} keys")
        return k_cache[:, :n], v_cache[:, :n], None
    if page_table.dim() != 2:
        return k_cache, v_cache, None
    room = page_table.shape[1] * k_cache.shape[1]
    if not 0 <= n <= room:
        raise ValueError(f"{caller}: cache_seqlens is {n}; the page table has room for 0 to {room} keys")
    return (
        k_cache,
        v_cache,
        torch.full((_batch(q, cu_seqlens_q),), n, dtype=torch.int32, device=k_cache.device),
    )
