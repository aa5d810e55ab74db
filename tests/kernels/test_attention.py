"""Every layout, ratio and length against the reference: on the CPU backend, and through the GPU's kernels."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from headfold import backends
from headfold.planner import DEVICES
from headfold.problem import Inputs, check
from tests.cases import assert_accurate, make, poisoned
from tests.conftest import CPU, KERNELS, Target

RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 32)
QUERIES = (1, 2, 5, 17, 64, 129)
KEYS = (0, 1, 15, 16, 17, 127, 129, 1000)
LAYOUTS = (("dense", "dense"), ("ragged", "ragged"), ("ragged", "paged"), ("dense", "paged"))
PAGE_SIZES = (1, 3, 16, 19, 64, 128, 256)


def run(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `x` into poisoned outputs, checked by the accuracy rule."""
    check(x)
    out, lse = poisoned(x)
    backends.run(x, out, lse)
    assert_accurate(x, out, lse)
    return out, lse


def drawn(i: int, ratio: int, sq: int, sk: int, target: Target, **more: object) -> Inputs:
    """Case number i: the features turn with it, so that a walk over the lengths meets them all."""
    q_layout, kv_layout = LAYOUTS[i % 4]
    mask = (
        {"causal": True},
        {},
        {"window": (40, 7)},
        {"window": (16, -1), "causal": True},
        {"window": (-1, 3)},
    )[i % 5]
    return make(
        [sq, max(sq - 3, 0)],
        [sk, sk // 2],
        heads=ratio,
        kv_heads=1,
        dtype=target.dtypes[i % len(target.dtypes)],
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=PAGE_SIZES[i % 7],
        share_pages=i % 2 == 0,
        bottom_right=i % 6 != 5,
        seed=i,
        device=target.device,
        **{**mask, **more},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("ratio", RATIOS)
def test_every_length_on_the_cpu(ratio: int) -> None:
    """The whole product of ratios and lengths, the features in turn."""
    for i, (sq, sk) in enumerate(product(QUERIES, KEYS)):
        run(drawn(i + ratio, ratio, sq, sk, CPU))


@pytest.mark.parametrize(("sq", "sk"), list(product(QUERIES, KEYS)))
def test_every_length_through_the_kernels(kernels: Target, sq: int, sk: int) -> None:
    """Every pair of lengths; the ratios take turns so that each meets long and short rows and keys."""
    i = QUERIES.index(sq) * len(KEYS) + KEYS.index(sk)
    ratios = RATIOS if kernels.name == "gpu" else (RATIOS[i * 7 % 10],)
    for ratio in ratios:
        run(drawn(i, ratio, sq, sk, kernels))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda p: "-".join(p))
def test_every_ratio_in_every_layout(kernels: Target, ratio: int, layout: tuple[str, str]) -> None:
    """Each ratio with a few queries over two KV heads, in each layout: lanes must not run into the next group."""
    x = make(
        [3, 1],
        [70, 33],
        heads=2 * ratio,
        kv_heads=2,
        q_layout=layout[0],
        kv_layout=layout[1],
        page_size=19,
        causal=True,
        dtype=kernels.dtypes[ratio % len(kernels.dtypes)],
        device=kernels.device,
    )
    run(x)


@pytest.mark.parametrize(
    "dims", [(8, 8), (40, 40), (72, 72), (80, 64), (96, 96), (192, 128), (64, 128), (256, 256)]
)
@pytest.mark.parametrize("sq", [1, 70])
def test_every_head_dimension(target: Target, dims: tuple[int, int], sq: int) -> None:
    """Head dimensions that are no power of two run as two parts, and d and dv may differ."""
    for i, dtype in enumerate(target.dtypes):
        layout = ("dense", "paged", "ragged")[i % 3]
        run(
            make(
                [sq],
                [90],
                d=dims[0],
                dv=dims[1],
                dtype=dtype,
                kv_layout=layout,
                causal=True,
                device=target.device,
            )
        )


@pytest.mark.parametrize("dims", [(1, 1), (13, 7), (20, 33), (101, 255)])
def test_head_dimensions_that_nothing_divides(target: Target, dims: tuple[int, int]) -> None:
    """Rows of odd length: no 16-byte copy fits them, and the padding columns must not leak in."""
    for sq in (1, 40):
        run(
            make(
                [sq], [45], d=dims[0], dv=dims[1], dtype=target.dtypes[-1], causal=True, device=target.device
            )
        )


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_paged_is_dense_bit_for_bit(target: Target, page_size: int) -> None:
    """The same keys give the same bits whatever the page size and the order of the pages."""
    dtype = target.dtypes[-1]
    for sq in (1, 33):
        dense = make(
            [sq, sq], [300, 77], dtype=dtype, causal=True, seed=5, device=target.device, num_splits=2
        )
        paged = make(
            [sq, sq],
            [300, 77],
            dtype=dtype,
            causal=True,
            seed=5,
            device=target.device,
            num_splits=2,
            kv_layout="paged",
            page_size=page_size,
        )
        paged.q = dense.q
        for i, n in enumerate((300, 77)):
            keys = torch.arange(n, device=target.device)
            at = paged.page_table[i, keys // page_size].long(), keys % page_size  # type: ignore[index]
            paged.k[at], paged.v[at] = dense.k[i, :n], dense.v[i, :n]
        # A plan for the dense cache may use another tile: give both the paged one.
        results = []
        for x in (dense, paged):
            out, lse = poisoned(x)
            backends.run(x, out, lse)
            results.append((out, lse))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 16, 64, 256])
