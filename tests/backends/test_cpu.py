"""The CPU backend against the reference, in every layout, and what it may read, write and hold meanwhile."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headfold import reference
from headfold.backends import cpu
from headfold.backends.cpu_band import Band
from headfold.problem import problem_of
from tests.backends.running import (
    DTYPES,
    attend,
    check,
    either_form,
    kv_bytes_of,
    peak_bytes,
    plan_for,
)
from tests.cases import NAN, assert_accurate, make, poisoned

INF = float("inf")


# ---- results ----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_problem_is_accurate(data: st.DataObject) -> None:
    """Layouts x ratios x windows x lengths x dtypes, by the automatic plan and by both forms finely cut."""
    draw = data.draw
    batch = draw(st.integers(1, 3))
    q_lens = draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 40]), min_size=batch, max_size=batch))
    k_lens = draw(st.lists(st.sampled_from([0, 1, 19, 64, 130]), min_size=batch, max_size=batch))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    sides = st.sampled_from([-1, -1, 0, 3, 30, 500])
    x = make(
        q_lens,
        k_lens,
        heads=kv_heads * draw(st.sampled_from([1, 3, 4, 5, 7, 12])),
        kv_heads=kv_heads,
        d=draw(st.sampled_from([1, 16, 33, 64])),
        dv=draw(st.sampled_from([None, None, None, 8, 80])),
        dtype=draw(st.sampled_from(DTYPES)),
        q_layout=draw(st.sampled_from(["dense", "ragged"])),
        kv_layout=draw(st.sampled_from(["dense", "ragged", "paged"])),
        page_size=draw(st.sampled_from([1, 3, 16, 19])),
        causal=draw(st.booleans()),
        window=(draw(sides), draw(sides)),
        bottom_right=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.0, -0.3])),
        slack=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**16)),
        num_splits=draw(st.sampled_from([0, 0, 1, 4])),
    )
    if problem_of(x).is_empty:
        return
    changes = draw(st.sampled_from([{}, *either_form()]))
    check(x, **changes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8, 32, 256])
@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
def test_every_group_decodes(group: int, kv_layout: str, dtype: torch.dtype) -> None:
    check(make([1, 1], [700, 33], heads=group, kv_heads=1, d=64, dtype=dtype, kv_layout=kv_layout))


@pytest.mark.parametrize("d", [1, 3, 19, 96, 255, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sq", [1, 70])
def test_every_head_dim(sq: int, dtype: torch.dtype, d: int) -> None:
    check(make([sq], [600], heads=6, kv_heads=2, d=d, dtype=dtype, causal=True))


@pytest.mark.parametrize(("d", "dv"), [(64, 16), (16, 64), (192, 128), (1, 256)])
@pytest.mark.parametrize("sq", [1, 70])
def test_values_of_another_width(sq: int, d: int, dv: int) -> None:
    check(make([sq, sq], [130, 90], d=d, dv=dv, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (-1, 40), (200, 0), (64, 64), (100, -1)])
@pytest.mark.parametrize(
    ("sq", "sk", "bottom_right"), [(300, 700, True), (700, 300, True), (600, 580, False)]
)
def test_prefill_masks(
    sq: int, sk: int, window: tuple[int, int], bottom_right: bool, dtype: torch.dtype
) -> None:
    """More rows and keys than the kernel's own blocks (256 and 512), so that whole blocks are masked."""
    check(make([sq], [sk], heads=2, kv_heads=1, dtype=dtype, window=window, bottom_right=bottom_right))


