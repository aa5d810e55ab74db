"""merge_states on every target: against the reference, in place, without keys, and every argument's error."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from headfold import flash_attn_func, flash_attn_varlen_func, reference
from headfold.states import merge_states
from tests.cases import NAN, assert_accurate, make
from tests.conftest import Target

INF = float("inf")
MERGED = 1e-5  # how far a merge may be from float32
SHAPES = {"dense": (2, 3, 4, 8), "ragged": (5, 4, 8)}
State = tuple[torch.Tensor, torch.Tensor]


def lse_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-3], shape[-2], shape[-3])


def make_states(
    n: int,
    shape: tuple[int, ...],
    device: str = "cpu",
    dead: float = 0.0,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
    seed: int = 0,
) -> list[State]:
    """Random states; a share `dead` of the rows of each saw no key: LSE -inf, output NaN."""
    g = torch.Generator().manual_seed(seed)
    states = []
    for i in range(n):
        out = torch.randn(shape, generator=g).to(dtypes[i % len(dtypes)])
        lse = torch.randn(lse_shape(shape), generator=g) * 3
        unseen = torch.rand(lse.shape, generator=g) < dead
        lse[unseen] = -INF
        out[unseen.transpose(-1, -2)] = NAN
        states.append((out.to(device), lse.to(device)))
    return states


def expected(states: list[State]) -> State:
    """The reference's merge at float64, LSE with rows last."""
    out, lse = reference.combine(
        torch.stack([o.cpu().double() for o, _ in states]),
        torch.stack([s.cpu().transpose(-1, -2) for _, s in states]),
    )
    return out, lse.transpose(-1, -2)


def assert_merged(got: State, want: State) -> None:
    """Within 1e-5 of the reference, plus the rounding of the result's own dtype."""
    (out, lse), (ref, ref_lse) = got, want
    assert (out.shape, lse.shape, lse.dtype) == (ref.shape, ref_lse.shape, torch.float32)
    rounding = 0.0 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.cpu().double(), ref, rtol=rounding, atol=MERGED)
    torch.testing.assert_close(lse.cpu().double(), ref_lse, rtol=1e-6, atol=MERGED)


# ---- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dead", [0.0, 0.4, 0.95])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("layout", SHAPES)
def test_merge_is_the_references(target: Target, layout: str, n: int, dead: float) -> None:
    states = make_states(n, SHAPES[layout], target.device, dead)
    out, lse = merge_states(states)
    assert not out.isnan().any()
    assert lse.is_contiguous()
    assert_merged((out, lse), expected(states))


def test_more_states_than_one_merge_takes(target: Target) -> None:
    states = make_states(520, (1, 2, 3), target.device, dead=0.3)
    assert_merged(merge_states(states), expected(states))


@pytest.mark.parametrize("layout", SHAPES)
def test_one_state_is_its_own_merge(target: Target, layout: str) -> None:
    states = make_states(1, SHAPES[layout], target.device)
    out, lse = merge_states(states)
    assert torch.equal(out, states[0][0])
    assert torch.equal(lse, states[0][1])
    assert out.data_ptr() != states[0][0].data_ptr()


def test_rows_that_no_state_saw_are_zero_and_minus_infinity(target: Target) -> None:
    states = make_states(3, SHAPES["dense"], target.device)
    for out, lse in states:
        out[1, 2], lse[1, :, 2] = NAN, -INF
    out, lse = merge_states(states)
    assert (out[1, 2] == 0).all()
    assert (lse[1, :, 2] == -INF).all()
    assert_merged((out, lse), expected(states))


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("layout", SHAPES)
def test_merge_into_one_of_the_states(target: Target, layout: str, which: int) -> None:
    states = make_states(3, SHAPES[layout], target.device, dead=0.4)
    want = expected(states)
    kept = [(o.clone(), s.clone()) for o, s in states]
    out, lse = merge_states(states, *states[which])
    assert out is states[which][0]
    assert lse is states[which][1]
    assert_merged((out, lse), want)
    for i in {0, 1, 2} - {which}:
        torch.testing.assert_close(states[i], kept[i], rtol=0, atol=0, equal_nan=True)


def test_a_ring_keeps_one_state_and_merges_into_it(target: Target) -> None:
    """Step after step into the same tensors, as context parallelism does, ends where one merge of all does."""
    states = make_states(5, SHAPES["dense"], target.device, dead=0.4)
    want = expected(states)
    running = states[0]
    for state in states[1:]:
        merge_states([running, state], *running)
    assert_merged(running, want)


