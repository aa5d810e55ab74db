"""Random calls within what the Gluon kernel takes, for GPUs and for its emulation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from headfold.planner import short
from headfold.planner.hopper import padded_dim
from headfold.problem import Inputs
from tests.cases import NAN

DIMS = ((128, 128), (128, 128), (64, 64), (256, 256), (192, 128), (64, 128), (96, 96), (56, 120))
RAGGED_DIMS = ((128, 128), (64, 64), (256, 256), (192, 128))
# Head dimensions in two parts, some filled in part; buffers of queries with and without room for results.
PARTED_DIMS = (
    (96, 96),
    (80, 80),
    (72, 88),
    (192, 192),
    (160, 136),
    (160, 96),
    (256, 192),
    (96, 64),
    (64, 96),
)


@dataclass(frozen=True)
class Bounds:
    """Of what is drawn: smaller for the emulator, which takes a millisecond a block."""

    queries: int = 700
    keys: int = 900
    batch: int = 3
    kv_heads: int = 3
    groups: tuple[int, ...] = (1, 2, 3, 4, 5, 8)


LARGE = Bounds()
LARGE_RAGGED = Bounds(queries=600, batch=5, kv_heads=2, groups=(1, 3, 4))
SMALL = Bounds(queries=300, keys=420, batch=2, kv_heads=1, groups=(1, 2, 3))
SMALL_RAGGED = Bounds(queries=300, keys=420, batch=4, kv_heads=1, groups=(1, 3))


class Draw:
    """Tensors on one device."""

    def __init__(self, seed: int, device: str) -> None:
        self.r = random.Random(seed)
        self.device = device
        torch.manual_seed(seed)

    def rand(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def ints(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def offsets(self, lengths: list[int]) -> torch.Tensor:
        return self.ints([0, *lengths]).cumsum(0).int()


def drawn(seed: int, device: str, bounds: Bounds = LARGE, dims: Sequence[tuple[int, int]] = DIMS) -> Inputs:
    """Random shapes, strides, windows and, where tiles are padded by little, masks of dense tensors."""
    draw = Draw(seed, device)
    r, rand = draw.r, draw.rand
    dtype = r.choice((torch.bfloat16, torch.float16))
    batch, hk, group = r.randint(1, bounds.batch), r.randint(1, bounds.kv_heads), r.choice(bounds.groups)
    sq, sk = r.randint(129, bounds.queries), r.randint(1, bounds.keys)
    d, dv = r.choice(dims)
    pad = r.choice((0, 8, 64))  # rows of a wider tensor: strides that are not the sizes'
    group = min(group, 3) if d == 256 else group
    q = rand(batch, sq, hk * group, d + pad, dtype=dtype)[..., :d]
    k = (
        rand(batch, hk, sk, d, dtype=dtype).transpose(1, 2)
        if r.random() < 0.5
        else rand(batch, sk, hk, d, dtype=dtype)
    )
    v = rand(batch, sk, hk, dv + pad, dtype=dtype)[..., pad:]
    window = r.choice(
        ((-1, -1), (-1, 0), (r.randint(0, 300), 0), (r.randint(0, 300), r.randint(0, 300)), (50, -1))
    )
    masked = r.random() < 0.5 and all(padded_dim(n) for n in (d, dv))
    mask = drawn_mask(draw, batch, hk * group, sq, sk) if masked else None
    return Inputs(
        q,
        k,
        v,
        window_left=window[0] if mask is None else -1,
        window_right=window[1],
        bottom_right=r.random() < 0.5,
        softmax_scale=r.choice((None, 0.0, 0.3)),
        mask=mask,
    )


def drawn_mask(draw: Draw, batch: int, heads: int, sq: int, sk: int) -> torch.Tensor:
    """Bool or additive, per batch and head or broadcast, with dead rows and dead blocks."""
    r = draw.r
    width = -(-sk // 16) * 16  # rows of 16-byte multiples
    shape = (r.choice((1, batch)), r.choice((1, heads)), sq, width)
    if r.random() < 0.4:
        mask = torch.rand(shape, device=draw.device) < r.choice((0.02, 0.5, 0.98))
        hidden: Any = False
    else:
        mask = draw.rand(*shape, dtype=r.choice((torch.bfloat16, torch.float16)))
        mask[torch.rand(shape, device=draw.device) < r.choice((0.0, 0.4))] = -torch.inf
        hidden = -torch.inf
    mask[:, :, r.randrange(sq)] = hidden
    low = r.randrange(sk)
    mask[..., low : low + r.choice((0, 300))] = hidden
    if r.random() < 0.3:
        mask[:, -1] = hidden
    return mask[..., :sk].expand(batch, heads, sq, sk)


def drawn_ragged(
    seed: int, device: str, bounds: Bounds = LARGE_RAGGED, dims: Sequence[tuple[int, int]] = RAGGED_DIMS
) -> Inputs:
    """Offsets and lengths in device memory; what lies beyond a sequence's end is NaN or another sequence."""
    draw = Draw(seed, device)
    r, rand = draw.r, draw.rand
    d, dv = r.choice(dims)
    batch, hk, group = r.randint(1, bounds.batch), r.randint(1, bounds.kv_heads), r.choice(bounds.groups)
    q_lens = [r.choice((0, 1, 128, r.randint(1, bounds.queries))) for _ in range(batch)]
    k_lens = [r.choice((0, 1, 256, r.randint(1, bounds.keys))) for _ in range(batch)]
    q_lens[0] = bounds.queries // 2
    x = Inputs(rand(1), rand(1), rand(1), window_right=r.choice((-1, 0)), window_left=r.choice((-1, -1, 77)))
    if r.random() < 0.5:  # ragged q
        x.q = rand(sum(q_lens) + 5, hk * group, d)
        x.cu_seqlens_q = draw.offsets(q_lens)
        x.max_seqlen_q = max(q_lens)
    else:
        x.q = rand(batch, max(q_lens), hk * group, d)
        x.seqused_q = draw.ints(q_lens)
    if r.random() < 0.5:  # ragged k
        rows = sum(k_lens) + 5
        x.k, x.v = rand(rows, hk, d), rand(rows, hk, dv)
        x.cu_seqlens_k = draw.offsets(k_lens)
        x.max_seqlen_k = max(*k_lens, 1)  # a batch without a key is no launch at all
        x.k[sum(k_lens) :], x.v[sum(k_lens) :] = NAN, NAN
        if r.random() < 0.5:
            used = [r.randint(0, n) for n in k_lens]
            x.seqused_k = draw.ints(used)
            starts = x.cu_seqlens_k.tolist()
            for n, first, last in zip(used, starts, starts[1:], strict=False):
                x.k[first + n : last], x.v[first + n : last] = NAN, NAN
    else:
        most = max(*k_lens, 1)
        x.k, x.v = rand(batch, most, hk, d), rand(batch, most, hk, dv)
        x.seqused_k = draw.ints(k_lens)
        for i, n in enumerate(k_lens):
            x.k[i, n:], x.v[i, n:] = NAN, NAN
    return x


