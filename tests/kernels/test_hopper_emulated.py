"""The Gluon prefill kernel's own source, emulated on CPU tensors, against the reference at float64.

Every call runs under several schedules, which must give the same bits; the emulator raises where buffers change hands
without a barrier, whether or not a schedule makes it show.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold import extras
from headfold.kernels.hopper import spans
from headfold.planner import hopper as planner
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.gluon_emulator import engines, language
from tests.gluon_emulator.engines import Descriptor
from tests.gluon_emulator.scheduler import current
from tests.hopper_calls import (
    LAYOUTS,
    PARTED_DIMS,
    SMALL,
    SMALL_RAGGED,
    drawn,
    drawn_ragged,
    in_pages,
    short_tiles_up_to,
)
from tests.kernels.emulated import attend


@pytest.fixture(autouse=True)
def two_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short tiles are for test_hopper_short_emulated.py."""
    short_tiles_up_to(0, monkeypatch)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


def check(x: Inputs, schedules: int = 2, programs: int = 2) -> None:
    first = attend(x, 0, programs)
    assert_accurate(x, *first)
    for seed in range(1, schedules):
        assert same(attend(x, seed, programs), first)


def same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Bit for bit, rows that are not written included."""
    return all(
        torch.equal(s.contiguous().view(torch.uint8), t.contiguous().view(torch.uint8))
        for s, t in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("seed", range(30))
def test_drawn_calls(seed: int) -> None:
    """Dense tensors, windows and masks; bfloat16 and float16; d64 to d256."""
    check(drawn(seed, "cpu", SMALL), programs=1 + seed % 4)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_ragged_calls(seed: int) -> None:
    """Offsets and lengths in memory; what lies beyond a sequence's end is NaN or another sequence."""
    check(drawn_ragged(seed, "cpu", SMALL_RAGGED), programs=1 + seed % 4)


@pytest.mark.parametrize("dims", PARTED_DIMS)
def test_head_dimensions_in_two_parts(dims: tuple[int, int]) -> None:
    """Products over the columns there are, dense and ragged, with windows and without."""
    for seed in range(3):
        check(drawn(seed, "cpu", SMALL, [dims]), programs=2)
        check(drawn_ragged(seed, "cpu", SMALL_RAGGED, [dims]), programs=3)


@pytest.mark.parametrize("kind", ["plain", "causal", "added", "holes", "wide"])
def test_many_schedules(kind: str) -> None:
    """Few tiles of many blocks: every buffer changes hands often, at all relative speeds of those who share it."""
    torch.manual_seed(0)
    d = 256 if kind == "wide" else 64
    q, k, v = rand(1, 140, 2, d), rand(1, 900, 1, d), rand(1, 900, 1, d)
    x = Inputs(q, k, v, window_right=0 if kind == "causal" else -1)
    if kind in ("added", "holes"):
        x.mask = rand(1, 2, 140, 904)[..., :900]
    if kind == "holes" and x.mask is not None:
        x.mask[..., :70, 128:640] = -torch.inf
        x.mask[:, 1, 70:] = -torch.inf
    check(x, schedules=6)


