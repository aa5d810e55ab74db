"""The errors of flash_attn_with_kvcache."""

from __future__ import annotations

from typing import Any

import torch

from tests.interface.append_errors import angles, new_tensor, with_append
from tests.interface.attention_errors import LONG_K, LONG_V, attention_errors, bound
from tests.interface.bad import (
    APPEND,
    BASES,
    COS,
    GRAD,
    NEW_K,
    NEW_V,
    PAGED,
    RAGGED_NEW,
    ROTARY,
    SIN,
    TABLE,
    Bad,
    K,
    Q,
    V,
    contiguous,
    flag,
    index_tensor,
    inner_stride,
    no_tensor,
    wrong,
)
from tests.interface.tensors import ints, rand

TREE = torch.ones(2, 3, 3, dtype=torch.bool)
LONG_ENOUGH = {**PAGED, "cache_seqlens": ints(8, 7)}


def shared(message: str, kind: type[Exception] = ValueError, **promise: Any) -> list[Bad]:
    """A promise that does not fit, in a call that reads pages and in one that appends to them too."""
    calls = (LONG_ENOUGH, {**PAGED, **APPEND})
    return [wrong(message, kind, **base, **promise) for base in calls]


KVCACHE_ERRORS: dict[str, list[Bad]] = {
    **attention_errors(BASES["flash_attn_with_kvcache"], {"k_cache": LONG_K, "v_cache": LONG_V}),
    "k": new_tensor("k", NEW_K, "k_cache"),
    "v": [
        *new_tensor("v", NEW_V, "v_cache"),
        wrong(
            "v has shape (2, 1, 2, 6); all but its last size must equal k's",
            **with_append(v=NEW_V[:, :1]),
        ),
    ],
    "cu_seqlens_k_new": [
        no_tensor("cu_seqlens_k_new", [0, 1]),
        wrong("cu_seqlens_k_new is given without k; it holds", cu_seqlens_k_new=ints(0, 1, 4)),
        *(
            wrong(
                f"cu_seqlens_k_new {message}",
                **{**RAGGED_NEW, "cu_seqlens_k_new": offsets},
                cache_seqlens=2,
            )
            for message, offsets in (
                ("has dtype torch.int64; it must be int32", ints(0, 1, 4).long()),
                ("is on meta; it must be on k_cache's device cpu", ints(0, 1, 4).to("meta")),
                ("has shape (2); it must be (3) for this batch", ints(0, 4)),
                ("has shape (0); it must be (3) for this batch", ints()),
                ("has shape (); it must be (b + 1,)", ints(0)[0]),
                ("has shape (3, 1); it must be (b + 1,)", ints(0, 1, 4)[:, None]),
                (
                    "has last stride 2; its last dimension must be contiguous",
                    ints(0, 0, 1, 1, 4, 4)[::2],
                ),
            )
        ),
    ],
    "rotary_cos": angles("rotary_cos", COS),
    "rotary_sin": [
        *angles("rotary_sin", SIN),
        wrong(
            "rotary_sin is (15, 3) torch.float32 with strides (3, 1); it must be laid out as rotary_cos",
            **{**ROTARY, "rotary_sin": SIN[1:]},
        ),
        wrong(
            "rotary_sin is (16, 3) torch.float32 with strides (4, 1); it must be laid out as rotary_cos",
            **{**ROTARY, "rotary_sin": rand(16, 4)[:, :3]},
        ),
    ],
    "rotary_seqlens": [
        *index_tensor("rotary_seqlens", ints(2, 0), **ROTARY),
        *index_tensor("rotary_seqlens", ints(2, 0), **ROTARY, k=NEW_K, v=NEW_V)[1:],
        wrong("rotary_seqlens has shape (3,); it must be (2,)", **ROTARY, rotary_seqlens=ints(1, 2, 3)),
        wrong("rotary_seqlens is given without rotary_cos and rotary_sin", rotary_seqlens=ints(1, 2)),
        wrong(
            "rotary_seqlens is None; rotary_cos needs the position of every sequence",
            rotary_cos=COS,
            rotary_sin=SIN,
        ),
    ],
    "cache_batch_idx": [
        *index_tensor("cache_batch_idx", ints(1, 0)),
        *index_tensor("cache_batch_idx", ints(1, 0), **APPEND)[1:],
        wrong("cache_batch_idx has shape (3,); it must be (2,)", cache_batch_idx=ints(0, 1, 1)),
    ],
    "cache_leftpad": [
        *index_tensor("cache_leftpad", ints(1, 0)),
        *index_tensor("cache_leftpad", ints(1, 0), cache_seqlens=2)[1:],
        wrong("cache_leftpad has shape (1,); it must be (2,)", cache_leftpad=ints(0)),
    ],
    "scheduler_metadata": [
        wrong(
            f"scheduler_metadata is a {type(value).__name__}; it must be what get_scheduler_metadata returned",
            TypeError,
            scheduler_metadata=value,
        )
        for value in (ints(1, 2), 4, {})
    ],
    "tree_mask": [
        no_tensor("tree_mask", [[True]]),
        wrong("tree_mask has dtype torch.float32; it must be bool (or packed", tree_mask=TREE.float()),
        wrong("tree_mask is on meta; it must be on the queries' device cpu", tree_mask=TREE.to("meta")),
        *(
            wrong(
                f"tree_mask has shape {tuple(tree.shape)}; it must be (b, sq, sq) = (2, 3, 3)",
                tree_mask=tree,
            )
            for tree in (TREE[:1], TREE[0], TREE[:, :2, :2], TREE[:, :2], TREE[..., None])
        ),
        contiguous("tree_mask", TREE),
        *(
            wrong(
                f"tree_mask has shape {shape}; packed bits must be (b, sq, ceil(sq / 8)) with b = 2 and sq >= 3",
                tree_mask=torch.ones(shape, dtype=torch.uint8),
            )
            for shape in ((2, 3, 3), (2, 2, 1), (1, 3, 1), (3, 1), (2, 9, 1), ())
        ),
        # The queries are wrong, and packed bits must not hide it.
        wrong("q has shape (8); it must be (", q=Q[0, 0, 0], tree_mask=TREE.byte()[..., :1]),
    ],
    "shared_prefix_len": [
        *(
            bad
            for value in (4.0, True, "4", torch.tensor(4), {4})
            for bad in shared(
                f"shared_prefix_len is {value!r}; it must be an int on the host",
                TypeError,
                shared_prefix_len=value,
            )
        ),
        *shared(
            "shared_prefix_len[1] is 4.0; it must be an int on the host",
            TypeError,
            shared_prefix_len=[4, 4.0],
            shared_prefix_groups=[1, 1],
        ),
        *shared("shared_prefix_len is -4; it must be >= 0, and 0 shares nothing", shared_prefix_len=-4),
        *shared(
            "shared_prefix_len is 7; it must be a multiple of the page_size 4: use 4", shared_prefix_len=7
        ),
        *shared("shared_prefix_len is 12; the page table has room for 8 keys", shared_prefix_len=12),
        *shared("shared_prefix_len has 2 entries; there is 1 group", shared_prefix_len=[4, 4]),
        *shared("shared_prefix_len has 0 entries; there is 1 group", shared_prefix_len=[]),
        *shared(
            "shared_prefix_len has 1 entries; there are 2 groups",
            shared_prefix_len=[4],
            shared_prefix_groups=[1, 1],
        ),
        wrong("shared_prefix_len is 4 without a page_table; what sequences share", shared_prefix_len=4),
        wrong(
            "shared_prefix_len is 4 without a page_table; what sequences share",
            shared_prefix_len=4,
            cache_batch_idx=ints(0, 0),
        ),
        # Other arguments are wrong, and a promise must not hide it.
        wrong("q has shape (3, 4, 8); it must be (b, sq, h, d)", **LONG_ENOUGH, q=Q[0], shared_prefix_len=4),
        wrong(
            "page_table has shape (2); it must be (2, max_pages) for this batch",
            **{**LONG_ENOUGH, "page_table": TABLE[0]},
            shared_prefix_len=4,
        ),
    ],
    "shared_prefix_groups": [
        *(
            bad
            for value in (2, 2.0, "11", ints(1, 1), {1: 1})
            for bad in shared(
                f"shared_prefix_groups is {value!r}; it must be a sequence of ints on the host",
                TypeError,
                shared_prefix_len=4,
                shared_prefix_groups=value,
            )
        ),
        *shared(
            "shared_prefix_groups[0] is None; it must be an int on the host",
            TypeError,
            shared_prefix_len=4,
            shared_prefix_groups=[None, 1],
        ),
        *shared(
            "shared_prefix_groups[1] is 0; a group has at least 1 sequence",
            shared_prefix_len=4,
            shared_prefix_groups=[2, 0],
        ),
        *shared(
            "shared_prefix_groups has sizes that sum to 3; they must sum to the batch of 2",
            shared_prefix_len=4,
            shared_prefix_groups=[1, 2],
        ),
        *shared(
            "shared_prefix_groups has sizes that sum to 0; they must sum to the batch of 2",
            shared_prefix_len=0,
            shared_prefix_groups=[],
        ),
        *shared(
            "shared_prefix_groups is given without shared_prefix_len; it says which sequences",
            shared_prefix_groups=[1, 1],
        ),
    ],
    "rotary_interleaved": flag("rotary_interleaved"),
    "return_softmax_lse": flag("return_softmax_lse"),
    "cache_seqlens": [
        *index_tensor("cache_seqlens", ints(5, 5))[1:],
        *(
            wrong(f"cache_seqlens is {value!r}; it must be an int", TypeError, cache_seqlens=value)
            for value in (2.0, True, [1, 2], "2")
        ),
        wrong("cache_seqlens has shape (3); it must be (2) for this batch", cache_seqlens=ints(1, 2, 3)),
        wrong("cache_seqlens is -1; the cache holds 0 to 5 keys", cache_seqlens=-1),
        wrong("cache_seqlens is 6; the cache holds 0 to 5 keys", cache_seqlens=6),
        wrong("cache_seqlens is -1; the page table has room for 0 to 8 keys", **PAGED, cache_seqlens=-1),
        wrong("cache_seqlens is 9; the page table has room for 0 to 8 keys", **PAGED, cache_seqlens=9),
        wrong("cache_seqlens is None; a paged cache needs the length of every sequence", **PAGED),
        wrong("cache_seqlens is None; appending needs to know where", k=NEW_K, v=NEW_V),
        *(
            wrong(message, **{**APPEND, **more, "cache_seqlens": length})
            for message, more, length in (
                ("cache_seqlens is -1; there is room for 0 to 5 keys", {}, -1),
                ("cache_seqlens is 4; there is room for 0 to 5 keys, 2 of them new", {}, 4),
                ("cache_seqlens is 7; there is room for 0 to 8 keys, 2 of them new", PAGED, 7),
                ("cache_seqlens is 6; there is room for 0 to 5 keys", RAGGED_NEW, 6),
                ("cache_seqlens has dtype torch.int64; it must be int32", {}, ints(3, 1).long()),
                ("cache_seqlens has shape (3); it must be (2) for this batch", {}, ints(1, 2, 3)),
            )
        ),
        *(
            wrong(
                f"cache_seqlens is {n}; there is room for 0 to 5 keys",
                cache_leftpad=ints(0, 0),
                cache_seqlens=n,
            )
            for n in (-1, 6)
        ),
        wrong("q has shape (); it must be (", q=Q.sum(), **{**ROTARY, "cache_seqlens": 2}),
        wrong("q has shape (); it must be (", q=Q.sum(), **PAGED, cache_seqlens=2),
        # Other arguments are wrong, and an int length must not hide it.
        no_tensor("k_cache", None, optional=False),
        wrong("k_cache is a NoneType; it must be a torch.Tensor", TypeError, k_cache=None, cache_seqlens=2),
        wrong("k_cache has shape (2, 5, 16); it must be", k_cache=K.flatten(2), cache_seqlens=2),
        wrong("k_cache has shape (8); it must be", k_cache=K[0, 0, 0], cache_seqlens=-1),
        wrong("v_cache has shape (5, 2, 6); it must be", v_cache=V[0], cache_seqlens=2),
        wrong("v_cache has shape (2, 4, 2, 6); all but", v_cache=V[:, :4], cache_seqlens=2),
    ],
    "page_table": [
        no_tensor("page_table", [[0]]),
        wrong(
            "page_table is a list; it must be None or",
            TypeError,
            **{**PAGED, "page_table": [0]},
            cache_seqlens=2,
        ),
        *(
            wrong(message, **{**PAGED, "page_table": table}, cache_seqlens=length)
            for length in (2, ints(2, 2))
            for message, table in (
                ("page_table has dtype torch.int64; it must be int32", TABLE.long()),
                ("page_table is on meta; it must be on the queries' device cpu", TABLE.to("meta")),
                ("page_table has shape (2); it must be (2, max_pages) for this batch", TABLE[0]),
                ("page_table has shape (1, 2); it must be (2, max_pages) for this batch", TABLE[:1]),
                (
                    "page_table has last stride 2; its last dimension must be contiguous",
                    inner_stride(TABLE),
                ),
            )
        ),
    ],
    "cu_seqlens_q": [
        *index_tensor("cu_seqlens_q", ints(0, 3, 6), q=Q.flatten(0, 1), out=None),
        wrong(
            "q has shape (2, 3, 4, 8); it must be (total_q, h, d), since cu_seqlens_q is given",
            cu_seqlens_q=ints(0, 3, 6),
        ),
        wrong(
            "k_cache has batch 2; it must have the queries' batch 1",
            q=Q.flatten(0, 1),
            cu_seqlens_q=ints(0, 6),
            out=None,
        ),
    ],
    "max_seqlen_q": [
        *bound("max_seqlen_q"),
        wrong("max_seqlen_q is 2; every sequence has length 3, and it must bound them all", max_seqlen_q=2),
    ],
}


# Caches that cannot be appended to, or not beside these queries.
for _cache, _t in (("k_cache", K), ("v_cache", V)):
    KVCACHE_ERRORS[_cache] += [
        wrong(f"{_cache} is expanded (a stride is 0)", **with_append(**{_cache: _t[:1].expand_as(_t)})),
        wrong(GRAD, NotImplementedError, **with_append(**{_cache: _t.clone().requires_grad_()})),
    ]
