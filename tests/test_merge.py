"""flash_attn_combine on every target, and the checks of its arguments below the public function."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headfold import flash_attn_combine, flash_attn_func, merge, ops, reference
from tests.cases import NAN, assert_accurate, make
from tests.conftest import CPU, Target

INF = float("inf")
MERGED = 1e-5  # how far a merge may be from float32


def states(
    splits: int, rows: tuple[int, ...], d: int = 8, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states of (*rows, h) rows."""
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(splits, *rows, d, generator=g).to(dtype)
    return out, torch.randn(splits, *rows, generator=g) * 3


def kill(out: torch.Tensor, lse: torch.Tensor, share: float, seed: int = 1) -> None:
    """States that saw no key: LSE -inf, and an output that nobody may read."""
    dead = torch.rand(lse.shape, generator=torch.Generator().manual_seed(seed)) < share
    lse[dead], out[dead] = -INF, NAN


def assert_merged(
    got: tuple[torch.Tensor, torch.Tensor], out_partial: torch.Tensor, lse_partial: torch.Tensor
) -> None:
    """Within 1e-5 of the reference, plus the rounding of the result's own dtype."""
    out, lse = got
    ref, ref_lse = reference.combine(out_partial.cpu(), lse_partial.cpu())
    assert (out.shape, lse.shape, lse.dtype) == (ref.shape, ref_lse.shape, torch.float32)
    rounding = 0.0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.cpu().double(), ref, rtol=rounding, atol=MERGED)
    torch.testing.assert_close(lse.cpu().double(), ref_lse, rtol=1e-6, atol=MERGED)


ROWS = {"dense": (2, 3, 4), "ragged": (5, 4)}


# ---- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 17, 256])
@pytest.mark.parametrize("layout", ROWS)
def test_merge_of_any_number_of_states(target: Target, layout: str, splits: int) -> None:
    out, lse = (t.to(target.device) for t in states(splits, ROWS[layout]))
    assert_merged(flash_attn_combine(out, lse), out, lse)


@pytest.mark.parametrize("layout", ROWS)
def test_one_state_is_its_own_merge(target: Target, layout: str) -> None:
    out, lse = (t.to(target.device) for t in states(1, ROWS[layout]))
    merged, merged_lse = flash_attn_combine(out, lse)
    assert torch.equal(merged, out[0])
    assert torch.equal(merged_lse, lse[0])


@pytest.mark.parametrize("share", [0.5, 0.95])
@pytest.mark.parametrize("layout", ROWS)
def test_states_without_keys_are_not_read(target: Target, layout: str, share: float) -> None:
    out, lse = states(7, ROWS[layout])
    kill(out, lse, share)
    out, lse = out.to(target.device), lse.to(target.device)
    merged = flash_attn_combine(out, lse)
    assert not merged[0].isnan().any()
    assert_merged(merged, out, lse)


@pytest.mark.parametrize("splits", [1, 5])
def test_rows_that_no_state_saw_are_zero_and_minus_infinity(target: Target, splits: int) -> None:
    out, lse = (t.to(target.device) for t in states(splits, (2, 3, 4)))
    out[:, 1, 2], lse[:, 1, 2] = NAN, -INF
    merged, merged_lse = flash_attn_combine(out, lse)
    assert (merged[1, 2] == 0).all()
    assert (merged_lse[1, 2] == -INF).all()
    assert_merged((merged, merged_lse), out, lse)


@pytest.mark.parametrize("offset", [-1e4, 80.0, 1e4])
def test_large_lse_neither_overflows_nor_vanishes(target: Target, offset: float) -> None:
    out, lse = states(5, (1, 2, 4))
    lse = (lse + offset).to(target.device)
    out = out.to(target.device)
    assert_merged(flash_attn_combine(out, lse), out, lse)


def test_states_far_apart_keep_the_larger(target: Target) -> None:
    out, lse = (t.to(target.device) for t in states(2, (1, 2, 4)))
    lse[1] = lse[0] - 500.0
    merged, merged_lse = flash_attn_combine(out, lse)
    assert torch.equal(merged, out[0])
    assert torch.equal(merged_lse, lse[0])


@pytest.mark.parametrize("d", [1, 3, 33, 256])
def test_every_width(target: Target, d: int) -> None:
    out, lse = (t.to(target.device) for t in states(3, (1, 2, 3), d=d))
    assert_merged(flash_attn_combine(out, lse), out, lse)


