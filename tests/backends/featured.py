"""Inputs that ask for any of the features, in any combination; keys that no query sees hold NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from headfold import reference
from headfold.problem import Inputs
from tests.cases import NAN, make

INF = float("inf")


def featured(
    names: Iterable[str],
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    *,
    seed: int = 0,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = True,
    **kwargs: Any,
) -> Inputs:
    """`make`, with the named features of FEATURES on top."""
    g = torch.Generator().manual_seed(seed)
    x = make(q_lens, k_lens, seed=seed, **kwargs)
    x = dataclasses.replace(x, window_left=window[0], window_right=window[1], bottom_right=bottom_right)
    for name in names:
        FEATURES[name](x, g)
    poison_unseen(x)
    return x


def _any(g: torch.Generator, *options: Any) -> Any:
    return options[int(torch.randint(len(options), (), generator=g))]


def _heads(x: Inputs) -> int:
    return x.q.shape[-2]


def _longest(x: Inputs) -> tuple[int, int]:
    """Bounds of the lengths: what a mask's last dimensions are."""
    if x.page_table is not None:
        keys = x.page_table.shape[1] * x.k.shape[1]
    else:
        keys = x.k.shape[1] if x.cu_seqlens_k is None else int(x.max_seqlen_k or 0)
    return x.q.shape[1] if x.cu_seqlens_q is None else int(x.max_seqlen_q or 0), keys


def _softcap(x: Inputs, g: torch.Generator) -> None:
    x.softcap = _any(g, 0.5, 3.0, 30.0)


def _sink(x: Inputs, g: torch.Generator) -> None:
    dtype = _any(g, torch.float32, torch.bfloat16, torch.float16)
    x.sink = (3 * torch.randn(_heads(x), generator=g)).to(dtype)


def _chunk(x: Inputs, g: torch.Generator) -> None:
    x.attention_chunk = _any(g, 1, 4, 16, 33, 10_000)


def _slopes(x: Inputs, g: torch.Generator) -> None:
    x.alibi_slopes = torch.rand(*_any(g, (), (x.batch,)), _heads(x), generator=g)


def _mask_shape(x: Inputs, g: torch.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(own, expanded): some dimensions of a mask are 1 and then expanded, and a row is longer than it need be."""
    full = (x.batch, _heads(x), *_longest(x))
    return tuple(_any(g, n, n, 1) for n in full), full


def _bool_mask(x: Inputs, g: torch.Generator) -> None:
    own, full = _mask_shape(x, g)
    x.mask = (torch.rand(own, generator=g) < _any(g, 0.2, 0.7)).expand(full)


def _added_mask(x: Inputs, g: torch.Generator) -> None:
    own, full = _mask_shape(x, g)
    mask = torch.randn(own, generator=g).masked_fill(torch.rand(own, generator=g) < 0.3, -INF)
    dtype = _any(g, x.q.dtype, torch.float32)
    x.mask = mask.to(dtype).transpose(2, 3).contiguous().transpose(2, 3).expand(full)


def _tree(x: Inputs, g: torch.Generator) -> None:
    n = _longest(x)[0]
    x.tree_mask = torch.rand(x.batch, n, n, generator=g) < 0.4


def _batch_idx(x: Inputs, g: torch.Generator) -> None:
    """The cache, or the page table, has more rows than the batch, in another order."""
    if x.cu_seqlens_k is not None and x.page_table is None:
        return
    rows = torch.randperm(x.batch + 2, generator=g)[: x.batch]
    x.cache_batch_idx = rows.int()
    for name in ("k", "v") if x.page_table is None else ("page_table",):
        t = getattr(x, name)
        filler = NAN if t.is_floating_point() else 2**31 - 1
        setattr(x, name, t.new_full((x.batch + 2, *t.shape[1:]), filler).index_copy_(0, rows, t))


def _leftpad(x: Inputs, g: torch.Generator) -> None:
    lens = [reference.keys_of(x, i)[0].shape[0] for i in range(x.batch)]
    x.cache_leftpad = torch.tensor([_any(g, 0, min(3, n), n // 2, n, n + 1) for n in lens], dtype=torch.int32)
    for i, n in enumerate(lens):
        pad = int(x.cache_leftpad[i])
        _fill(x, i, list(range(-pad, min(n, pad) - pad)))


def _rotary(x: Inputs, g: torch.Generator) -> None:
    half = int(torch.randint(x.q.shape[-1] // 2 + 1, (), generator=g))
    angle = 6 * torch.rand(100 + _longest(x)[0], half, generator=g)
    dtype = _any(g, torch.float32, x.q.dtype)
    x.rotary_cos, x.rotary_sin = angle.cos().to(dtype), angle.sin().to(dtype)
    x.rotary_positions = torch.randint(100, (x.batch,), generator=g, dtype=torch.int32)
    x.rotary_interleaved, x.rotary_advances = _any(g, True, False), _any(g, True, False)


def _fixed_splits(x: Inputs, g: torch.Generator) -> None:
    x.tokens_per_split = _any(g, 1, 8, 50, 1000)


FEATURES: dict[str, Callable[[Inputs, torch.Generator], None]] = {
    "batch_idx": _batch_idx,
    "leftpad": _leftpad,
    "softcap": _softcap,
    "sink": _sink,
    "chunk": _chunk,
    "slopes": _slopes,
    "bool_mask": _bool_mask,
    "added_mask": _added_mask,
    "tree": _tree,
    "rotary": _rotary,
    "fixed_splits": _fixed_splits,
}


def poison_unseen(x: Inputs) -> None:
    """NaN in every key and value that no query of its sequence sees."""
    for i in range(x.batch):
        sq, sk = reference.queries_of(x, i).shape[0], reference.keys_of(x, i)[0].shape[0]
        seen = reference.mask_of(x, i, sq, sk)[0]
        unseen = ~seen.expand(seen.shape[0], sq, sk).any(0).any(0)
        _fill(x, i, unseen.nonzero().flatten().tolist())


def _fill(x: Inputs, i: int, keys: list[int]) -> None:
    """NaN in keys of sequence i, counted from its first valid one."""
    pad = 0 if x.cache_leftpad is None else int(x.cache_leftpad[i])
    row = i if x.cache_batch_idx is None else int(x.cache_batch_idx[i])
    token = torch.tensor(keys, dtype=torch.long) + pad
    for t in (x.k, x.v):
        if x.page_table is not None:
            t[x.page_table[row][token // t.shape[1]].long(), token % t.shape[1]] = NAN
        elif x.cu_seqlens_k is not None:
            t[int(x.cu_seqlens_k[i]) + token] = NAN
        else:
            t[row, token] = NAN


def alone(x: Inputs, i: int) -> Inputs:
    """Sequence i as a batch of one, in memory of its own. q and K/V are dense or ragged, without leftpad."""
    one = slice(i, i + 1)
    fields: dict[str, Any] = {
        n: t if t is None else t[one].clone()
        for n in ("seqused_q", "seqused_k", "mask", "tree_mask", "rotary_positions")
        for t in (getattr(x, n),)
    }
    for names, offsets in ((("q",), x.cu_seqlens_q), (("k", "v"), x.cu_seqlens_k)):
        for n in names:
            t = getattr(x, n)
            if offsets is None:
                fields[n] = t[one].clone()
                continue
            fields[n] = t[int(offsets[i]) : int(offsets[i + 1])].clone()
            fields[f"cu_seqlens_{names[0]}"] = torch.tensor([0, fields[n].shape[0]], dtype=torch.int32)
    return dataclasses.replace(x, max_seqlen_q=None, max_seqlen_k=None, **fields)
