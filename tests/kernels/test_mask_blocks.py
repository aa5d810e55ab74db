"""Blocks that a mask hides from every row of a tile: the prefill's lists of the others, and that it computes no more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold import backends, reference
from headfold.backends import triton as launcher
from headfold.planner import Plan
from headfold.problem import Inputs
from tests.cases import assert_accurate, make, poisoned
from tests.conftest import Target

KEYS, QUERIES = 150, 70


@pytest.fixture(autouse=True)
def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces hold what some other call left there: numbers of blocks that are not there."""
    empty = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *shape: Any, **kwargs: Any) -> torch.Tensor:
        fresh = empty(self, *shape, **kwargs)
        return fresh.fill_(2**30) if fresh.dtype == torch.int32 else fresh

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)


def prefill(target: Target, dtype: torch.dtype, heads: int = 6, kv_heads: int = 2, **more: Any) -> Inputs:
    """A call of many rows; its last tile is not full."""
    lens = {"q_lens": [QUERIES] * 2, "k_lens": [KEYS] * 2, "slack": 0, "num_splits": 1}
    return make(heads=heads, kv_heads=kv_heads, dtype=dtype, device=target.device, **{**lens, **more})


def with_mask(x: Inputs, keep: torch.Tensor, kind: torch.dtype = torch.bool) -> Inputs:
    """The call under a mask that keeps what `keep` does, (b or 1, h or 1, sq or 1, sk); numbers are drawn."""
    keep = keep.to(x.q.device)
    if kind == torch.bool:
        mask = keep
    else:
        numbers = torch.randn(keep.shape, generator=torch.Generator().manual_seed(5))
        mask = numbers.to(keep.device, kind).masked_fill(~keep, float("-inf"))
    return replace(x, mask=mask.expand(x.batch, x.q.shape[2], x.q.shape[1], x.k.shape[1]))


def drawn(*shape: int, share: float = 0.5) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(len(shape))) < share