@pytest.mark.parametrize("layout", ROWS)
def test_strided_partials(target: Target, layout: str) -> None:
    """Rows of odd length off by one element, heads and splits stored inside, and an LSE with heads first."""
    out, lse = (t.to(target.device) for t in states(6, ROWS[layout]))
    kill(out, lse, 0.3)
    padded = torch.nn.functional.pad(out, (1, 2), value=NAN)[..., 1:-2]
    splits_inside = out.movedim(0, -2).contiguous().movedim(-2, 0)
    heads_first = out.movedim(-2, 0).contiguous().movedim(0, -2)
    lse_heads_first = lse.movedim(-1, 1).contiguous().movedim(1, -1)
    every_other = lse.repeat_interleave(2, -1)[..., ::2]
    for view in (padded, splits_inside, heads_first):
        assert not view.is_contiguous()
        assert_merged(flash_attn_combine(view, lse), out, lse)
    for view in (lse_heads_first, every_other):
        assert not view.is_contiguous()
        assert_merged(flash_attn_combine(out, view), out, lse)


@pytest.mark.parametrize("out_dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_of_partials_and_results(
    target: Target, dtype: torch.dtype, out_dtype: torch.dtype | None
) -> None:
    out, lse = (t.to(target.device) for t in states(4, (1, 3, 2), dtype=dtype))
    kill(out, lse, 0.3)
    merged, merged_lse = flash_attn_combine(out, lse, out_dtype=out_dtype)
    assert merged.dtype == (out_dtype or dtype)
    assert_merged((merged, merged_lse), out, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ROWS)
def test_out_is_written_in_place_whatever_its_strides(
    target: Target, layout: str, dtype: torch.dtype
) -> None:
    rows = ROWS[layout]
    out, lse = (t.to(target.device) for t in states(4, rows))
    padded = torch.full((*rows, 8 + 3), NAN, dtype=dtype, device=target.device)
    heads_first = torch.full((rows[-1], *rows[:-1], 8), NAN, dtype=dtype, device=target.device).movedim(0, -2)
    for given_out in (padded[..., 1:9], heads_first):
        got, got_lse = flash_attn_combine(out, lse, given_out, dtype)
        assert got is given_out
        assert_merged((got, got_lse), out, lse)
    assert padded[..., 0].isnan().all()
    assert padded[..., 9:].isnan().all()


def test_the_lse_comes_unless_refused(target: Target) -> None:
    out, lse = (t.to(target.device) for t in states(3, (1, 2, 2)))
    merged, _ = flash_attn_combine(out, lse)
    assert torch.equal(flash_attn_combine(out, lse, return_lse=False), merged)
    given_out = torch.empty_like(merged)
    assert flash_attn_combine(out, lse, given_out, return_lse=False) is given_out