FEATURES = ("sink", "softcap", "chunk")


def with_features(x: Inputs, seed: int, features: Sequence[str] = ()) -> Inputs:
    """The call with sinks, a softcap and attention chunks, or with some of them; with a mask there are sinks alone."""
    draw = Draw(seed, x.q.device.type)
    r = draw.r
    chosen = features or r.sample(FEATURES, r.randint(1, len(FEATURES)))
    if "sink" in chosen or x.mask is not None:
        dtype = r.choice((torch.bfloat16, torch.float16, torch.float32))
        # From a place of any alignment.
        skip = r.randint(0, 3)
        x = replace(x, sink=(2 * draw.rand(x.q.shape[-2] + skip, dtype=dtype))[skip:])
    if "softcap" in chosen and x.mask is None:
        x = replace(x, softcap=r.choice((0.5, 3.0, 50.0)))
    if "chunk" in chosen and x.mask is None:
        x = replace(x, attention_chunk=r.choice((1, 16, 50, 64, 100, 128, 130, 250, 4096)))
    return x


LAYOUTS = ("apart", "halves", "heads first")


def short_tiles_up_to(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short tiles where a tile of two consumers sees up to so many blocks: 0 for nowhere."""
    for most in ("MOST_BLOCKS", "MOST_BLOCKS_DENSE", "MOST_BLOCKS_RAGGED"):
        monkeypatch.setattr(short, most, dict.fromkeys(short.RESIDENT, blocks))


def in_pages(
    x: Inputs,
    lengths: list[int],
    page_size: int,
    garbage_before: int = 0,
    shuffled: bool = True,
    layout: str = "apart",
) -> Inputs:
    """The call with the first `lengths` keys of each dense sequence in pages, the table a part of a wider one.

    Pages that nobody owns and rows past the ends hold NaN, table entries past the ends garbage; entries of pages that
    end before key `garbage_before` too. `layout` is that of an engine's cache: K and V apart, as halves of one tensor
    (pages, 2, page_size, hk, d), or in such a tensor with heads before the tokens of a page.
    """
    per = [-(-n // page_size) for n in lengths]
    count, width = sum(per) + 2, max(per) + 1
    order = torch.randperm(count).tolist() if shuffled else list(range(count))[::-1]
    table = torch.full((len(lengths), width + 3), 2**31 - 1, dtype=torch.int32)
    pools = pools_of(x, count, page_size, layout)
    for i, n in enumerate(lengths):
        for j in range(per[i]):
            first, last = j * page_size, min((j + 1) * page_size, n)
            if last <= garbage_before:
                continue
            table[i, j] = page = order.pop()
            for pool, t in zip(pools, (x.k, x.v), strict=True):
                pool[page, : last - first] = t[i, first:last]
    return replace(x, k=pools[0], v=pools[1], page_table=table.to(x.k.device)[:, :width])


def pools_of(x: Inputs, count: int, page_size: int, layout: str) -> list[torch.Tensor]:
    """Empty pages for the call's K and V, full of NaN."""
    hk, widths = x.k.shape[2], (x.k.shape[3], x.v.shape[3])
    if layout == "apart":
        return [x.k.new_full((count, page_size, hk, d), NAN) for d in widths]
    sizes = (page_size, hk) if layout == "halves" else (hk, page_size)
    pages = x.k.new_full((count, 2, *sizes, max(widths)), NAN)
    halves = [pages[:, i, ..., :d] for i, d in enumerate(widths)]
    return halves if layout == "halves" else [t.transpose(1, 2) for t in halves]