@pytest.mark.parametrize("given", ["out", "lse"])
def test_out_or_lse_alone(target: Target, given: str) -> None:
    states = make_states(2, SHAPES["dense"], target.device)
    place = torch.full_like(states[0][given == "lse"], NAN)
    got = merge_states(states, **{given: place})
    assert got[given == "lse"] is place
    assert_merged(got, expected(states))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_of_outputs(target: Target, dtype: torch.dtype) -> None:
    states = make_states(4, SHAPES["dense"], target.device, dead=0.3, dtypes=(dtype,))
    out, lse = merge_states(states)
    assert out.dtype == dtype
    assert_merged((out, lse), expected(states))
    wide = merge_states(states, out=torch.empty(SHAPES["dense"], device=target.device))
    assert_merged(wide, expected(states))


@pytest.mark.parametrize(
    ("dtypes", "promoted"),
    [
        ((torch.float32, torch.bfloat16), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
    ],
)
def test_outputs_of_different_dtypes_promote(
    target: Target, dtypes: tuple[torch.dtype, ...], promoted: torch.dtype
) -> None:
    """A float32 running state and the half-precision output of the next step."""
    states = make_states(2, SHAPES["ragged"], target.device, dtypes=dtypes)
    out, lse = merge_states(states)
    assert out.dtype == promoted
    assert_merged((out, lse), expected(states))


def test_any_strides(target: Target) -> None:
    """Inputs, of which the last stride may differ from 1 too, and results with heads before rows."""
    states = make_states(3, SHAPES["dense"], target.device, dead=0.3)
    want = expected(states)
    odd = [
        (torch.nn.functional.pad(states[0][0], (1, 2), value=NAN)[..., 1:-2], states[0][1]),
        (states[1][0].movedim(-1, 0).contiguous().movedim(0, -1), states[1][1]),
        (states[2][0], states[2][1].transpose(1, 2).contiguous().transpose(1, 2)),
    ]
    out = torch.full((2, 4, 3, 8), NAN, device=target.device).transpose(1, 2)
    lse = torch.full((2, 3, 4), NAN, device=target.device).transpose(1, 2)
    assert_merged(merge_states(odd, out, lse), want)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (0, 4, 8)], ids=str)
def test_no_rows_are_an_empty_result(target: Target, shape: tuple[int, ...]) -> None:
    out, lse = merge_states(make_states(2, shape, target.device))
    assert (out.shape, lse.shape) == (shape, lse_shape(shape))


@pytest.mark.parametrize("cuts", [[0, 20], [0, 7, 20], [0, 1, 5, 5, 20]], ids=str)
def test_attention_over_parts_of_the_keys(target: Target, cuts: list[int]) -> None:
    x = make([3, 3], [20, 20], slack=0, device=target.device)
    parts = [flash_attn_func(x.q, x.k[:, a:b], x.v[:, a:b], return_lse=True) for a, b in pairwise(cuts)]
    assert_accurate(x, *merge_states(parts), factor=4.0)


def test_attention_of_a_ragged_batch_over_parts_of_the_keys(target: Target) -> None:
    x = make([3, 1, 4], [12, 12, 12], q_layout="ragged", slack=0, device=target.device)
    assert x.cu_seqlens_q is not None
    parts = [
        flash_attn_varlen_func(x.q, x.k[:, a:b], x.v[:, a:b], x.cu_seqlens_q, None, 4, None, return_lse=True)
        for a, b in ((0, 5), (5, 12))
    ]
    assert_accurate(x, *merge_states(parts), factor=4.0)


def test_pairs_may_be_lists(target: Target) -> None:
    states = make_states(2, SHAPES["ragged"], target.device)
    assert_merged(merge_states(tuple([o, s] for o, s in states)), expected(states))  # type: ignore[misc]


# ---- errors -----------------------------------------------------------------------------------------------

