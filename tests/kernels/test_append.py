"""The append kernel's parts: rotation of split rows, one launch a call, and how many variants there are."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from headfold import prepared
from headfold.backends import append as launcher
from headfold.backends.cpu_append import rotate
from headfold.kernels.append import APPEND_ARGUMENTS, append_kernel
from headfold.kernels.parts.fold import store_rows
from headfold.kernels.parts.rotary import load_rotated
from headfold.planner.tiles import split_dim
from tests.conftest import KERNELS, Target
from tests.test_append import call, make


@triton.jit
def rotate_kernel(
    X,
    Out,
    Cos,
    Sin,
    positions,
    rows,
    stride,
    max_positions,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rotate rows as an attention kernel loads its queries: both parts of a split head dimension."""
    row = tl.arange(0, BLOCK_M)
    live = row < rows
    offset = row.to(tl.int64) * stride
    at = tl.load(positions + row, mask=live, other=0)
    angles = ROTARY_DIM // 2
    q = load_rotated(
        X,
        offset,
        live,
        at,
        Cos,
        Sin,
        angles,
        angles,
        max_positions,
        HEAD_DIM,
        0,
        D0,
        ROTARY_DIM,
        INTERLEAVED,
        1,
    )
    store_rows(Out, offset, live, q, HEAD_DIM, 0, D0)
    if D1 > 0:
        q = load_rotated(
            X,
            offset,
            live,
            at,
            Cos,
            Sin,
            angles,
            angles,
            max_positions,
            HEAD_DIM,
            D0,
            D1,
            ROTARY_DIM,
            INTERLEAVED,
            1,
        )
        store_rows(Out, offset, live, q, HEAD_DIM, D0, D1)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("d", "rotary_dim"), [(80, 80), (80, 64), (80, 66), (96, 20), (37, 36), (16, 16)])
def test_a_pair_may_lie_in_both_parts_of_a_split_head(d: int, rotary_dim: int, interleaved: bool) -> None:
    """d = 80 is loaded as 64 + 32 columns; in halves, column 63 then pairs with 23 and 64 with 24."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(11, d, generator=g)
    x[3, rotary_dim:] = 1e30  # a column that is not rotated takes no part in any pair
    angles = torch.rand(30, rotary_dim // 2, generator=g) * 6.3
    at = torch.randint(0, 30, (11,), generator=g, dtype=torch.int32)
    at[1], at[2], at[10] = -1, 30, 31
    x, cos, sin, at = (t.to(KERNELS.device) for t in (x, angles.cos(), angles.sin(), at))
    out = torch.full_like(x, 7.0)
    d0, d1 = split_dim(d)
    rotate_kernel[(1,)](x, out, cos, sin, at, 10, d, 30, d, d0, d1, rotary_dim, interleaved, 16)
    want = rotate(x[:10, None], cos, sin, at[:10], interleaved)[:, 0]
    assert want[[1, 2], :rotary_dim].isnan().all()
    torch.testing.assert_close(out[:10], want, rtol=0, atol=2e-6, equal_nan=True)
    assert torch.equal(out[:10, rotary_dim:], x[:10, rotary_dim:])
    assert (out[10] == 7).all(), "a row that is not live was written"


def test_an_append_is_one_launch(kernels: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches, rotation and lengths at once: each launch costs a decoding step 20 us of host time."""
    grids: list[tuple[int, ...]] = []

    class Counting(launcher.Launcher):
        def __call__(self, arguments: tuple[int | float, ...]) -> None:
            grids.append(self._grid)
            super().__call__(arguments)

    monkeypatch.setattr(launcher, "Launcher", Counting)
    prepared._kept.clear()
    for ragged in (False, True):
        case = make([4, 1], [3, 3], ragged=ragged, page_size=3, rotary_dim=4, device=kernels.device)
        assert call(case.x).tolist() == [7, 4]
    # Two sequences of 3 tokens x 2 heads; a tile of width 16 holds 128 rows.
    assert grids == [(2,), (2,)]
    # Two sequences of 40 queries x 5 heads: two tiles each, rotated by programs of the same launch.
    case.x.q = torch.randn(2, 40, 5, 8).to(kernels.device)
    call(case.x)
    assert grids[2:] == [(2 + 4,)]


def test_no_argument_is_specialised_on() -> None:
    """Addresses and integers alike: one not in the list would compile a variant for 1, one for multiples of 16 ..."""
    kinds = {n: p.annotation for n, p in inspect.signature(append_kernel.fn).parameters.items()}
    plain = [n for n, kind in kinds.items() if getattr(kind, "name", "") in ("int32", "int64", "uint32")]
    assert sorted(plain) == sorted(APPEND_ARGUMENTS)
    assert not [n for n, kind in kinds.items() if kind is inspect.Parameter.empty]


def test_variants_follow_the_model_not_the_call() -> None:
    """Layout, page size, lengths and numbers of sequences, tokens and heads change no constant."""
    met = set()
    for page_size, ragged, tokens, heads in itertools.product((0, 3, 16), (False, True), (1, 4), (1, 3)):
        case = make([1, 2], [tokens] * 2, page_size=page_size, ragged=ragged, heads=heads, d=16, rotary_dim=8)
        met.add(tuple(launcher.constants(case.x).items()))
    assert len(met) == 1
    names = {
        n for n, kind in inspect.signature(append_kernel.fn).parameters.items() if n.isupper() and len(n) > 1
    }
    assert names == set(launcher.constants(case.x))


@pytest.mark.parametrize("storage", ["plain", "odd pitch and base"])
def test_alignment_is_what_the_tensors_have(storage: str) -> None:
    x = make([1, 2], [3, 3], d=16, rotary_dim=16, storage=storage).x
    aligned = storage == "plain"
    assert launcher.constants(x)["ALIGN"] == (4 if aligned else 1)
    assert launcher.constants(x)["ROTARY_ALIGN"] == 4
    odd = torch.zeros(40, 9)[:, :8]
    assert launcher.rotary_constants(odd, odd, True)["ROTARY_ALIGN"] == 1
    assert launcher.rotary_constants(None, None, True)["ROTARY_DIM"] == 0