def written(
    target: Target,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: list[int] | None,
    seqused: list[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    def ints(values: list[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=target.device)

    got = torch.full(out.shape[1:], NAN, device=target.device)
    got_lse = torch.full(lse.shape[1:], NAN, device=target.device)
    ops.combine_out(
        out.to(target.device), lse.to(target.device), ints(cu_seqlens), ints(seqused), out=got, lse=got_lse
    )
    return got.cpu(), got_lse.cpu()


@pytest.mark.parametrize("seqused", [[3, 1], [0, 3], [0, 0], [3, 3]], ids=str)
def test_rows_past_seqused_are_untouched(target: Target, seqused: list[int]) -> None:
    out, lse = states(3, (2, 3, 4))
    ref, ref_lse = reference.combine(out, lse)
    got, got_lse = written(target, out, lse, None, seqused)
    for i, n in enumerate(seqused):
        torch.testing.assert_close(got[i, :n].double(), ref[i, :n], rtol=0, atol=MERGED)
        torch.testing.assert_close(got_lse[i, :n].double(), ref_lse[i, :n], rtol=0, atol=MERGED)
        assert got[i, n:].isnan().all()
        assert got_lse[i, n:].isnan().all()


@pytest.mark.parametrize(
    ("cu_seqlens", "seqused"),
    [([0, 4, 10], [2, 6]), ([0, 4, 4, 10], [4, 0, 1]), ([0, 0, 0, 7], [0, 0, 3]), ([0, 10], [10]), ([0], [])],
    ids=str,
)
def test_rows_past_seqused_of_a_ragged_batch_are_untouched(
    target: Target, cu_seqlens: list[int], seqused: list[int]
) -> None:
    out, lse = states(3, (10, 4))
    ref, ref_lse = reference.combine(out, lse)
    live = torch.zeros(10, dtype=torch.bool)
    for first, n in zip(cu_seqlens, seqused, strict=False):
        live[first : first + n] = True
    got, got_lse = written(target, out, lse, cu_seqlens, seqused)
    torch.testing.assert_close(got[live].double(), ref[live], rtol=0, atol=MERGED)
    torch.testing.assert_close(got_lse[live].double(), ref_lse[live], rtol=0, atol=MERGED)
    assert got[~live].isnan().all()
    assert got_lse[~live].isnan().all()


def test_cu_seqlens_alone_merge_every_row(target: Target) -> None:
    out, lse = (t.to(target.device) for t in states(3, (10, 4)))
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32, device=target.device)
    assert_merged(flash_attn_combine(out, lse, cu_seqlens=offsets), out, lse)


@pytest.mark.parametrize("rows", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 4)], ids=str)
def test_no_rows_are_an_empty_result(target: Target, rows: tuple[int, ...]) -> None:
    out, lse = (t.to(target.device) for t in states(3, rows))
    merged, merged_lse = flash_attn_combine(out, lse)
    assert (merged.shape, merged_lse.shape) == ((*rows, 8), rows)


@pytest.mark.parametrize("cuts", [[0, 20], [0, 7, 20], [0, 1, 5, 5, 20]], ids=str)
def test_attention_over_parts_of_the_keys_merges_to_attention_over_all(
    target: Target, cuts: list[int]
) -> None:
    x = make([3, 3], [20, 20], slack=0, device=target.device)
    parts = [flash_attn_func(x.q, x.k[:, a:b], x.v[:, a:b], return_lse=True) for a, b in pairwise(cuts)]
    out = torch.stack([o for o, _ in parts])
    lse = torch.stack([s for _, s in parts]).transpose(-1, -2)  # LSE of attention is (b, h, sq)
    merged, merged_lse = flash_attn_combine(out, lse)
    assert_accurate(x, merged, merged_lse.transpose(1, 2), factor=4.0)


@settings(max_examples=100)
@given(data=st.data())
def test_any_states_merge_as_the_reference_says(data: st.DataObject) -> None:
    draw = data.draw
    rows = draw(st.sampled_from([(1, 1, 1), (2, 3, 2), (4, 3), (1, 1)]))
    seed = draw(st.integers(0, 2**16))
    out, lse = states(draw(st.integers(1, 20)), rows, d=draw(st.integers(1, 9)), seed=seed)
    lse = lse * draw(st.sampled_from([0.0, 1.0, 30.0])) + draw(st.sampled_from([-1e4, 0.0, 300.0]))
    kill(out, lse, draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])), seed=seed + 1)
    with CPU.running():
        assert_merged(flash_attn_combine(out, lse), out, lse)


def test_merge_on_cpu_is_independent_of_how_states_are_grouped() -> None:
    out, lse = states(8, (2, 3, 4))
    kill(out, lse, 0.4)
    halves = [merge.merge_on_cpu(out[i : i + 4], lse[i : i + 4]) for i in (0, 4)]
    twice = merge.merge_on_cpu(torch.stack([o for o, _ in halves]), torch.stack([s for _, s in halves]))
    assert_merged(twice, out, lse)


# ---- checks below the public function (its own arguments: tests/interface) --------------------------------


def test_combine_shapes() -> None:
    assert merge.combine_shapes(torch.empty(3, 2, 5, 4, 8)) == ((2, 5, 4, 8), (2, 5, 4))
    assert merge.combine_shapes(torch.empty(3, 5, 4, 8)) == ((5, 4, 8), (5, 4))


@dataclasses.dataclass(frozen=True)
class Bad:
    changes: dict[str, Any]
    kind: type[Exception]
    message: str


