"""The Gluon prefill kernel on a Hopper GPU, through the public functions, against the reference at float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import headfold
from headfold import backends
from headfold.planner import Plan, running_device
from headfold.planner import hopper as planner
from headfold.planner.hopper import plan_hopper
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate, poisoned
from tests.hopper_calls import (
    LAYOUTS,
    PARTED_DIMS,
    drawn,
    drawn_ragged,
    in_pages,
    short_tiles_up_to,
    with_features,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a Hopper GPU",
    ),
]


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """The backend, imported late: a machine without Triton collects these tests too."""
    from headfold.backends.hopper import run as run_on_hopper

    run_on_hopper(plan, x, out, lse)


@pytest.fixture(autouse=True)
def two_consumers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short tiles are for test_hopper_short.py."""
    short_tiles_up_to(0, monkeypatch)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def attend(x: Inputs, height: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run checked inputs into poisoned results on the kernel under test, whatever the planner would prefer, in tiles of
    `height` rows where that is said."""
    out, lse = poisoned(x)
    problem, _ = backends.plan_of(x, out)
    plan = plan_hopper(problem, running_device(x.q.device), triton_rows=2**31)
    assert isinstance(plan, Plan), plan
    assert height in (None, plan.block_m)
    run(plan, x, out, lse)
    return out, lse


@pytest.mark.parametrize("seed", range(100))
def test_drawn_calls(seed: int) -> None:
    x = drawn(seed, "cuda")
    assert_accurate(x, *attend(x))


@pytest.mark.parametrize("dims", PARTED_DIMS)
def test_head_dimensions_in_two_parts(dims: tuple[int, int]) -> None:
    """Products over the columns there are, dense and ragged, with windows and without."""
    for seed in range(8):
        for x in (drawn(seed, "cuda", dims=[dims]), drawn_ragged(seed, "cuda", dims=[dims])):
            assert_accurate(x, *attend(x))


@pytest.mark.parametrize("seed", range(100))
def test_drawn_calls_with_features(seed: int) -> None:
    """Sinks, softcap and chunks beside windows, dense and ragged, and sinks beside masks."""
    for x in (drawn(seed, "cuda"), drawn_ragged(seed, "cuda")):
        x = with_features(x, seed)
        out, lse = attend(x)
        assert_accurate(x, out, lse)
        again = attend(x)
        assert torch.equal(again[0].nan_to_num(5.0), out.nan_to_num(5.0))


@pytest.mark.parametrize("dims", PARTED_DIMS)
def test_features_of_head_dimensions_in_two_parts(dims: tuple[int, int]) -> None:
    for seed in range(8):
        for x in (drawn(seed, "cuda", dims=[dims]), drawn_ragged(seed, "cuda", dims=[dims])):
            x = with_features(x, seed)
            assert_accurate(x, *attend(x))


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize(
    "features",
    [
        {"sink": True},
        {"sink": True, "window_left": 127},
        {"softcap": 50.0},
        {"softcap": 50.0, "window_left": 511},
        {"attention_chunk": 700},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 128, 256])
def test_features_of_models(d: int, features: dict[str, Any], length: int) -> None:
    """gpt-oss, Gemma 2 and Llama 4, with the kernel that the planner picks, in the same bits every time."""
    torch.manual_seed(d)
    q, k, v = rand(1, length, 16, d), rand(1, length, 2, d), rand(1, length, 2, d)
    x = Inputs(q, k, v, window_right=0, **{**features, "sink": 2 * rand(16) if "sink" in features else None})
    assert backends.plan_of(x)[1].backend == "hopper"
    first = attend(x)
    assert_accurate(x, *first)
    for _ in range(50):
        again = attend(x)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


def test_few_keys_with_nan_on_both_sides() -> None:
    """Both ends of them in the same rows of shared memory, which each consumer zeroes for itself."""
    for left, sk in ((5, 164), (2, 150), (0, 146)):
        k, v = rand(64, 200, 4, 64), rand(64, 200, 4, 64)
        for t in (k, v):
            t[:, : sk - 6 - left], t[:, sk:] = NAN, NAN
        x = Inputs(rand(64, 130, 8, 64), k, v, window_left=left, window_right=0)
        x.seqused_q, x.seqused_k = (torch.full((64,), n, dtype=torch.int32, device="cuda") for n in (6, sk))
        for _ in range(50):
            assert not attend(x)[0][:, :6].isnan().any()


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize(
    "features",
    [
        {"sink": True, "window_left": 127},
        {"softcap": 50.0},
        {"attention_chunk": 130, "softcap": 3.0},
        {"attention_chunk": 700},
    ],
    ids=str,
)
@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_features_on_pages_give_the_bits_of_rows(d: int, features: dict[str, Any], page_size: int) -> None:
    if d == 96 and page_size == 1:
        pytest.skip("rows of head dimensions in two parts are not copied")
    torch.manual_seed(d + page_size)
    lengths = [700, 0, 1300, 129]
    for q_lens in (200, [300, 1, 150, 129]):
        rows = paged_rows(lengths, q_lens, d, d, (features.get("window_left", -1), 0))
        rows.softcap, rows.attention_chunk = features.get("softcap", 0.0), features.get("attention_chunk", 0)
        rows.sink = rand(8) if "sink" in features else None
        want = attend(rows)
        assert_accurate(rows, *want)
        got = attend(in_pages(rows, lengths, page_size))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("sq", [128, 512, 2048])
@pytest.mark.parametrize("kind", ["plain", "causal", "added", "bool", "holes"])
def test_repeated_runs_have_the_same_bits(kind: str, sq: int) -> None:
    """Buffers change hands between warpgroups and the copy engine; with one tile a program, races show most.

    A mask block handed back right after its last read was overwritten under that read in 41 of 600 runs, until a
    proxy fence stood between.
    """
    torch.manual_seed(0)
    q, k, v = rand(3, sq, 4, 128), rand(3, sq, 4, 128), rand(3, sq, 4, 128)
    x = Inputs(q, k, v, window_right=0 if kind == "causal" else -1)
    if kind in ("added", "holes"):
        x.mask = rand(3, 1, sq, sk := sq).expand(3, 4, sq, sk)
    if kind == "holes" and x.mask is not None:
        blocks = torch.rand(3, 1, sq // 64, sq // 128, device="cuda") < 0.5
        x.mask = x.mask.masked_fill(blocks.repeat_interleave(64, 2).repeat_interleave(128, 3), -torch.inf)
    if kind == "bool":
        x.mask = torch.rand(3, 4, sq, sq, device="cuda") < 0.5
    first = attend(x)
    assert_accurate(x, *first)
    for _ in range(200 if sq < 2048 else 50):
        again = attend(x)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("sq", "sk"), [(192, 2048), (1000, 1000), (2048, 300), (4096, 4096)])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (96, 96), (80, 72), (96, 64), (64, 96)])
def test_three_consumers(
    monkeypatch: pytest.MonkeyPatch, d: int, dv: int, sq: int, sk: int, causal: bool
) -> None:
    """Tiles of 192 rows, in the same bits every time."""
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    q, k, v = rand(2, sq, 4, d), rand(2, sk, 2, d), rand(2, sk, 2, dv)
    x = Inputs(q, k, v, window_right=0 if causal else -1)
    first = attend(x)
    assert_accurate(x, *first)
    for _ in range(50):
        again = attend(x)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize("growth", [2.0, 60.0])
def test_row_maxima_that_rise(growth: float, d: int, dtype: torch.dtype) -> None:
    """Slowly, so that the maximum in use falls behind, and by more than weights have room for; blocks run downwards."""
    torch.manual_seed(d)
    q, k, v = (
        rand(2, 300, 8, d, dtype=dtype),
        rand(2, 2000, 2, d, dtype=dtype),
        rand(2, 2000, 2, d, dtype=dtype),
    )
    k *= torch.linspace(growth, 0.1, 2000, device="cuda")[:, None, None].to(dtype)
    for right in (-1, 0):
        x = Inputs(q, k, v, window_right=right)
        assert_accurate(x, *attend(x))


def test_keys_that_no_query_sees_may_hold_nan() -> None:
    """Top-left causal with more keys than queries: the copy engine brings whole blocks of them all the same."""
    for sq, sk in ((130, 200), (130, 900), (256, 300), (200, 129)):
        q, k, v = rand(2, sq, 4, 128), rand(2, sk, 2, 128), rand(2, sk, 2, 128)
        k[:, sq:], v[:, sq:] = NAN, NAN
        x = Inputs(q, k, v, window_right=0, bottom_right=False)
        assert_accurate(x, *attend(x))


def test_a_graph_replays_beside_eager_calls() -> None:
    """Tiles are handed out by a counter in memory: a captured launch has its own."""
    q, k, v = rand(1, 1024, 8, 128), rand(1, 1024, 2, 128), rand(1, 1024, 2, 128)
    want = headfold.flash_attn_func(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = headfold.flash_attn_func(q, k, v, causal=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    for _ in range(50):
        out.fill_(NAN)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.replay()
        assert torch.equal(headfold.flash_attn_func(q, k, v, causal=True), want)
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(out, want)


def test_masks_of_pytorch_through_its_own_function() -> None:
    q, k, v = rand(2, 8, 300, 128), rand(2, 8, 304, 128), rand(2, 8, 304, 128)
    for mask in (rand(300, 304), rand(8, 300, 304) > 0, rand(2, 8, 300, 304)):
        got = headfold.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        want = torch.nn.functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=mask if mask.dtype == torch.bool else mask.double()
        )
        assert (got - want).abs().max() < 0.02


def test_rows_whose_biases_are_all_the_lowest_float() -> None:
    """Such a row is a mean of the values in PyTorch: -3.4e38 * log2(e) would be -inf, and the row dead."""
    q, k, v = rand(1, 300, 2, 128), rand(1, 400, 2, 128), rand(1, 400, 2, 128)
    mask = torch.zeros(1, 2, 300, 400, device="cuda", dtype=torch.bfloat16)
    mask[..., 200:] = torch.finfo(torch.bfloat16).min
    mask[:, :, 7:70] = torch.finfo(torch.bfloat16).min
    out, lse = attend(Inputs(q, k, v, mask=mask))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * 128**-0.5 + mask.double()
    want = torch.einsum("bhqk,bkhd->bqhd", scores.float().softmax(-1).double(), v.double())
    assert (out - want).abs().max() < 0.01
    assert torch.allclose(lse.double(), scores.logsumexp(-1), rtol=1e-5)


@pytest.mark.parametrize("seed", range(60))
def test_drawn_ragged_calls(seed: int) -> None:
    """Offsets and lengths in device memory; what lies beyond a sequence's end is NaN or another sequence."""
    x = drawn_ragged(seed, "cuda")
    out, lse = attend(x)
    assert_accurate(x, out, lse)
    again = attend(x)
    assert torch.equal(again[0].nan_to_num(5.0), out.nan_to_num(5.0))


def paged_rows(
    lengths: list[int], q_lens: list[int] | int, d: int, dv: int, window: tuple[int, int], heads: int = 8
) -> Inputs:
    """Dense K and V with lengths; NaN past the ends. Queries are ragged where `q_lens` is a list."""
    batch, most = len(lengths), max(lengths) + 7
    x = Inputs(
        rand(1),
        rand(batch, most, 2, d),
        rand(batch, most, 2, dv),
        window_left=window[0],
        window_right=window[1],
    )
    for i, n in enumerate(lengths):
        x.k[i, n:], x.v[i, n:] = NAN, NAN
    x.seqused_k = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    if isinstance(q_lens, int):
        x.q = rand(batch, q_lens, heads, d)
    else:
        x.q = rand(sum(q_lens), heads, d)
        x.cu_seqlens_q = torch.tensor([0, *q_lens], device="cuda").cumsum(0).int()
        x.max_seqlen_q = max(q_lens)
    return x


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (40, 0), (37, 5)])
@pytest.mark.parametrize(
    ("d", "dv", "page_size"),
    [
        *itertools.product((64, 128, 256), (0,), (1, 3, 8, 16, 20, 24, 48, 64, 128, 256)),
        *((d, dv, n) for d, dv in ((192, 128), (96, 96), (192, 160)) for n in (8, 16, 24, 48, 64, 128, 256)),
    ],
)
def test_pages_give_the_bits_of_rows(d: int, dv: int, page_size: int, window: tuple[int, int]) -> None:
    """Pages in order and shuffled, in every layout of engines; NaN in pages that nobody owns and past the ends; garbage
    in the table past the ends."""
    dv = dv or d
    torch.manual_seed(page_size + d)
    for lengths, q_lens in (([700, 0, 1300, 129], 200), ([333, 900, 64], [300, 1, 150])):
        rows = paged_rows(lengths, q_lens, d, dv, window)
        want = attend(rows)
        assert_accurate(rows, *want)
        for shuffled, layout in ((False, "apart"), *((True, one) for one in LAYOUTS)):
            got = attend(in_pages(rows, lengths, page_size, shuffled=shuffled, layout=layout))
            assert torch.equal(got[0], want[0]), (lengths, shuffled, layout)
            assert torch.equal(got[1], want[1]), (lengths, shuffled, layout)