OUT, LSE = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 3)
S = (OUT, LSE)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"states": OUT}, TypeError, "states is a Tensor; it must be a list of (out, lse)"),
    ({"states": None}, TypeError, "states is a NoneType; it must be a list of (out, lse)"),
    ({"states": []}, ValueError, "states is empty; at least one state is needed"),
    ({"states": [S, OUT]}, TypeError, "states[1] is a Tensor; it must be a pair (out, lse)"),
    ({"states": [S, (OUT,)]}, TypeError, "states[1] is a tuple; it must be a pair (out, lse)"),
    ({"states": [(1, LSE)]}, TypeError, "states[0]'s out is a int; it must be a torch.Tensor"),
    ({"states": [S, (None, LSE)]}, TypeError, "states[1]'s out is a NoneType; it must be a torch.Tensor"),
    ({"states": [S, (OUT, None)]}, TypeError, "states[1]'s lse is a NoneType; it must be a torch.Tensor"),
    (
        {"states": [(OUT[0, 0], LSE)]},
        ValueError,
        "states[0]'s out has shape (4, 8); it must be (b, sq, h, d) or (total, h, d)",
    ),
    (
        {"states": [(torch.zeros(2, 3, 4, 257), LSE)]},
        ValueError,
        "states[0]'s out has head dimension 257; it must be 1 to 256",
    ),
    (
        {"states": [(OUT.double(), LSE)]},
        ValueError,
        "states[0]'s out has dtype torch.float64; it must be float16 or bfloat16 or float32",
    ),
    (
        {"states": [S, (OUT, LSE.half())]},
        ValueError,
        "states[1]'s lse has dtype torch.float16; it must be float32",
    ),
    (
        {"states": [S, (OUT[:, :2], LSE)]},
        ValueError,
        "states[1]'s out has shape (2, 2, 4, 8); it must be (2, 3, 4, 8), as states[0] says",
    ),
    (
        {"states": [(OUT, LSE.transpose(1, 2))]},
        ValueError,
        "states[0]'s lse has shape (2, 3, 4); it must be (2, 4, 3), as states[0] says",
    ),
    (
        {"states": [S, (OUT, LSE.to("meta"))]},
        ValueError,
        "states[1]'s lse is on meta; it must be on states[0]'s cpu",
    ),
    ({"out": 1}, TypeError, "out is a int; it must be a torch.Tensor"),
    (
        {"out": OUT[0]},
        ValueError,
        "out has shape (3, 4, 8); it must be (2, 3, 4, 8), as states[0] says",
    ),
    (
        {"out": OUT.int()},
        ValueError,
        "out has dtype torch.int32; it must be float16 or bfloat16 or float32",
    ),
    ({"out": OUT.to("meta")}, ValueError, "out is on meta; it must be on states[0]'s cpu"),
    (
        {"out": torch.zeros(2, 3, 8, 4).transpose(2, 3)},
        ValueError,
        "out has last stride 4; its last dimension must be contiguous",
    ),
    (
        {"out": torch.zeros(1, 3, 4, 8).expand(2, 3, 4, 8)},
        ValueError,
        "out is expanded (a stride is 0); every element needs its own place",
    ),
    ({"lse": [0.0]}, TypeError, "lse is a list; it must be a torch.Tensor"),
    (
        {"lse": torch.zeros(2, 3, 4)},
        ValueError,
        "lse has shape (2, 3, 4); it must be (2, 4, 3), as states[0] says",
    ),
    ({"lse": LSE.double()}, ValueError, "lse has dtype torch.float64; it must be float32"),
    ({"lse": LSE.to("meta")}, ValueError, "lse is on meta; it must be on states[0]'s cpu"),
    (
        {"lse": torch.zeros(1, 4, 3).expand(2, 4, 3)},
        ValueError,
        "lse is expanded (a stride is 0); every element needs its own place",
    ),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad[2][:40])
def test_bad_arguments(bad: tuple[dict[str, Any], type[Exception], str]) -> None:
    changes, kind, message = bad
    place = torch.full((2, 3, 4, 8), 7.0)
    with pytest.raises(kind) as error:
        merge_states(**{"states": [S, S], "out": place, **changes})
    assert str(error.value) == f"merge_states: {message}"
    assert (place == 7.0).all()


@pytest.mark.parametrize("which", ["states[1]'s out", "states[0]'s lse", "out"])
def test_gradients_are_refused_with_grad_mode_alone(which: str) -> None:
    states = make_states(2, SHAPES["dense"])
    learnt = {
        "states[1]'s out": states[1][0],
        "states[0]'s lse": states[0][1],
        "out": torch.zeros(SHAPES["dense"]),
    }[which].requires_grad_()
    out = learnt if which == "out" else None
    with pytest.raises(NotImplementedError) as error:
        merge_states(states, out)
    assert str(error.value).startswith(f"merge_states: {which} requires a gradient")
    with torch.no_grad():
        assert_merged(merge_states(states, out), expected(states))
