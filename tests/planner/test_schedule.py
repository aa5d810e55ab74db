"""The arithmetic of the stream: every block owned once, shares that differ by a block, states that nobody overwrites."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.planner.schedule import count_blocks, list_of, range_of, range_starts, shares

CHUNK = 20_000


def drawn(n: int, batch: int, seed: int) -> torch.Tensor:
    """n vectors of blocks a sequence (n, batch): equal, alike, of huge ratios, with absent sequences; none is empty."""
    g = torch.Generator().manual_seed(seed)
    most = torch.randint(1, 3000, (n, 1), generator=g)
    blocks = 1 + (torch.rand(n, batch, generator=g) ** torch.randint(1, 9, (n, 1), generator=g) * most).long()
    blocks[: n // 10] = blocks[: n // 10, :1]
    absent = torch.rand(n, batch, generator=g) < 0.2 * (torch.arange(n) % 3 == 0)[:, None]
    return torch.where(absent & (torch.arange(batch) > 0), 0, blocks)


@pytest.mark.parametrize(
    ("batch", "ranges", "gap"), [(1, 132, 2), (2, 1, 2), (5, 16, 2), (8, 33, 3), (16, 7, 0)]
)
def test_a_million_length_vectors_are_shared_out_once_and_evenly(batch: int, ranges: int, gap: int) -> None:
    """200,000 for each of five grids."""
    for seed in range(200_000 // CHUNK):
        blocks = drawn(CHUNK, batch, seed)
        starts, gaps = list_of(blocks, gap)
        cuts = range_starts(starts[:, -1], ranges)
        sizes = cuts.diff()
        assert (cuts[:, 0] == 0).all()
        assert (cuts[:, -1] == starts[:, -1]).all()
        assert (sizes.amax(-1) - sizes.amin(-1) <= 1).all()
        begin, end = shares(blocks, ranges, gap)
        # Every block has one owner: shares follow one another without a gap or an overlap, from the first to the last.
        assert (begin[:, 0] == 0).all()
        assert (end[:, -1] == blocks).all()
        assert (end[:, :-1] == begin[:, 1:]).all()
        assert (begin <= end).all()
        # What a range has to do is at most its positions, and at least those less the gaps that lie in it.
        work = (end - begin).sum(-1)
        assert (work <= sizes).all()
        touched = (end > begin).sum(-1) + 1
        assert (work >= sizes - touched * gaps).all()


@pytest.mark.parametrize(("batch", "ranges", "gap"), [(1, 132, 2), (5, 16, 2), (8, 33, 3), (16, 7, 0)])
def test_states_are_found_where_they_were_left(batch: int, ranges: int, gap: int) -> None:
    """Range r leaves the state of a tile that began before it at 2 r, of one that goes on behind it at 2 r + 1. The merge
    finds them by the tile's first and last position alone."""
    blocks = drawn(CHUNK, batch, 7)
    starts, _ = list_of(blocks, gap)
    total = starts[:, -1:]
    begin, end = shares(blocks, ranges, gap)
    owns = begin < end
    first = range_of(starts[:, :-1], total, ranges)
    n = range_of(starts[:, :-1] + blocks - 1, total, ranges) - first + 1
    assert torch.equal(owns.sum(1)[blocks > 0], n[blocks > 0])
    partial = owns & ~((begin == 0) & (end == blocks[:, None]))
    assert (partial.sum(-1) <= 2).all()
    assert ((partial & (begin == 0)).sum(-1) <= 1).all()
    assert ((partial & (begin > 0)).sum(-1) <= 1).all()
    number = torch.arange(ranges)[:, None]
    place = 2 * number + (begin == 0)
    index = number - first[:, None]  # which state of its tile
    expected = torch.where(index == 0, 2 * first[:, None] + 1, 2 * (first[:, None] + index))
    assert torch.equal(place[partial], expected[partial])


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 20), st.integers(0, 4))
def test_a_program_that_walks_its_range_finds_its_shares(lengths: list[int], ranges: int, gap: int) -> None:
    """As the kernel does it: find the sequence of the first position, then one after the other."""
    blocks = torch.tensor(lengths)
    starts, gaps = list_of(blocks, gap)
    cuts = range_starts(starts[-1], ranges).tolist()
    begin, end = shares(blocks, ranges, gap)
    for r in range(ranges):
        x, found = cuts[r], {}
        seq = int((starts[1:] <= x).sum())
        start = int(starts[seq])
        while x < cuts[r + 1]:
            n = lengths[seq]
            following = start + n + (int(gaps) if n else 0)
            low, high = min(x - start, n), min(min(cuts[r + 1], following) - start, n)
            if low < high:
                found[seq] = (low, high)
            x = start = following
            seq += 1
        owned = {s: (int(b), int(e)) for s, (b, e) in enumerate(zip(begin[r], end[r], strict=True)) if b < e}
        assert found == owned


@given(
    st.lists(st.tuples(st.integers(0, 900), st.integers(0, 900)), min_size=1, max_size=6),
    st.integers(1, 12),
    st.sampled_from((64, 100, 256)),
)
def test_fixed_extents_are_never_cut(spans: list[tuple[int, int]], ranges: int, extent: int) -> None:
    """Cuts lie between extents, and the blocks say how many extents a tile has."""
    low = torch.tensor([min(s) for s in spans])
    high = torch.tensor([max(s) for s in spans])
    blocks = count_blocks(low, high, 32, extent)
    per_extent = -(-extent // 32)
    begun = torch.where(high > low, (high - 1).clamp(min=0) // extent - low // extent + 1, 1)
    assert torch.equal(-(-blocks // per_extent), begun)
    begin, end = shares(blocks, ranges, 2, per_extent)
    assert torch.equal((end - begin).sum(0), blocks)
    for cut in (begin, end):
        assert ((cut % per_extent == 0) | (cut == blocks)).all()


def test_equal_sequences_are_cut_between_them() -> None:
    """No gap: 16 sequences in 32 ranges are two halves each, in 8 ranges two whole ones."""
    blocks = torch.full((16,), 64)
    begin, end = shares(blocks, 32, 2)
    assert ((end - begin).sum(-1) == 32).all()
    begin, end = shares(blocks, 8, 2)
    assert ((end - begin == 64).sum(-1) == 2).all()


def test_a_gap_spreads_short_sequences() -> None:
    """Each start costs as much as two blocks: a range of sequences of one block gets fewer of them."""
    blocks = torch.tensor([90, *[1] * 30])
    begin, end = shares(blocks, 2, 2)
    assert (end - begin).sum(-1).tolist() == [90, 30]
    begin, end = shares(blocks, 2, 0)
    assert (end - begin).sum(-1).tolist() == [60, 60]