@pytest.mark.parametrize("right", [-1, 0])
@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 256])
@pytest.mark.parametrize(("d", "dv"), [(64, 64), (96, 96), (80, 96)])
def test_three_consumers_of_pages(
    monkeypatch: pytest.MonkeyPatch, d: int, dv: int, page_size: int, right: int
) -> None:
    """Tiles of 192 rows, of rows whose lengths lie on the device and of pages: the same bits, every time."""
    monkeypatch.setattr(planner, "tile_rows", lambda p, device: 192)
    torch.manual_seed(page_size + d)
    for lengths, q_lens in (([700, 0, 1300, 129], 200), ([333, 900, 64, 4000], [300, 1, 64, 3900])):
        rows = paged_rows(lengths, q_lens, d, dv, (-1, right))
        want = attend(rows, 192)
        assert_accurate(rows, *want)
        pages = in_pages(rows, lengths, page_size)
        for call in [pages] * 20 + [rows] * 20:
            got = attend(call, 192)
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("page_size", [1, 3, 8, 16, 20, 64, 128])
@pytest.mark.parametrize("left", [-1, 37, 45])
def test_chunked_prefill_on_pages(page_size: int, left: int) -> None:
    """200 queries at the end of 700 keys. Keys that left the window are NaN, and their pages are anyone's."""
    rows = paged_rows([700], 200, 128, 128, (left, 0))
    gone = 0 if left < 0 else 700 - 200 - left
    rows.k[:, :gone], rows.v[:, :gone] = NAN, NAN
    want = attend(rows)
    assert_accurate(rows, *want)
    got = attend(in_pages(rows, [700], page_size, garbage_before=gone))
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize("page_size", [1, 16, 20, 64, 128])
@pytest.mark.parametrize("sq", [128, 512, 2048])
def test_repeated_runs_on_pages_have_the_same_bits(page_size: int, sq: int) -> None:
    torch.manual_seed(0)
    lengths = [sq, sq - 37, sq + 100]
    rows = paged_rows(lengths, sq, 128, 128, (-1, 0))
    pages = in_pages(rows, lengths, page_size)
    first = attend(rows)
    for _ in range(200 if sq < 2048 else 50):
        again = attend(pages)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_pages_through_the_public_function(page_size: int) -> None:
    """A prefill of a paged cache goes to this kernel by plan."""
    lengths = [2048, 1700, 1024, 2048]
    rows = paged_rows(lengths, 1024, 128, 128, (-1, 0))
    x = in_pages(rows, lengths, page_size)
    assert backends.plan_of(x)[1].backend == "hopper"
    got = headfold.flash_attn_with_kvcache(
        x.q, x.k, x.v, cache_seqlens=x.seqused_k, page_table=x.page_table, causal=True
    )
    assert torch.equal(got, attend(rows)[0])


@pytest.mark.parametrize("block", [64, 128])
def test_a_row_maximum_that_stays_shrinks_nothing(block: int) -> None:
    """To the last bit: a factor of nearly 1 costs a warp the products that it is there to spare."""
    from tests.gpu.lazy_softmax import shrink_factors

    scores = 3 * torch.randn(64, block, device="cuda")
    maxima = 3 * torch.randn(64, device="cuda")
    maxima[:8] = -float("inf")  # rows before their first key
    maxima[8:16] -= 100
    scale = 0.1 * 1.4426950408889634
    shrink = shrink_factors(scores, maxima, scale)
    rises = (scores.amax(1) - maxima) * scale > 8
    assert rises[:16].all()
    assert not rises[16:].any()
    assert (shrink[16:] == 1).all()
    assert (shrink[:8] == 0).all()
    torch.testing.assert_close(
        shrink[8:16], torch.exp2((maxima - scores.amax(1))[8:16] * scale), rtol=1e-5, atol=0
    )