def test_every_number_of_splits_means_the_same(target: Target, splits: int) -> None:
    """num_splits changes how the work is cut, not what comes out; more splits than blocks leave empty ones."""
    dtype = target.dtypes[-1]
    x = make([2, 1], [400, 9], heads=6, dtype=dtype, causal=True, num_splits=splits, device=target.device)
    run(x)


def test_folded_and_apart_agree(target: Target) -> None:
    """pack_gqa=False runs the heads of a group apart: the same meaning, each row of scores the same sums."""
    for sq in (1, 40):
        x = make(
            [sq], [130], heads=6, causal=True, dtype=target.dtypes[-1], pack_gqa=False, device=target.device
        )
        run(x)


def test_the_kernels_without_a_copy_engine(kernels: Target) -> None:
    """Plans for GPUs without TMA load K and V of a prefill through pointers."""
    with backends.force(DEVICES["a100"]):
        for window in ((-1, -1), (50, 20)):
            x = make(
                [200],
                [230],
                d=64,
                dtype=kernels.dtypes[-1],
                window=window,
                device=kernels.device,
                num_splits=1,
            )
            assert backends.plan_of(x)[1].kernel == "prefill"
            assert not backends.plan_of(x)[1].use_tma
            run(x)


def test_strides_of_every_kind(target: Target) -> None:
    """Heads before tokens, K and V as halves of one tensor, odd pitches, a base off by one element, expanded K."""
    dtype = target.dtypes[-1]
    for sq in (1, 40):
        x = make(
            [sq, sq], [60, 60], heads=8, kv_heads=2, dtype=dtype, slack=0, causal=True, device=target.device
        )
        before = (x.k, x.v)
        x.k, x.v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in before)
        run(x)
        both = torch.cat(before, dim=-1)
        x.k, x.v = both[..., :16], both[..., 16:]
        run(x)
        odd = torch.full((2, 60, 2, 19), float("nan"), dtype=dtype, device=target.device)
        odd[..., 1:17] = before[0]
        x.k, x.v = odd[..., 1:17], before[1]
        run(x)
        x.k, x.v = before[0][:1].expand(2, -1, -1, -1), before[1][:, :, :1].expand(-1, -1, 2, -1)
        run(x)
        x.k, x.v = before
        x.q = x.q.transpose(1, 2).contiguous().transpose(1, 2)
        run(x)


def test_repeats_bit_for_bit(target: Target) -> None:
    """The same inputs give the same bits, split or not. (Rows past seqused_q stay NaN, as poisoned.)"""
    for splits in (1, 5):
        x = make([3, 2], [300, 40], heads=6, dtype=target.dtypes[-1], num_splits=splits, device=target.device)
        first = run(x)
        for _ in range(3):
            again = poisoned(x)
            backends.run(x, *again)
            assert all(
                torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
                for a, b in zip(first, again, strict=True)
            )


def test_outputs_with_strides(target: Target) -> None:
    """out and lse may be views: only their own elements are written."""
    x = make(
        [3, 2], [70, 40], heads=6, dtype=target.dtypes[-1], causal=True, device=target.device, num_splits=2
    )
    wide = torch.full((*x.out_shape[:-1], 40), 7.0, dtype=x.q.dtype, device=target.device)
    lse = torch.full((*x.lse_shape, 2), 7.0, device=target.device)
    backends.run(x, wide[..., 8:24], lse[..., 0])
    assert_accurate(x, wide[..., 8:24], lse[..., 0])
    assert (wide[..., :8] == 7).all()
    assert (wide[..., 24:] == 7).all()
    assert (lse[..., 1] == 7).all()


def test_the_kernels_ran(kernels: Target) -> None:
    """Guards the others: under `kernels` a plan names the Triton backend, on a GPU or interpreted."""
    x = make([1], [10], device=kernels.device)
    assert backends.plan_of(x)[1].backend == "triton"
    assert KERNELS.name in ("gpu", "interpreted")
