"""A cache that is appended to, rotated, picked from, padded and masked."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from headfold import append
from tests.cases import NAN, assert_accurate, make
from tests.conftest import CPU, Target
from tests.interface.functions import kvcache
from tests.interface.steps import STEPS, step
from tests.interface.tensors import bits, ints, placed, rand


@pytest.mark.parametrize("case", STEPS.values(), ids=STEPS)
def test_an_append_then_attends_to_what_it_wrote(target: Target, case: dict[str, Any]) -> None:
    s = step(device=target.device, **case)
    caches, expected = s.caches(), s.caches()
    new = {n: s.tensors.get(n) for n in ("cu_seqlens_k_new", "page_table", "cache_batch_idx")}
    t = s.tensors
    append.reference_append(
        append.AppendInputs(
            **expected, k=t["k"], v=t["v"], cache_seqlens=t["cache_seqlens"], **new, **s.rotary
        )
    )
    untouched = {n: x.clone() for n, x in t.items()}
    out, lse = s.run(**caches)
    torch.testing.assert_close(caches, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(bits(caches["v_cache"]), bits(expected["v_cache"]))
    for name, value in untouched.items():
        assert torch.equal(bits(t[name]), bits(value)), f"{name} was written"
    assert_accurate(s.inputs(caches), out, lse)
    after, lse_after = s.run_after(caches)
    if s.rotary:
        # Without an append the attention itself rotates q, in another program.
        assert_accurate(s.inputs(caches), after, lse_after)
    else:
        assert torch.equal(out, after)
        assert torch.equal(lse, lse_after)


def test_an_append_writes_into_out(target: Target) -> None:
    s = step([5, 17], [2, 2], target.device, causal=True)
    expected, _ = s.run(**s.caches())
    out = torch.full_like(expected, NAN)
    got, _ = s.run(**s.caches(), out=out)
    assert got is out
    assert torch.equal(out, expected)
    assert torch.equal(s.run(**s.caches(), return_softmax_lse=False), expected)


@pytest.mark.parametrize("page_size", [0, 4])
def test_one_length_for_all_is_as_good_as_a_tensor_of_it(target: Target, page_size: int) -> None:
    s = step([7, 7], [2, 2], target.device, page_size=page_size, rotary_dim=16, leftpad=[0, 3], causal=True)
    caches, again = s.caches(), s.caches()
    out, lse = s.run(**caches)
    one, one_lse = s.run(**again, cache_seqlens=7)
    assert torch.equal(out, one)
    assert torch.equal(lse, one_lse)
    assert all(torch.equal(bits(caches[n]), bits(again[n])) for n in caches)
    # Without new keys too, where a dense cache may be a shorter view: another plan, the same meaning.
    for rotary in (s.rotary, {}):
        read = dataclasses.replace(s, rotary=rotary)
        assert_accurate(read.inputs(caches), *read.run_after(caches, cache_seqlens=9))


def pack(tree: torch.Tensor) -> torch.Tensor:
    """Bits of the last dimension, least significant first."""
    padded = torch.nn.functional.pad(tree.byte(), (0, -tree.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8, device=tree.device)).sum(-1, dtype=torch.uint8)


@pytest.mark.parametrize("ragged_q", [False, True])
@pytest.mark.parametrize("sq", [1, 3, 8, 9])
def test_a_tree_of_bits_is_a_tree_of_bools(target: Target, sq: int, ragged_q: bool) -> None:
    tree = torch.rand(2, sq, sq, generator=torch.Generator().manual_seed(1)) < 0.5
    s = step([4, 11], [sq, sq], target.device, sq=sq, ragged_q=ragged_q, tree_mask=tree)
    caches = s.caches()
    out, lse = s.run(**caches)
    assert_accurate(s.inputs(caches), out, lse)
    packed, packed_lse = s.run(**s.caches(), tree_mask=pack(s.options["tree_mask"]))
    assert torch.equal(out, packed)
    assert torch.equal(lse, packed_lse)


def test_a_tree_over_all_keys_there_are(target: Target) -> None:
    """More queries than keys: the first queries of the tree have none of their own."""
    tree = torch.ones(2, 3, 3, dtype=torch.bool).tril()
    s = step([0, 1], [1, 1], target.device, sq=3, tree_mask=tree)
    caches = s.caches()
    assert_accurate(s.inputs(caches), *s.run(**caches))


def test_a_window_of_an_append_may_be_a_tensor(target: Target) -> None:
    s = step([5, 17], [2, 2], target.device, rotary_dim=16, window_size=(6, 1))
    out, lse = s.run(**s.caches())
    again, lse_again = s.run(**s.caches(), window_size=torch.tensor([6, 1]))
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)


@pytest.mark.parametrize("length", [9, None])
def test_a_padded_cache_without_a_tensor_of_lengths(target: Target, length: int | None) -> None:
    x = make([2, 2], [9, 9], slack=0, causal=True, device=target.device)
    pads = torch.tensor([3, 9], dtype=torch.int32, device=target.device)
    padded = dataclasses.replace(x, cache_leftpad=pads)
    assert_accurate(padded, *kvcache(x, causal=True, cache_seqlens=length, cache_leftpad=pads))


def test_several_sequences_may_read_one_row(target: Target) -> None:
    x = make([1, 1], [9, 9], slack=0, device=target.device)
    rows = torch.tensor([1, 1], dtype=torch.int32, device=target.device)
    out, lse = kvcache(x, cache_batch_idx=rows)
    assert_accurate(dataclasses.replace(x, cache_batch_idx=rows), out, lse)


def test_a_call_without_new_keys_rotates_the_queries_alone(target: Target) -> None:
    s = step([5, 17], [0, 0], target.device, rotary_dim=12, interleaved=False, causal=True)
    caches = s.caches()
    out, lse = s.run(**caches, k=None, v=None)
    assert_accurate(s.inputs(caches), out, lse)
    assert all(torch.equal(bits(caches[n]), bits(s.tensors[n])) for n in caches)


# (message, how the step is made, what is then wrong with it)
REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "no room": (r"cache_seqlens \[1\] is 23; sequence 1 gets 2", {"starts": [5, 23]}, {}),
    "no page": (
        r"page_table \[0, 1\] is 77; a page index must be 0 to 11",
        {"page_size": 4},
        {"page_table": ints(0, 77, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11).view(2, 6)},
    ),
    "one page for two": (
        r"page_table \[1, 4\] is 1; sequence 0 is appended to the same page",
        {"page_size": 4},
        {"page_table": ints(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 11).view(2, 6)},
    ),
    "one row for two": (r"cache_batch_idx \[1\] is 0; sequence 0 is appended to", {"rows": [0, 0]}, {}),
    "no row": (
        r"cache_batch_idx \[0\] is 9; a row must be 0 to 1",
        {"rows": [0, 1]},
        {"cache_batch_idx": ints(9, 0)},
    ),
    "no angle": (
        r"rotary_cos has 18 positions; the queries of sequence 1 are rotated at 17 to 18",
        {"rotary_dim": 16},
        {"rotary_cos": rand(18, 8), "rotary_sin": rand(18, 8)},
    ),
    "no angle for new keys": (
        r"rotary_cos has 18 positions; sequence 1 is rotated at 17 to 18",
        {"rotary_dim": 16, "sq": 1},
        {"rotary_cos": rand(18, 8), "rotary_sin": rand(18, 8)},
    ),
    "padding": (
        r"cache_leftpad \[0\] is 6; that sequence has room for 0 to 5",
        {},
        {"cache_leftpad": ints(6, 0)},
    ),
    "offsets": (
        r"cu_seqlens_k_new \[2\] is 5; k has 4 tokens",
        {"ragged_new": True},
        {"cu_seqlens_k_new": ints(0, 2, 5)},
    ),
}


@pytest.mark.parametrize(("message", "case", "changes"), REFUSED.values(), ids=REFUSED)
def test_an_append_refused_for_its_values_changes_no_byte(
    target: Target,
    message: str,
    case: dict[str, Any],
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    s = step(**{"starts": [5, 17], "counts": [2, 2], "causal": True, **case}, device=target.device)
    caches = s.caches()
    out = torch.full((*s.tensors["q"].shape[:-1], 8), NAN, device=target.device)
    with pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"):
        s.run(**{**caches, **placed(changes, target.device), "out": out})
    assert all(torch.equal(bits(caches[n]), bits(s.tensors[n])) for n in caches)
    assert out.isnan().all()


@pytest.mark.parametrize("case", ["paged, ragged new and ragged queries", "everything"])
def test_valid_appends_run_under_value_checks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    s = step(device="cpu", **STEPS[case])
    with CPU.running():
        out, _ = s.run(**s.caches())
    assert not out.isnan().any()