@pytest.mark.parametrize("seed", range(12))
def test_three_consumers(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """They take turns; some have no rows at all in a sequence's last tile, or blocks that none of their rows sees.

    Where values come in two parts a block's scores follow the values of the block before.
    """
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    torch.manual_seed(seed)
    sq, sk = ((200, 900), (400, 400), (193, 64), (520, 300))[seed % 4]
    d, dv, dtype = (
        (56, 56, torch.float16),
        (64, 64, torch.bfloat16),
        (96, 96, torch.bfloat16),
        (80, 72, torch.float16),
        (96, 64, torch.bfloat16),
    )[seed % 5]
    q, k, v = (rand(2, n, h, w, dtype=dtype) for n, h, w in ((sq, 2, d), (sk, 1, d), (sk, 1, dv)))
    x = Inputs(q, k, v, window_right=(-1, 0, 70)[seed // 4], bottom_right=seed % 2 > 0)
    if seed % 3 == 2:
        x.seqused_q = torch.tensor([sq, 70], dtype=torch.int32)
    check(x, schedules=3, programs=1 + seed % 3)


@pytest.mark.parametrize("seed", range(12))
def test_three_consumers_of_drawn_ragged_calls(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Sequences that end anywhere in a tile of 192 rows."""
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    x = drawn_ragged(seed, "cpu", SMALL_RAGGED, [((64, 64), (96, 96), (80, 80))[seed % 3]])
    check(replace(x, window_left=-1), programs=1 + seed % 3)


def test_keys_that_no_query_sees_may_hold_nan() -> None:
    """Top-left causal with more keys than queries: the copy engine brings whole blocks of them all the same."""
    for sq, sk in ((130, 200), (130, 500), (256, 300), (200, 129)):
        q, k, v = rand(1, sq, 2, 128), rand(1, sk, 1, 128), rand(1, sk, 1, 128)
        k[:, sq:], v[:, sq:] = NAN, NAN
        check(Inputs(q, k, v, window_right=0, bottom_right=False))


@pytest.mark.parametrize("d", [64, 96])
def test_few_keys_with_nan_on_both_sides(d: int) -> None:
    """Both ends of them in the same rows of shared memory, which each consumer zeroes for itself: what one writes back
    as it was must not undo what the other has zeroed."""
    for left, sk in ((5, 164), (2, 150), (0, 146)):
        k, v = rand(1, 200, 1, d), rand(1, 200, 1, d)
        first = sk - 6 - left
        for t in (k, v):
            t[:, :first], t[:, sk:] = NAN, NAN
        x = Inputs(rand(1, 130, 2, d), k, v, window_left=left, window_right=0)
        x.seqused_q, x.seqused_k = (torch.tensor([n], dtype=torch.int32) for n in (6, sk))
        check(x, schedules=8)


def test_rows_whose_biases_are_all_the_lowest_float() -> None:
    """Such a row is a mean of the values in PyTorch: -3.4e38 * log2(e) would be -inf, and the row dead."""
    q, k, v = rand(1, 140, 1, 64), rand(1, 200, 1, 64), rand(1, 200, 1, 64)
    mask = torch.zeros(1, 1, 140, 200, dtype=torch.bfloat16)
    mask[..., 100:] = torch.finfo(torch.bfloat16).min
    mask[:, :, 7:70] = torch.finfo(torch.bfloat16).min
    out, lse = attend(Inputs(q, k, v, mask=mask))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 64**-0.5 + mask.double()
    want = torch.einsum("bhqk,bkhd->bqhd", scores.float().softmax(-1).double(), v.double())
    assert (out - want).abs().max() < 0.01
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5)


def ragged(q_lens: list[int], heads: int, d: int) -> dict[str, Any]:
    offsets = torch.tensor([0, *q_lens]).cumsum(0).int()
    return {"q": rand(sum(q_lens), heads, d), "cu_seqlens_q": offsets, "max_seqlen_q": max(q_lens)}


PAGED = [
    # d, dv, page size, queries (None: ragged), window
    (64, 64, 1, 150, (-1, 0)),
    (64, 128, 3, None, (40, 0)),
    (128, 128, 20, 150, (37, 5)),
    (128, 128, 1, None, (40, 0)),
    (128, 128, 4, 150, (-1, 0)),
    (64, 64, 5, 150, (-1, -1)),
    (256, 256, 1, None, (37, 0)),
    (256, 256, 20, 150, (-1, 0)),
    (64, 64, 8, 150, (-1, 0)),
    (64, 64, 16, None, (-1, 0)),
    (64, 128, 24, 150, (-1, -1)),
    (64, 64, 64, None, (-1, -1)),
    (96, 96, 256, 150, (-1, 0)),
    (96, 96, 8, None, (40, 0)),
    (80, 80, 16, 150, (-1, -1)),
    (192, 160, 64, None, (37, 5)),
    (128, 128, 8, None, (40, 0)),
    (128, 128, 16, 150, (40, 0)),
    (128, 128, 24, 200, (37, 5)),
    (128, 128, 48, 150, (-1, 0)),
    (128, 128, 64, None, (37, 0)),
    (128, 128, 128, 200, (-1, 0)),
    (128, 128, 256, 150, (100, -1)),
    (192, 128, 16, 150, (-1, 0)),
    (256, 256, 8, 150, (40, 0)),
    (256, 256, 16, None, (-1, 0)),
    (256, 256, 64, 150, (-1, 0)),
    (256, 256, 128, 150, (-1, -1)),
]


def paged_rows(d: int, dv: int, page_size: int, sq: int | None, **options: Any) -> tuple[Inputs, list[int]]:
    """(a call over rows of three lengths, NaN past their ends; the lengths). Ragged queries where `sq` is None."""
    torch.manual_seed(d + page_size)
    lengths = [130, 0, 333]
    queries = ragged([129, 40, 170], 2, d) if sq is None else {"q": rand(3, sq, 2, d)}
    k, v = rand(3, 340, 1, d), rand(3, 340, 1, dv)
    for i, n in enumerate(lengths):
        k[i, n:], v[i, n:] = NAN, NAN
    used = torch.tensor(lengths, dtype=torch.int32)
    return Inputs(k=k, v=v, seqused_k=used, **options, **queries), lengths


def check_pages(rows: Inputs, lengths: list[int], page_size: int, shuffled: str) -> None:
    """Accurate, and pages in order, K and V apart, and pages `shuffled` in another layout give the same bits."""
    want = attend(rows)
    assert_accurate(rows, *want)
    assert same(attend(in_pages(rows, lengths, page_size, shuffled=False, layout=LAYOUTS[0])), want)
    assert same(attend(in_pages(rows, lengths, page_size, layout=shuffled), 1), want)


def each_shuffled(cases: list[Any]) -> list[Any]:
    """The cases, with the other layouts in turn: strides mean the same to every page size and head dimension."""
    return [(*case, layout) for case, layout in zip(cases, cycle(LAYOUTS[1:]), strict=False)]


@pytest.mark.parametrize(("d", "dv", "page_size", "sq", "window", "layout"), each_shuffled(PAGED))
def test_pages_give_the_bits_of_rows(
    d: int, dv: int, page_size: int, sq: int | None, window: tuple[int, int], layout: str
) -> None:
    """Shuffled pages; NaN in pages that nobody owns and past the ends; garbage in the table past the ends."""
    rows, lengths = paged_rows(d, dv, page_size, sq, window_left=window[0], window_right=window[1])
    check_pages(rows, lengths, page_size, layout)


@pytest.mark.parametrize(
    ("d", "dv", "page_size", "sq", "right", "layout"),
    each_shuffled(
        [
            (64, 64, 64, None, 0),
            (64, 64, 8, None, -1),
            (64, 64, 16, 300, 0),
            (96, 96, 16, None, 0),
            (96, 80, 64, 300, -1),
            (80, 96, 24, None, 40),
        ]
    ),
)
def test_three_consumers_of_pages(
    monkeypatch: pytest.MonkeyPatch, d: int, dv: int, page_size: int, sq: int | None, right: int, layout: str
) -> None:
    """Tiles of 192 rows, keys fetched by one warp and by two."""
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    rows, lengths = paged_rows(d, dv, page_size, sq, window_right=right)
    check_pages(rows, lengths, page_size, layout)


@pytest.mark.parametrize("d", [96, 128, 256])
@pytest.mark.parametrize("page_size", [8, 64, 192, 256])
def test_boxes_lie_in_pages_of_the_sequence(monkeypatch: pytest.MonkeyPatch, d: int, page_size: int) -> None:
    """What the copy engine is sent for: rows within a page of the sequence, or page -1 past the ends.

    Any other page outside the tensor would come as zeros too, and garbage in the table would be followed unseen.
    """
    torch.manual_seed(page_size)
    lengths = [130, 0, 333]
    rows = Inputs(rand(3, 150, 2, d), rand(3, 340, 1, d), rand(3, 340, 1, d), window_right=0)
    rows.seqused_k = torch.tensor(lengths, dtype=torch.int32)
    x = in_pages(rows, lengths, page_size)
    assert x.page_table is not None
    seen: set[int] = set()
    for pages, n in zip(x.page_table.tolist(), lengths, strict=True):
        seen |= set(pages[: -(-n // page_size)])
    boxes: list[tuple[int, int, int]] = []  # page, first row, rows
    box = Descriptor.box

    def recorded(self: Descriptor, corner: list[int]) -> torch.Tensor:
        if len(corner) == 5:  # whole rows, in groups of 8 that are counted across pages
            page, group = divmod(corner[1], page_size // 8)
            boxes.append((page, 8 * group, 8 * self.block_shape[1]))
        elif self.sizes[0] == x.k.shape[0]:
            boxes.append((corner[0], corner[2], self.block_shape[2]))
        return box(self, corner)

    monkeypatch.setattr(Descriptor, "box", recorded)
    attend(x)
    assert {page for page, _, _ in boxes} == seen | {-1}
    assert all(0 <= row <= page_size - rows for _, row, rows in boxes)


@pytest.mark.parametrize(("page_size", "left"), [(1, -1), (1, 40), (20, -1), (20, 40)])
def test_rows_are_copied_that_queries_see(monkeypatch: pytest.MonkeyPatch, page_size: int, left: int) -> None:
    """And no others: what the table says of keys that left the window, or past the ends, may lie outside the pages."""
    torch.manual_seed(page_size)
    lengths = [130, 0, 333]
    rows = Inputs(
        rand(3, 150, 2, 64), rand(3, 340, 1, 64), rand(3, 340, 1, 64), window_left=left, window_right=0
    )
    rows.seqused_k = torch.tensor(lengths, dtype=torch.int32)
    x = in_pages(rows, lengths, page_size)
    assert x.page_table is not None
    seen = {
        (pages[key // page_size], key % page_size)
        for pages, n in zip(x.page_table.tolist(), lengths, strict=True)
        for key in range(max(n - 150 - left, 0) if left >= 0 else 0, n)
    }
    copied: set[tuple[int, int]] = set()
    load = language.load

    def recorded(pointer: Any, mask: Any, other: int) -> Any:
        where = pointer.locations()[mask.data] // 64
        copied.update((int(row) // page_size, int(row) % page_size) for row in where)
        return load(pointer, mask, other)

    monkeypatch.setattr(language, "load", recorded)
    attend(x)
    assert copied == seen


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 20, 128])
@pytest.mark.parametrize("left", [-1, 37, 45])  # the first key is 15 or 7 keys into a box
def test_chunked_prefill_on_pages(page_size: int, left: int) -> None:
    """200 queries at the end of 700 keys. Keys that left the window are NaN, and their pages are anyone's."""
    torch.manual_seed(page_size)
    gone = 0 if left < 0 else 700 - 200 - left
    k, v = rand(1, 700, 1, 64), rand(1, 700, 1, 64)
    k[:, :gone], v[:, :gone] = NAN, NAN
    rows = Inputs(rand(1, 200, 2, 64), k, v, window_left=left, window_right=0)
    check(rows)
    rows.seqused_k = torch.tensor([700], dtype=torch.int32)
    want = attend(rows)
    pages = in_pages(rows, [700], page_size, garbage_before=gone)
    assert same(attend(pages), want)
    offsets = replace(pages, seqused_k=None, cu_seqlens_k=torch.tensor([0, 700], dtype=torch.int32))
    assert same(attend(offsets), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("d", "right"), [(64, -1), (128, 0), (256, -1)])
def test_row_maxima_that_rise(dtype: torch.dtype, d: int, right: int) -> None:
    """Slowly, so that the maximum in use falls behind, and by more than weights have room for; blocks run downwards."""
    for growth in (2.0, 60.0):
        q, k, v = (
            rand(1, 140, 2, d, dtype=dtype),
            rand(1, 900, 1, d, dtype=dtype),
            rand(1, 900, 1, d, dtype=dtype),
        )
        k *= torch.linspace(growth, 0.1, 900)[:, None, None].to(dtype)
        check(Inputs(q, k, v, window_right=right), 1)


@pytest.mark.parametrize(
    ("d", "sq", "sk", "right", "blocks"),
    [
        (
            256,
            256,
            256,
            0,
            (1 + 3, 2 + 4),
        ),  # the last 64 keys of a tile are behind all rows of its first half
        (256, 256, 256, -1, (4 + 4, 4 + 4)),
        (64, 40, 512, -1, (4, 1)),  # a consumer without rows
        (64, 192, 512, 0, (3 + 4, 4 + 1)),  # in the last tile
    ],
)
def test_blocks_that_a_consumer_does_not_see_take_no_products(
    monkeypatch: pytest.MonkeyPatch, d: int, sq: int, sk: int, right: int, blocks: tuple[int, int]
) -> None:
    """Products with V by consumer; the blocks' buffers change hands all the same."""
    counted: dict[str, int] = {}

    class Counted(engines.Product):
        def __init__(self, compute: Any, layout: Any, reads: Any) -> None:
            super().__init__(compute, layout, reads)
            if layout.instr_shape[1] == d:
                counted[current().name] = counted.get(current().name, 0) + 1

    monkeypatch.setattr(engines, "Product", Counted)
    check(Inputs(rand(1, sq, 1, d), rand(1, sk, 1, d), rand(1, sk, 1, d), window_right=right), 1, 1)
    consumers = sorted(counted, key=lambda name: name.split("partition")[1])
    assert tuple(counted[name] for name in consumers) == blocks


def copies_of(monkeypatch: pytest.MonkeyPatch, x: Inputs) -> list[tuple[str, list[int]]]:
    """The copies that one program issues for a call, by the tensor that they are from or into, and where their boxes begin."""
    copies: list[tuple[str, list[int]]] = []
    tensors = {x.q.data_ptr(): "q", x.k.data_ptr(): "k", x.v.data_ptr(): "v"}
    corner_of = Descriptor.corner_of

    def recorded(self: Descriptor, corner: list[Any], memory: Any) -> list[int]:
        copies.append((tensors.get(self.base.data_ptr(), "out"), corner_of(self, corner, memory)))
        return copies[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(Descriptor, "corner_of", recorded)
        attend(x, programs=1)
    return copies


@pytest.mark.parametrize(("d", "boxes"), [(64, 1), (192, 3), (256, 2)])
def test_results_leave_by_the_copy_engine_where_all_rows_are_the_tensors(
    monkeypatch: pytest.MonkeyPatch, d: int, boxes: int
) -> None:
    """`boxes` for 64 rows: what is staged at a time, or a swizzled row's columns. Not into another sequence's rows."""
    x = Inputs(rand(1, 100, 1, d), rand(1, 200, 1, d), rand(1, 200, 1, d))
    assert sum(name == "out" for name, _ in copies_of(monkeypatch, x)) == 2 * boxes
    x.seqused_k = torch.tensor([150], dtype=torch.int32)
    assert sum(name == "out" for name, _ in copies_of(monkeypatch, x)) == 2 * boxes
    x.seqused_q = torch.tensor([70], dtype=torch.int32)
    assert [corner[2] for name, corner in copies_of(monkeypatch, x) if name == "out"] == [0] * boxes


@pytest.mark.parametrize("d", [64, 256])
def test_rows_of_ragged_batches_leave_by_the_copy_engine_in_whole_tiles(
    monkeypatch: pytest.MonkeyPatch, d: int
) -> None:
    x = Inputs(rand(300, 1, d), rand(300, 1, d), rand(300, 1, d))
    x.cu_seqlens_q = x.cu_seqlens_k = torch.tensor([0, 10, 138, 138, 300], dtype=torch.int32)
    x.max_seqlen_q = x.max_seqlen_k = 162
    rows = {corner[2] for name, corner in copies_of(monkeypatch, x) if name == "out"}
    assert rows == {10, 74, 138, 202}


def test_rows_that_32_bits_do_not_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rows begin is then written down in 64 bits."""
    rows = Inputs(rand(1, 150, 2, 64), rand(1, 300, 1, 64), rand(1, 300, 1, 64), window_right=0)
    rows.seqused_k = torch.tensor([300], dtype=torch.int32)
    pages = in_pages(rows, [300], 4)
    want = attend(pages)
    monkeypatch.setattr(extras, "FAR", 0)
    assert same(attend(pages), want)


def test_planner_and_kernel_agree_where_blocks_begin() -> None:
    assert spans.EDGE.value == planner.EDGE
