"""The CPU backend's form for all that shapes scores: softcap, masks, ALiBi, and splits of a fixed extent.

The group is folded into rows, and blocks of rows meet blocks of keys: PyTorch's flash kernel computes each pair of
blocks where it can (a mask per head is one of its arguments), `cpu_scores` where it cannot. States are merged in
an accumulator of the sequence's own, so that its bits depend on nothing but the sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from headfold.backends.cpu_band import Band
from headfold.backends.cpu_mask import Block, Masks
from headfold.backends.cpu_scores import score_state
from headfold.backends.cpu_sequences import Sequences, split_extent
from headfold.backends.cpu_states import NEG_INF, State, add_sink, flash_masked, merge_into
from headfold.planner.plan import Plan
from headfold.problem import Inputs

# What a block may hold: scores (or their masks), and K and V in float32, for which it has so many keys at least
# and at most.
BLOCK_SCORES = 2**21
BLOCK_KV_BYTES = 2**23
BLOCK_KEYS = (64, 1024)


def needs_blocks(x: Inputs) -> bool:
    """True when a call asks for what the plain forms do not compute."""
    masked = x.mask is not None or x.tree_mask is not None or x.alibi_slopes is not None
    return masked or x.softcap > 0 or x.tokens_per_split > 0


def attend(plan: Plan, x: Inputs, s: Sequences, band: Band) -> None:
    """Attention of a run of sequences, with every feature that Inputs can ask for."""
    n, sq, h, _ = s.q.shape
    hk, dv = x.v.shape[-2:]
    heads = (hk, h // hk)
    # The flash kernel's half-precision exp(0) is 1 - 5e-5; where all scores are equal, LSEs can be exact instead.
    own = x.softcap > 0 or x.scale == 0
    masks = Masks.of(x, band, s.batch)
    q = s.q.unflatten(2, heads)
    if own:
        q = q.float() * (x.scale / x.softcap if x.softcap > 0 else x.scale)
    out = torch.zeros((n, sq, *heads, dv))
    lse = torch.full((n, sq, *heads), NEG_INF)
    for start, end in _key_blocks(plan, x, band):
        k, v = (t.transpose(1, 2) for t in s.keys(start, end))
        if own:
            k, v = k.float(), v.float()
        step = max(1, min(plan.block_m // heads[1], BLOCK_SCORES // (n * h * (end - start))))
        for first in range(0, sq, step):
            last = min(first + step, sq)
            low, high = band.keys(first, last)
            low, high = max(low, start), min(high, end)
            if low >= high:
                continue
            keys = slice(low - start, high - start)
            block = masks.block(first, last, low, high)
            state = _block_state(x, q[:, first:last], k[:, :, keys], v[:, :, keys], block, own)
            if state is not None:
                merge_into(out[:, first:last], lse[:, first:last], state)
        del k, v  # what was gathered or converted must not outlive its block
    out, lse = out.flatten(2, 3), lse.flatten(2, 3)
    if x.sink is not None:
        add_sink(out, lse, x.sink)
    s.out.copy_(out)
    s.lse.copy_(lse.transpose(1, 2))


def _key_blocks(plan: Plan, x: Inputs, band: Band) -> Iterator[tuple[int, int]]:
    """Cut the keys that some query sees into splits, and a split into what is computed at a time."""
    if band.sq == 0:
        return
    start, end = band.keys(0, band.sq)
    extent = split_extent(plan, end - start)
    width = x.k.shape[-2] * (x.k.shape[-1] + x.v.shape[-1]) * 4
    most = min(max(BLOCK_KEYS[0], BLOCK_KV_BYTES // width), BLOCK_KEYS[1])
    # Splits of a fixed extent count from the sequence's first key, others from the first one that is seen.
    first = start // extent * extent if x.tokens_per_split > 0 else start
    for split in range(first, end, extent):
        stop = min(split + extent, end)
        for block in range(split, stop, most):
            low, high = max(block, start), min(block + most, stop)
            if low < high:
                yield low, high


def _block_state(
    x: Inputs, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, own: bool
) -> State | None:
    """The state of q (n, p, hk, G, d) over k (n, hk, e, d) and v (n, hk, e, dv), or None if no key is seen.

    Returns:
        out (n, p, hk, G, dv) and LSE (n, p, hk, G).
    """
    positions, _, group = q.shape[1:4]
    seen = block.keys_seen()
    if seen is not None and not seen.all():
        if not seen.any():
            return None
        # Whatever lies in a key that no query sees, NaN too, must not meet a probability of 0.
        unseen = ~seen.unsqueeze(-1)
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    rows = q.transpose(1, 2).flatten(2, 3)
    mask = block.added(q.dtype, positions, group)
    if own:
        out, lse = score_state(rows, k, v, x.softcap, mask)
    else:
        out, lse = flash_masked(rows, k, v, x.scale, mask, block.live(positions, group))
    unfolded = (positions, group)
    return out.unflatten(2, unfolded).transpose(1, 2), lse.unflatten(2, unfolded).transpose(1, 2)