BAD = [
    Bad({"out_partial": [1]}, TypeError, "out_partial is a list; it must be a torch.Tensor"),
    Bad({"lse_partial": None}, TypeError, "lse_partial is a NoneType; it must be a torch.Tensor"),
    Bad({"seqused": [1, 2]}, TypeError, "seqused is a list; it must be a torch.Tensor"),
    Bad({"out": 1}, TypeError, "out is a int; it must be a torch.Tensor"),
    Bad({"lse": torch.zeros(2, 4, 3)}, ValueError, "lse has shape (2, 4, 3); it must be (2, 3, 4)"),
    Bad({"lse": torch.zeros(2, 3, 4).half()}, ValueError, "lse has dtype torch.float16; it must be float32"),
    Bad(
        {"lse": torch.zeros(2, 3, 4, device="meta")},
        ValueError,
        "lse is on meta; it must be on out_partial's device cpu",
    ),
    Bad({"lse": torch.zeros(1, 3, 4).expand(2, 3, 4)}, ValueError, "lse is expanded (a stride is 0)"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.message[:20])
def test_check_combine_refuses(bad: Bad) -> None:
    out_partial, lse_partial = states(3, (2, 3, 4))
    arguments = {
        "out_partial": out_partial,
        "lse_partial": lse_partial,
        "cu_seqlens": None,
        "seqused": None,
        "out": torch.zeros(2, 3, 4, 8),
        "lse": torch.zeros(2, 3, 4),
        "out_dtype": None,
    }
    merge.check_combine(**arguments)
    with pytest.raises(bad.kind) as error:
        merge.check_combine(**{**arguments, **bad.changes})
    assert str(error.value).startswith(f"flash_attn_combine: {bad.message}")


WRONG_VALUES = [
    ({"seqused": [4, 1]}, "seqused [0] is 4; that sequence has room for 0 to 3"),
    ({"seqused": [0, -1]}, "seqused [1] is -1; that sequence has room for 0 to 3"),
    ({"cu_seqlens": [1, 6]}, "cu_seqlens [0] is 1; the first offset must be 0"),
    ({"cu_seqlens": [0, 4, 2]}, "cu_seqlens [2] is 2, below [1] = 4; offsets must not decrease"),
    ({"cu_seqlens": [0, 4, 7]}, "cu_seqlens [2] is 7; only 6 rows are there"),
    ({"cu_seqlens": [0, 4, 6], "seqused": [4, 3]}, "seqused [1] is 3; that sequence has room for 0 to 2"),
]


@pytest.mark.parametrize(
    ("given", "message"), WRONG_VALUES, ids=lambda x: x[:30] if isinstance(x, str) else ""
)
def test_value_checks_of_a_merge(
    target: Target, given: dict[str, list[int]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (6, 4) if "cu_seqlens" in given else (2, 3, 4)
    out, lse = (t.to(target.device) for t in states(3, rows))
    index = {n: torch.tensor(v, dtype=torch.int32, device=target.device) for n, v in given.items()}
    result = torch.full(out.shape[1:], NAN, device=target.device)
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    with pytest.raises(ValueError) as error:
        flash_attn_combine(out, lse, result, **index)
    assert str(error.value) == f"flash_attn_combine: {message}"
    assert result.isnan().all(), "nothing is written"


@pytest.mark.parametrize(
    ("cu_seqlens", "seqused"), [(None, [3, 0]), ([0, 4, 6], None), ([0, 4, 6], [4, 2]), ([0], [])], ids=str
)
def test_right_values_pass_the_checks_of_a_merge(
    target: Target,
    cu_seqlens: list[int] | None,
    seqused: list[int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    out, lse = (t.to(target.device) for t in states(3, (2, 3, 4) if cu_seqlens is None else (6, 4)))
    index = {"cu_seqlens": cu_seqlens, "seqused": seqused}
    flash_attn_combine(
        *(out, lse),
        **{
            n: torch.tensor(v, dtype=torch.int32, device=target.device)
            for n, v in index.items()
            if v is not None
        },
    )


def test_gradients_of_partials_are_refused_with_grad_mode_alone(target: Target) -> None:
    out, lse = (t.to(target.device) for t in states(3, (1, 2, 2)))
    learnt = out.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="flash_attn_combine: an input requires a gradient"):
        flash_attn_combine(learnt, lse)
    with torch.no_grad():
        assert_merged(flash_attn_combine(learnt, lse), out, lse)
