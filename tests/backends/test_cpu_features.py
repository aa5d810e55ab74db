"""Every feature that Inputs can ask of the CPU backend: alone, in any combination, and what it costs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headfold import reference
from headfold.backends import cpu_blocks, cpu_scores
from headfold.problem import Inputs, problem_of
from tests.backends.featured import FEATURES, alone, featured, poison_unseen
from tests.backends.running import DTYPES, attend, check, either_form, kv_bytes_of, peak_bytes, plan_for
from tests.cases import make

INF = float("inf")
QUERIES = {"decode": [1, 2], "prefill": [90, 70]}

# ---- results ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", QUERIES)
@pytest.mark.parametrize("kv_layout", ["dense", "ragged", "paged"])
@pytest.mark.parametrize("q_layout", ["dense", "ragged"])
@pytest.mark.parametrize("name", FEATURES)
def test_each_feature(name: str, q_layout: str, kv_layout: str, form: str) -> None:
    for seed, dtype in enumerate(DTYPES):
        x = featured(
            [name],
            QUERIES[form],
            [130, 75],
            heads=6,
            d=32,
            dtype=dtype,
            q_layout=q_layout,
            kv_layout=kv_layout,
            window=(-1, 0),
            seed=seed,
        )
        check(x)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_any_combination_is_accurate(data: st.DataObject) -> None:
    """Features x layouts x ratios x lengths x windows x dtypes, by the automatic plan and finely cut ones."""
    draw = data.draw
    names = draw(st.lists(st.sampled_from(list(FEATURES)), min_size=1, max_size=5, unique=True))
    if "bool_mask" in names and "added_mask" in names:
        names.remove("bool_mask")
    names.sort(key=list(FEATURES).index)
    batch = draw(st.integers(1, 3))
    sides = st.sampled_from([-1, -1, 0, 3, 30, 500])
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    q_lens = st.lists(st.sampled_from([0, 1, 1, 2, 7, 40, 80]), min_size=batch, max_size=batch)
    k_lens = st.lists(st.sampled_from([0, 1, 19, 64, 130]), min_size=batch, max_size=batch)
    same = draw(st.booleans())  # dense batches without lengths go several sequences a call
    x = featured(
        names,
        draw(q_lens.map(lambda n: n[:1] * batch) if same else q_lens),
        draw(k_lens.map(lambda n: n[:1] * batch) if same else k_lens),
        heads=kv_heads * draw(st.sampled_from([1, 3, 4, 5, 7, 12])),
        kv_heads=kv_heads,
        d=draw(st.sampled_from([1, 16, 33, 64])),
        dv=draw(st.sampled_from([None, None, None, 8, 80])),
        dtype=draw(st.sampled_from(DTYPES)),
        q_layout=draw(st.sampled_from(["dense", "ragged"])),
        kv_layout=draw(st.sampled_from(["dense", "ragged", "paged"])),
        page_size=draw(st.sampled_from([1, 3, 16, 19])),
        window=(draw(sides), draw(sides)),
        bottom_right=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, None, 0.0, -0.3])),
        slack=draw(st.sampled_from([0, 0, 3])),
        seed=draw(st.integers(0, 2**16)),
        num_splits=draw(st.sampled_from([0, 0, 1, 4])),
    )
    if problem_of(x).is_empty:
        return
    changes = draw(st.sampled_from([{}, *either_form()]))
    check(x, **changes)


def test_a_key_that_another_sequence_sees_may_hold_nan() -> None:
    """Sequences of equal lengths go a call together; two trees of three hide the newest key."""
    x = make([1, 1, 1], [3, 3, 3], heads=2, d=8, slack=0)
    assert x.seqused_k is None
    x.tree_mask = torch.tensor([False, False, True]).reshape(3, 1, 1)
    poison_unseen(x)
    assert x.v[:2, 2].isnan().all()
    check(x, num_splits=1, num_stages=3)


def test_a_key_that_another_head_sees_may_hold_nan() -> None:
    x = make([2], [5], heads=4, kv_heads=2, d=8)
    x.mask = torch.ones(1, 4, 2, x.k.shape[1], dtype=torch.bool)
    x.mask[:, :2, :, 3] = False
    assert not attend(x)[0].isnan().any()
    expected = attend(x)
    x.k[:, 3, 0], x.v[:, 3, 0] = float("nan"), float("nan")
    for got, was in zip(attend(x), expected, strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["softcap", "slopes", "added_mask", "tree"])
@pytest.mark.parametrize("sq", [1, 600])
def test_more_than_one_block_of_rows_and_keys(name: str, sq: int) -> None:
    check(featured([name], [sq], [2500], heads=4, kv_heads=1, dtype=torch.bfloat16, window=(-1, 0), seed=1))


@pytest.mark.parametrize("group", [1, 3, 32, 256])
@pytest.mark.parametrize("name", ["softcap", "slopes"])
def test_every_group(name: str, group: int) -> None:
    check(featured([name], [1, 3], [700, 33], heads=group, kv_heads=1, d=64, dtype=torch.bfloat16))


# ---- single rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["sink"], ["sink", "softcap"], ["sink", "bool_mask"]])
def test_a_row_without_a_key_has_the_sink_as_lse(names: list[str]) -> None:
    x = featured(names, [40, 40], [7, 0], window=(-1, 0))
    out, lse = attend(x)
    assert x.sink is not None
    for i, sk in enumerate([7, 0]):
        dead = ~reference.mask_of(x, i, 40, sk)[0].expand(4, 40, sk).any(-1)
        assert dead.any()
        assert (out[i].transpose(0, 1)[dead] == 0).all()
        assert torch.equal(lse[i][dead], x.sink.float().unsqueeze(1).expand(4, 40)[dead])


@pytest.mark.parametrize("changes", [{}, *either_form()])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_a_sink_of_minus_infinity_is_none(softcap: float, changes: dict[str, Any]) -> None:
    x = dataclasses.replace(make([9, 40], [20, 7], causal=True), softcap=softcap)
    plan = plan_for(x, **changes)
    with_sink = dataclasses.replace(x, sink=torch.full((4,), -INF))
    for got, want in zip(attend(with_sink, plan), attend(x, plan), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_a_mask_of_the_lowest_finite_numbers_does_not_hide() -> None:
    """The lowest number of a dtype is what some models mask with: rows of nothing else are still a mean."""
    x = make([2], [40], slack=0)
    x.mask = torch.full((1, 4, 2, 40), torch.finfo(torch.float32).min)
    out, _ = attend(x)
    torch.testing.assert_close(out, x.v.mean(1, keepdim=True).repeat_interleave(2, 2).expand_as(out))


def test_nothing_is_read_past_the_lengths_in_a_mask() -> None:
    for name in ("bool_mask", "added_mask"):
        x = featured([name], [3, 90], [40, 130])
        assert x.mask is not None
        held = x.mask.clone()
        for i, (sq, sk) in enumerate([(3, 40), (90, 130)]):
            held[i, :, sq:], held[i, ..., sk:] = (True, True) if name == "bool_mask" else (INF, INF)
        for got, want in zip(attend(dataclasses.replace(x, mask=held)), attend(x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("rotary_dtype", [torch.float32, torch.bfloat16])
def test_queries_are_not_changed_by_rotary(rotary_dtype: torch.dtype) -> None:
    x = featured(["rotary"], [3, 3], [40, 40], dtype=rotary_dtype, slack=0)
    before = x.q.clone()
    check(x)
    assert torch.equal(x.q, before)


# ---- the same bits ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_bits_of_a_sequence_do_not_depend_on_its_batch(data: st.DataObject) -> None:
    draw = data.draw
    names = draw(
        st.lists(st.sampled_from(["softcap", "sink", "chunk", "added_mask", "tree", "rotary"]), unique=True)
    )
    q_layout, kv_layout = (draw(st.sampled_from(["dense", "ragged"])) for _ in range(2))
    q_lens = draw(st.lists(st.sampled_from([1, 2, 5, 70, 200]), min_size=2, max_size=4))
    k_lens = draw(st.lists(st.sampled_from([1, 60, 300, 900]), min_size=len(q_lens), max_size=len(q_lens)))
    x = featured(
        [*names, "fixed_splits"],
        q_lens,
        k_lens,
        heads=8,
        d=draw(st.sampled_from([16, 33, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        q_layout=q_layout,
        kv_layout=kv_layout,
        window=(draw(st.sampled_from([-1, 40])), draw(st.sampled_from([-1, 0]))),
        seed=draw(st.integers(0, 2**16)),
    )
    x.tokens_per_split = draw(st.sampled_from([64, 100, 512]))
    out, lse = attend(x)
    for i, n in enumerate(q_lens):
        own_out, own_lse = attend(alone(x, i))
        if x.cu_seqlens_q is None:
            assert torch.equal(own_out[0, :n], out[i, :n])
            assert torch.equal(own_lse[0, :, :n], lse[i, :, :n])
        else:
            rows = slice(int(x.cu_seqlens_q[i]), int(x.cu_seqlens_q[i]) + n)
            assert torch.equal(own_out[:n], out[rows])
            assert torch.equal(own_lse[:, :n], lse[:, rows])


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_of_equal_sequences_do_not_depend_on_their_number(threads: int) -> None:
    """Dense sequences without lengths could go into one call, but two threads cut a call by all that is in it."""
    torch.set_num_threads(threads)
    for sq, heads, kv_heads, dtype in ((1, 1, 1, torch.float32), (64, 8, 2, torch.bfloat16)):
        x = make([sq] * 9, [128] * 9, heads=heads, kv_heads=kv_heads, d=64, dtype=dtype, slack=0)
        x.tokens_per_split = 128
        out, lse = attend(x)
        for i in (0, 4):
            own_out, own_lse = attend(alone(x, i))
            assert torch.equal(own_out[0], out[i])
            assert torch.equal(own_lse[0], lse[i])


@pytest.mark.parametrize("names", [["softcap"], ["leftpad"], ["added_mask", "leftpad"], ["fixed_splits"]])
@pytest.mark.parametrize("sq", [1, 70])
def test_paged_gives_the_bits_of_dense(sq: int, names: list[str]) -> None:
    paged = featured(names, [sq], [600], d=64, dtype=torch.bfloat16, kv_layout="paged", page_size=16, seed=3)
    assert paged.page_table is not None
    pages = paged.page_table[0, : -(-600 // 16)].long()
    dense = dataclasses.replace(
        paged,
        k=paged.k[pages].flatten(0, 1).unsqueeze(0),
        v=paged.v[pages].flatten(0, 1).unsqueeze(0),
        page_table=None,
    )
    for got, want in zip(attend(paged), attend(dense), strict=True):
        assert torch.equal(got, want)


# ---- what runs and what it holds --------------------------------------------------------------------------


@pytest.mark.parametrize("sq", [1, 300])
def test_plain_calls_do_not_go_block_by_block(sq: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("entered")

    monkeypatch.setattr(cpu_blocks, "attend", refuse)
    for names in ([], ["sink"], ["chunk"], ["rotary"], ["leftpad", "batch_idx"]):
        attend(featured(names, [sq], [400], window=(-1, 0)))
    with pytest.raises(AssertionError, match="entered"):
        attend(featured(["softcap"], [sq], [400]))


@pytest.mark.parametrize("name", ["slopes", "bool_mask", "added_mask", "tree", "fixed_splits"])
def test_only_a_softcap_needs_scores_of_our_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_blocks, "score_state", None)
    x = featured([name], [2], [40])
    check(x)
    with pytest.raises(TypeError):
        check(dataclasses.replace(x, softcap=1.0))
    assert callable(cpu_scores.score_state)


def _mask_bytes(x: Inputs) -> int:
    return x.batch * x.q.shape[-2] * x.q.shape[1] * x.k.shape[1] * 4


# Every pair of a feature, a layout and a dtype.
@pytest.mark.parametrize(
    ("name", "kv_layout", "dtype"),
    [
        (name, ("dense", "ragged", "paged")[(i + j) % 3], dtype)
        for i, name in enumerate(("softcap", "slopes", "added_mask", "fixed_splits"))
        for j, dtype in enumerate(DTYPES)
    ],
)
def test_decode_holds_a_tenth_of_the_cache_at_most(name: str, kv_layout: str, dtype: torch.dtype) -> None:
    """The cache is 25 to 50 MB; float32 copies of it block by block are a few."""
    x = make([1, 1], [30000, 20000], heads=8, d=128, dtype=dtype, kv_layout=kv_layout)
    FEATURES[name](x, torch.Generator().manual_seed(0))
    x.tokens_per_split = min(x.tokens_per_split, 1) * 1000
    held = 0 if x.mask is None else x.mask.shape[-1] * 8
    assert peak_bytes(x, plan_for(x)) < kv_bytes_of(x) / 10 + held


@pytest.mark.parametrize("name", ["softcap", "slopes", "bool_mask", "added_mask"])
def test_prefill_never_makes_a_mask_of_full_size(name: str) -> None:
    x = make([1000], [4000], heads=16, kv_heads=4, d=64, dtype=torch.bfloat16, slack=0)
    FEATURES[name](x, torch.Generator().manual_seed(0))
    out = 4 * x.q.numel()
    assert peak_bytes(x, plan_for(x)) < _mask_bytes(x) / 4 + 2 * out