@pytest.mark.parametrize("num_splits", [1, 3, 200])
@pytest.mark.parametrize("sq", [1, 70])
def test_forced_splits(sq: int, num_splits: int) -> None:
    for kv_layout in ("dense", "paged"):
        check(
            make([sq], [130], dtype=torch.bfloat16, kv_layout=kv_layout, num_splits=num_splits, causal=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sq", [1, 5, 70])
def test_scale_zero_is_the_mean(sq: int, dtype: torch.dtype) -> None:
    """The kernel's exp is off by 5e-5 in half precision, which the plain LSE of equal scores never is."""
    x = make([sq], [90], scale=0.0, slack=0, dtype=dtype)
    out, lse = attend(x)
    mean = x.v.float().mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out)
    torch.testing.assert_close(out, mean.to(dtype))
    assert torch.equal(lse, torch.full_like(lse, 90).log())
    check(make([40], [40], scale=0.0, window=(0, 0), dtype=dtype))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sq", [3, 600])
def test_a_negative_scale_is_the_positive_one_of_negated_queries(sq: int, causal: bool) -> None:
    """The kernel's own causal form multiplies -inf by the scale: NaN, unless the sign is moved into q."""
    x = make([sq], [600], scale=-0.25, causal=causal, slack=0)
    other = dataclasses.replace(x, q=-x.q, softmax_scale=0.25)
    for got, want in zip(attend(x), attend(other), strict=True):
        assert torch.equal(got, want)


# ---- rows without a key -----------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, *either_form()])
@pytest.mark.parametrize(
    ("sq", "sk", "window", "bottom_right"),
    [(40, 7, (-1, 0), True), (40, 7, (2, -1), False), (40, 7, (0, 0), True), (9, 0, (-1, -1), True)],
)
def test_rows_without_a_key(
    sq: int, sk: int, window: tuple[int, int], bottom_right: bool, changes: dict[str, Any]
) -> None:
    x = make([sq, sq], [sk, sk], window=window, bottom_right=bottom_right, slack=2)
    out, lse = attend(x, plan_for(x, **changes))
    dead = ~reference.visible(sq, sk, *window, bottom_right).any(1)
    assert dead.any()
    assert (out[:, dead] == 0).all()
    assert (lse[:, :, dead] == -INF).all()
    assert_accurate(x, out, lse)


def test_a_row_that_one_split_hides_and_another_shows() -> None:
    """The kernel gives LSE 0, not -inf, for a row whose mask is all -inf: merged as it is, it would count."""
    x = make([6], [64], window=(3, 0), scale=8.0)
    check(x, kernel="decode", block_n=3, num_splits=22)


def test_a_sequence_without_keys_beside_others() -> None:
    for kv_layout in ("dense", "ragged", "paged"):
        x = make([1, 1, 1], [0, 20, 0], kv_layout=kv_layout)
        out, lse = attend(x)
        assert (out[[0, 2]] == 0).all()
        assert (lse[[0, 2]] == -INF).all()
        assert_accurate(x, out, lse)


# ---- strides and layouts ----------------------------------------------------------------------------------


def _strided(t: torch.Tensor, form: str) -> torch.Tensor:
    """t with other strides, NaN in every byte between its elements."""
    if form == "heads_first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    odd = torch.full((*t.shape[:-1], t.shape[-1] + 3), NAN, dtype=t.dtype)[..., 1 : 1 + t.shape[-1]]
    return odd.copy_(t)


@pytest.mark.parametrize("form", ["heads_first", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sq", [1, 5, 70])
def test_strides(sq: int, dtype: torch.dtype, form: str) -> None:
    x = make([sq, sq], [600, 600], d=33, dtype=dtype, causal=True, slack=0)
    moved = dataclasses.replace(x, q=_strided(x.q, form), k=_strided(x.k, form), v=_strided(x.v, form))
    out, lse = (_strided(t, "odd") for t in poisoned(x))
    cpu.run(plan_for(moved), moved, out, lse.transpose(-1, -2).contiguous().transpose(-1, -2))
    lse = attend(moved)[1]
    assert_accurate(x, out, lse)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("sq", [1, 70])
def test_expanded_keys_and_queries(sq: int, dim: int) -> None:
    """A stride of 0 is below the width of a row, which no BLAS takes: over tokens it must be copied."""
    x = make([sq, sq], [40, 40], dtype=torch.bfloat16, slack=0)
    flat = {n: getattr(x, n).narrow(dim, 0, 1).expand_as(getattr(x, n)) for n in ("q", "k", "v")}
    check(dataclasses.replace(x, **flat))


@pytest.mark.parametrize("sq", [1, 5, 70])
@pytest.mark.parametrize("page_size", [1, 3, 16, 19, 600])
def test_paged_gives_the_bits_of_ragged(page_size: int, sq: int) -> None:
    """With the same splits the pages change where keys lie and nothing else."""
    paged = make([sq], [600], d=64, dtype=torch.bfloat16, kv_layout="paged", page_size=page_size, causal=True)
    k, v = reference.keys_of(paged, 0)
    offsets = torch.tensor([0, 600], dtype=torch.int32)
    ragged = dataclasses.replace(paged, k=k, v=v, page_table=None, seqused_k=None, cu_seqlens_k=offsets)
    plan = plan_for(paged)
    for got, want in zip(attend(paged, plan), attend(ragged, plan), strict=True):
        assert torch.equal(got, want)


def test_lengths_of_pages_from_offsets() -> None:
    x = make([1, 2], [35, 7], kv_layout="paged")
    offsets = torch.tensor([0, 35, 42], dtype=torch.int32)
    check(dataclasses.replace(x, seqused_k=None, cu_seqlens_k=offsets))


def test_same_inputs_same_bits_on_two_threads() -> None:
    torch.set_num_threads(2)
    for sq in (1, 300):
        x = make([sq] * 2, [900] * 2, d=64, dtype=torch.bfloat16, causal=True)
        first, again = attend(x), attend(x)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert_accurate(x, *first)


# ---- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 128])
def test_decode_holds_a_tenth_of_the_cache_at_most(heads: int, dtype: torch.dtype, kv_layout: str) -> None:
    """128 heads are 64 rows a tile, from which PyTorch's bf16 kernel copies what one call is given."""
    x = make([1, 1], [16000, 9000], heads=heads, kv_heads=2, d=64, dtype=dtype, kv_layout=kv_layout)
    assert peak_bytes(x, plan_for(x)) < kv_bytes_of(x) / 10


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_never_copies_the_whole_cache(dtype: torch.dtype) -> None:
    x = make([128], [16000], heads=32, kv_heads=8, d=64, dtype=dtype, slack=0)
    assert peak_bytes(x, plan_for(x)) < kv_bytes_of(x) / 4


def test_the_memory_test_can_fail() -> None:
    """One call over all splits gathers every page at once."""
    x = make([1], [16000], heads=8, kv_heads=2, d=32, kv_layout="paged")
    assert peak_bytes(x, plan_for(x, num_stages=10**6)) > kv_bytes_of(x) / 2


# ---- the band ---------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(
    sq=st.integers(0, 12),
    sk=st.integers(0, 12),
    left=st.integers(-1, 14),
    right=st.integers(-1, 14),
    bottom_right=st.booleans(),
    chunk=st.sampled_from([0, 0, 1, 2, 3, 5, 12]),
    block_m=st.integers(1, 5),
    block_n=st.integers(1, 13),
)
def test_pieces_cover_each_visible_pair_once(
    sq: int, sk: int, left: int, right: int, bottom_right: bool, chunk: int, block_m: int, block_n: int
) -> None:
    x = make([sq], [sk], slack=0, window=(left, right), bottom_right=bottom_right, d=1, heads=1, kv_heads=1)
    x.attention_chunk = chunk
    seen = reference.mask_of(x, 0, sq, sk)[0][0]
    band = Band.of(x, sq, sk)
    first, last = band.rows()
    assert seen[first:last].any(1).all()
    assert not seen[:first].any()
    assert not seen[last:].any()
    assert torch.equal(band.counts(first, last), seen[first:last].sum(1).float())
    covered = torch.zeros(sq, sk, dtype=torch.int32)
    if first == last:
        return
    start, end = band.keys(first, last)
    assert seen.any(0).nonzero().flatten().tolist() == list(range(start, end))
    for a in range(start, end, block_n):
        for p in band.pieces(block_m, a, min(a + block_n, end)):
            area = torch.ones(p.last - p.first, p.end - p.start, dtype=torch.bool)
            if p.kind == "causal":
                area = area.tril()
            elif p.kind == "masked":
                area = band.visible(p.first, p.last, p.start, p.end)
            covered[p.first : p.last, p.start : p.end] += area
    assert torch.equal(covered, seen.int())