def checkerboard(rows: int, keys: int) -> torch.Tensor:
    """Squares of 64 queries x 32 keys, every second one dead."""
    return (torch.arange(QUERIES)[:, None] // rows + torch.arange(KEYS) // keys) % 2 == 0


def diagonal() -> torch.Tensor:
    return torch.arange(KEYS) <= torch.arange(QUERIES)[:, None] + KEYS - QUERIES


def holes() -> torch.Tensor:
    """Random but for dead columns at both ends and within, and dead rows."""
    keep = drawn(2, 6, QUERIES, KEYS, share=0.02)
    keep[..., 40:97] = False
    keep[..., :17] = False
    keep[..., 140:] = False
    keep[0, 1] = False
    keep[:, :, 3:50] = False
    return keep


# name -> what it keeps, and what kind of elements it has
MASKS: dict[str, tuple[Callable[[], torch.Tensor], torch.dtype]] = {
    "by head": (holes, torch.bool),
    "by head, added": (holes, torch.float16),
    "by head, bfloat16": (holes, torch.bfloat16),
    "by sequence": (lambda: holes()[:, 2:3], torch.float32),
    "broadcast": (lambda: diagonal()[None, None], torch.bool),
    "checkerboard": (lambda: checkerboard(64, 32)[None, None], torch.bool),
    "fine checkerboard": (lambda: checkerboard(3, 16)[None, None], torch.float16),
    "padding": (lambda: (torch.arange(KEYS) < torch.tensor([90, 33])[:, None])[:, None, None], torch.bool),
    "padding by head": (lambda: drawn(1, 6, 1, KEYS, share=0.02), torch.float32),
    "all dead": (lambda: torch.zeros(1, 1, QUERIES, KEYS, dtype=torch.bool), torch.bool),
    "none dead": (lambda: torch.ones(1, 1, QUERIES, KEYS, dtype=torch.bool), torch.float16),
}


def expected(x: Inputs, plan: Plan, seq: int, unit: int, tile: int) -> list[int]:
    """Numbers of the blocks of a tile in which a row of it sees a key; None of a tile without a row."""
    sq, sk = reference.queries_of(x, seq).shape[0], reference.keys_of(x, seq)[0].shape[0]
    seen = reference.mask_of(x, seq, sq, sk)[0].expand(x.q.shape[2], sq, sk)
    rows = range(tile * plan.block_m, min((tile + 1) * plan.block_m, sq * plan.fold))
    position = rows[0] // plan.fold + (sk - sq if x.bottom_right else 0)
    low = max(0, position - x.window_left) if x.window_left >= 0 else 0
    if x.attention_chunk:
        low = max(low, position // x.attention_chunk * x.attention_chunk)
    keys = torch.stack([seen[unit * plan.fold + r % plan.fold, r // plan.fold] for r in rows]).any(0)
    return sorted({(j - low) // plan.block_n for j in keys.nonzero().flatten().tolist()})


def lists_of(x: Inputs, plan: Plan) -> list[list[list[list[int]]]]:
    """The kernel's lists of live blocks, by sequence, head unit and tile."""
    assert x.mask is not None
    lists = launcher._live_blocks(plan, x, x.mask)(x)
    assert lists is not None
    assert lists.shape == (*plan.mask_lists, 1 + plan.mask_list_blocks)
    return [[[one[1 : 1 + one[0]] for one in unit] for unit in seq] for seq in lists.tolist()]


def check_lists(x: Inputs) -> Plan:
    """No block of a tile is missing, and none is too many but where rows or tiles share what they see."""
    _, plan = backends.plan_of(x)
    assert plan.kernel == "prefill"
    assert x.mask is not None
    exact = plan.mask_lists[2] > 1 and (x.mask.stride(2) != 0 or x.mask.stride(1) == 0)
    lists = lists_of(x, plan)
    found = 0
    for seq in range(x.batch):
        rows = reference.queries_of(x, seq).shape[0] * plan.fold
        for unit in range(plan.head_units):
            for tile in range(-(-rows // plan.block_m)):
                of_units = lists[seq % plan.mask_lists[0]][unit % plan.mask_lists[1]]
                want, got = expected(x, plan, seq, unit, tile), of_units[tile % plan.mask_lists[2]]
                assert got == want if exact else set(got) >= set(want)
                assert got == sorted(set(got))
                found += 1
    assert found
    return plan


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    assert_accurate(x, out, lse)
    return out, lse


@pytest.mark.parametrize("name", MASKS)
def test_lists_hold_the_live_blocks(name: str, kernels: Target) -> None:
    """In ascending order, of every kind of mask, in groups of 3, 1 and 4 heads."""
    keep, kind = MASKS[name]
    for kv_heads, dtype in ((2, torch.float32), (6, torch.float16)):
        check_lists(with_mask(prefill(kernels, dtype, kv_heads=kv_heads), keep(), kind))
    few = keep()[:, :4] if keep().shape[1] > 1 else keep()
    check_lists(with_mask(prefill(kernels, torch.float16, heads=4, kv_heads=1), few, kind))


@pytest.mark.parametrize(
    "name", ["by head", "by head, added", "checkerboard", "padding", "all dead", "none dead"]
)
def test_skipping_changes_no_bit(name: str, kernels: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dead block weighs exactly 0: the loop over all blocks gives the same bits as the loop over the list."""
    keep, kind = MASKS[name]
    x = with_mask(prefill(kernels, torch.float16), keep(), kind)
    listed = run(x)
    monkeypatch.setattr(launcher, "_live_blocks", lambda *_: launcher._no_lists)
    assert all(torch.equal(a, b) for a, b in zip(listed, run(x), strict=True))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dead_blocks_are_not_computed(dtype: torch.dtype, kind: torch.dtype, kernels: Target) -> None:
    """NaN in keys and values that the mask hides from all rows of a block's tile reaches no result."""
    keep = drawn(1, 6, QUERIES, KEYS)
    keep[..., 32:96] = False
    x = with_mask(prefill(kernels, dtype), keep, kind)
    x.k[:, 32:96], x.v[:, 32:96] = float("nan"), float("nan")
    run(x)


@pytest.mark.parametrize(
    "band",
    [
        {"window_right": 0},
        {"window_left": 21, "window_right": 9},
        {"window_left": 40, "bottom_right": False},
        {"attention_chunk": 37},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["by head", "padding", "padding by head"])
def test_within_a_band(name: str, band: dict[str, Any], kernels: Target) -> None:
    """Blocks count from the first key that the tile sees, and what its rows' bands leave out is dead."""
    keep, kind = MASKS[name]
    x = replace(with_mask(prefill(kernels, torch.float16), keep(), kind), **band)
    check_lists(x)
    if name == "by head":
        run(x)


def test_sequences_of_several_lengths(kernels: Target) -> None:
    """A mask that all sequences share has a list for each where their lengths or padding differ. What it says of rows and
    keys past a sequence's end does not count."""
    lens = {"q_lens": [QUERIES, 50], "k_lens": [KEYS, 60], "slack": 3}
    x = prefill(kernels, torch.float16, **lens)
    keep = torch.zeros(1, 1, QUERIES, KEYS + 3, dtype=torch.bool)
    keep[..., :50, 10:12] = True
    keep[..., 50:, :] = True
    keep[..., KEYS:] = True
    plan = check_lists(with_mask(x, keep))
    assert plan.mask_lists[0] == 2
    run(with_mask(x, keep))
    padded = replace(x, cache_leftpad=torch.tensor([30, 5], dtype=torch.int32, device=x.q.device))
    padded.k.nan_to_num_(0.5)
    padded.v.nan_to_num_(0.5)
    check_lists(with_mask(padded, keep))
    run(with_mask(padded, keep, torch.float16))


def test_masks_of_any_strides(kernels: Target) -> None:
    """Rows of odd length, keys apart, an odd address, and rows that allow 16-byte loads."""
    keep = holes()
    x = prefill(kernels, torch.float16)
    wide = torch.zeros(2, 6, QUERIES, 160, dtype=torch.bool)
    wide[..., :KEYS] = keep
    apart = torch.zeros(2, 6, KEYS, QUERIES + 1, dtype=torch.bool)
    apart[..., 1:] = keep.transpose(2, 3)
    masks = [keep, wide[..., :KEYS], apart[..., 1:].transpose(2, 3)]
    assert [backends.plan_of(replace(x, mask=m.to(x.q.device)))[1].wide_mask for m in masks] == [0, 1, 0]
    for mask in masks:
        check_lists(replace(x, mask=mask.to(x.q.device)))


def test_long_rows_are_looked_at_in_pieces(kernels: Target) -> None:
    """More keys than a program takes at a time, in whole pieces and a last one."""
    for keys, kind in ((1100, torch.bool), (1024, torch.bool), (600, torch.float16), (515, torch.float32)):
        lens = {"q_lens": [QUERIES], "k_lens": [keys]}
        keep = drawn(1, 1, QUERIES, keys, share=0.001)
        keep[..., -1, -1] = True
        check_lists(with_mask(prefill(kernels, torch.float16, heads=2, **lens), keep, kind))


def test_what_is_shared(kernels: Target) -> None:
    """A list for each sequence, head unit and tile that differ in the mask, and no more."""
    tiles = -(-QUERIES * 3 // 64)
    found = {}
    for name, (keep, kind) in MASKS.items():
        x = with_mask(prefill(kernels, torch.float16), keep(), kind)
        found[name] = backends.plan_of(x)[1].mask_lists
    assert found["by head"] == (2, 2, tiles)
    assert found["by sequence"] == (2, 1, tiles)
    assert found["broadcast"] == (1, 1, tiles)
    assert found["padding"] == (2, 1, 1)
    assert found["padding by head"] == (1, 2, 1)
    causal = replace(with_mask(prefill(kernels, torch.float16), MASKS["padding"][0]()), window_right=0)
    assert backends.plan_of(causal)[1].mask_lists == (2, 1, tiles)


@pytest.mark.parametrize("layout", ["dense", "paged"])
@pytest.mark.parametrize(("sq", "splits"), [(3, 1), (3, 3), (23, 1)])
def test_blocks_before_a_tree_keep_their_bits(sq: int, splits: int, layout: str, kernels: Target) -> None:
    """They are computed without a bias: a bias of 0 everywhere gives the same bits."""
    lens = {"q_lens": [sq, sq], "k_lens": [KEYS, 60 + sq], "kv_layout": layout, "num_splits": splits}
    x = prefill(kernels, torch.float16, **lens)
    x.tree_mask = drawn(2, sq, sq).to(x.q.device)
    _, plan = backends.plan_of(x)
    assert plan.tensor_mask
    assert plan.kernel == ("prefill" if sq == 23 else "decode")
    alone = run(x)
    assert all(torch.equal(a, b) for a, b in zip(alone, run(x), strict=True))
    if layout == "dense":
        kept = torch.ones(1, 1, sq, KEYS, dtype=torch.bool)
        assert all(torch.equal(a, b) for a, b in zip(alone, run(with_mask(x, kept)), strict=True))


@pytest.mark.parametrize("sk", [33, 23, 26, 12])
def test_a_tree_begins_within_the_first_block(sk: int, kernels: Target) -> None:
    """About as many keys as queries, or fewer: no block comes before the tree, in either kernel."""
    for sq, more in ((23, {"num_splits": 1}), (6, {"num_splits": 3}), (6, {"tokens_per_split": 10})):
        x = prefill(kernels, torch.float16, q_lens=[sq], k_lens=[sk], num_splits=0)
        x.tree_mask = drawn(1, sq, sq).to(x.q.device)
        run(replace(x, window_right=0, **more))


def test_a_sequence_under_a_tree_has_the_same_bits_in_any_batch(kernels: Target) -> None:
    """Fixed splits: where the tree begins within one follows from the sequence alone."""
    lens = {"q_lens": [4, 4, 4], "k_lens": [KEYS, 37, 90]}
    x = replace(prefill(kernels, torch.float16, num_splits=0, **lens), tokens_per_split=64)
    x.tree_mask = drawn(3, 4, 4).to(x.q.device)
    out, lse = run(x)
    assert x.seqused_k is not None
    for i in range(3):
        one = slice(i, i + 1)
        parts = {"q": x.q[one], "k": x.k[one], "v": x.v[one], "seqused_k": x.seqused_k[one]}
        alone = run(replace(x, **parts, tree_mask=x.tree_mask[one]))
        assert torch.equal(alone[0][0], out[i])
        assert torch.equal(alone[1][0], lse[i])
