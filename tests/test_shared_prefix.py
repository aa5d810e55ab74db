"""Prefixes that sequences share: the meaning of the same call without the promise, whatever is asked besides."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, note, seed, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import headfold
from headfold import backends, prepared, shared_prefix
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate
from tests.conftest import CPU, TARGETS, Target
from tests.interface.tensors import bits
from tests.sharing import SharedCall, keys_past_a_prefix, shared_call

DRAWN = int(os.environ.get("HEADFOLD_EXAMPLES", "0"))
SEED = int(os.environ.get("HEADFOLD_SEED", random.randrange(2**32)))


@pytest.fixture(autouse=True)
def sharing() -> Iterator[None]:
    """Whether it pays or not, and with nothing kept from other tests."""
    forget()
    with shared_prefix.force(True):
        yield
    forget()


def forget() -> None:
    shared_prefix._kept.clear()
    shared_prefix._made.clear()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The inputs of every attention that calls within come to."""
    calls: list[Inputs] = []
    attend = shared_prefix.attend

    def record(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
        calls.append(x)
        attend(x, out, lse)

    monkeypatch.setattr(shared_prefix, "attend", record)
    return calls


def check(call: SharedCall, **promise: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Into a result full of NaN: accurate, and the caches those of the same call without the promise."""
    caches = call.caches()
    out = torch.full((*call.tensors["q"].shape[:-1], call.tensors["v_cache"].shape[-1]), NAN)
    out = out.to(call.tensors["q"])
    got, lse = call.run(**caches, **(promise or call.promise), out=out)
    assert got is out
    if call.appended:
        plain = call.caches()
        call.run(**plain)
        assert all(torch.equal(bits(caches[n]), bits(plain[n])) for n in caches)
    assert_accurate(call.inputs(**caches), out, lse, factor=3.0 if call.options["softcap"] else 2.0)
    return out, lse


@st.composite
def calls(draw: st.DrawFn, target: Target) -> SharedCall:
    """Any call that a prefix can be shared in: groups x pages x layout of q x features x ratio x dtype."""
    small = target.name == "interpreted"
    page_size = draw(st.sampled_from([1, 3, 16]))
    most_pages = (20 if small else 200) // page_size + 1
    group = st.tuples(st.integers(1, 3 if small else 4), st.integers(0, most_pages))
    groups = draw(st.lists(group, min_size=1, max_size=2 if small else 3))
    batch = sum(n for n, _ in groups)
    ragged_q, tree = draw(st.booleans()), draw(st.booleans())
    append = not ragged_q and draw(st.booleans())
    causal = draw(st.booleans())
    right = draw(st.sampled_from([None, None, 0, 2, 30]))
    most = draw(st.sampled_from([1, 1, 3, 4 if small else 40]))
    q_lens = [draw(st.integers(0, most)) for _ in range(batch)] if ragged_q else [most] * batch
    own = []
    for n in q_lens:
        least = max(keys_past_a_prefix(n, causal, right, tree), n if append else 0)
        own.append(least + draw(st.integers(0, 20 if small else 60)))
    kv_heads, ratio = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3] if small else [1, 2, 3, 5, 8]))
    d, dv = draw(st.sampled_from([(16, 16), (24, 8), (64, 64), (40, 72)]))
    options = {
        "page_size": page_size,
        "heads": kv_heads * ratio,
        "kv_heads": kv_heads,
        "d": d,
        "dv": dv,
        "dtype": draw(st.sampled_from(target.dtypes)),
        "ragged_q": ragged_q,
        "spare_rows": draw(st.sampled_from([0, 3])) if ragged_q else 0,
        "append": append,
        "rotary": append and draw(st.booleans()),
        "sink": draw(st.booleans()),
        "tree": tree,
        "causal": causal,
        "right": right,
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.2])),
        "num_splits": draw(st.sampled_from([0, 0, 1, 3])),
        "tokens_per_split": draw(st.sampled_from([None, None, 20, 64])),
        "pack_gqa": draw(st.sampled_from([None, None, False])),
        "seed": draw(st.integers(0, 2**20)),
    }
    note(f"{groups} q={q_lens} own={own} {options}")
    return shared_call(groups, q_lens, own, device=target.device, **options)


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name, indirect=True)
def test_any_shared_call_is_accurate(target: Target, capsys: pytest.CaptureFixture[str]) -> None:
    """The seed is fresh every time and printed; HEADFOLD_SEED repeats a run, HEADFOLD_EXAMPLES draws more."""
    count = 0
    examples = DRAWN or {"cpu": 80, "interpreted": 12, "gpu": 200}[target.name]

    @seed(SEED)
    @settings(max_examples=examples, database=None)
    @given(calls(target))
    def walk(call: SharedCall) -> None:
        nonlocal count
        count += 1
        check(call)

    walk()
    with capsys.disabled():
        print(f"\n{target.name}: {count} drawn calls, seed {SEED}")
    assert count >= examples // 2


def step(**options: Any) -> SharedCall:
    """Six sequences in groups of 3, 1 and 2."""
    groups, own = [(3, 4), (1, 2), (2, 1)], [1, 7, 9, 5, 12, 3]
    return shared_call(groups, options.pop("q_lens", [1] * 6), own, **options)


def test_shared_pages_are_read_once_a_group(target: Target, attended: list[Inputs]) -> None:
    """A group's queries are one sequence over its pages; the rest goes to each sequence's own part, sinks too."""
    call = step(device=target.device, dtype=target.dtypes[-1], sink=True, causal=True)
    check(call)
    shared, own = attended
    table = call.tensors["page_table"]
    assert shared.cu_seqlens_q is not None
    assert shared.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert shared.page_table is not None
    assert torch.equal(shared.page_table, table[[0, 3, 4], :4])
    assert shared.seqused_k is not None
    assert shared.seqused_k.tolist() == [16, 0, 4]
    assert (shared.sink, shared.window_right, shared.max_seqlen_q) == (None, -1, 3)
    assert own.cache_leftpad is not None
    assert own.cache_leftpad.tolist() == [16, 16, 16, 0, 4, 4]
    assert own.sink is call.tensors["learnable_sink"]
    assert (own.page_table, own.window_right) == (table, 0)


def test_queries_of_a_group_are_counted_on_the_device(attended: list[Inputs]) -> None:
    call = step(q_lens=[1, 0, 3, 2, 0, 4], ragged_q=True, spare_rows=5)
    check(call)
    shared, _ = attended
    assert shared.cu_seqlens_q is not None
    assert shared.cu_seqlens_q.tolist() == [0, 4, 6, 10]
    assert shared.max_seqlen_q == 3 * 4
    del call.options["max_seqlen_q"]
    check(call)
    assert attended[2].max_seqlen_q == 15


def test_equal_groups_take_a_view_of_the_page_table(attended: list[Inputs]) -> None:
    call = shared_call([(2, 3), (2, 1)], [2] * 4, [2, 3, 4, 5], causal=True)
    check(call)
    assert attended[0].page_table is not None
    assert attended[0].page_table.data_ptr() == call.tensors["page_table"].data_ptr()
    assert attended[0].page_table.tolist() == call.tensors["page_table"][::2, :3].tolist()
    assert attended[0].q.data_ptr() == call.tensors["q"].data_ptr()


@pytest.mark.parametrize("sizes", [(17,), (1, 1, 1, 1, 17)])
def test_more_rows_than_one_tile(target: Target, sizes: tuple[int, ...], attended: list[Inputs]) -> None:
    """A group's rows fill several tiles; groups of other sizes are packed and find theirs by bisection."""
    n = sum(sizes)
    options = {"heads": 8, "kv_heads": 1, "dtype": target.dtypes[-1], "device": target.device}
    check(shared_call([(size, 2) for size in sizes], [1] * n, [1 + i % 5 for i in range(n)], **options))
    p, plan = backends.plan_of(attended[0])
    if plan.backend == "triton":
        assert plan.tiles > len(sizes)
        assert (plan.tiles_per_sequence == 0) == (len(set(sizes)) > 1)
    assert p.total_q == n


def test_one_length_and_one_group_are_the_default(target: Target, attended: list[Inputs]) -> None:
    call = shared_call([(4, 2)], [1] * 4, [3, 1, 9, 4], device=target.device)
    out, lse = check(call)
    for promise in (
        {"shared_prefix_len": 8},
        {"shared_prefix_len": [8], "shared_prefix_groups": None},
        {"shared_prefix_len": 8, "shared_prefix_groups": (4,)},
    ):
        again, lse_again = call.run(**promise)
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
    assert len(attended) == 8
    # A length below what is shared is a promise that holds too.
    check(call, shared_prefix_len=4)
    check(call, shared_prefix_len=4, shared_prefix_groups=[1, 3])


def test_a_new_result_and_a_given_one_hold_the_same_bits(target: Target) -> None:
    call = shared_call([(2, 1)], [1, 1], [1, 7], device=target.device)
    out, lse = check(call)
    again, lse_again = call.run(**call.promise)
    assert torch.equal(again, out)
    assert torch.equal(lse_again, lse)
    assert (again.stride(), lse_again.stride()) == (out.stride(), lse.stride())
    assert torch.equal(call.run(**call.promise, return_softmax_lse=False), out)  # type: ignore[arg-type]
    odd = torch.full((*out.shape[:-1], out.shape[-1] + 3), NAN, device=out.device)[..., 1:-2]
    call.run(**call.promise, out=odd)
    assert torch.equal(odd, out)


def test_lengths_may_be_one_int_and_splits_decided_ahead(target: Target, attended: list[Inputs]) -> None:
    call = shared_call([(3, 2)], [1] * 3, [6] * 3, causal=True, device=target.device)
    out, lse = check(call)
    one, lse_one = call.run(**call.promise, cache_seqlens=14)
    assert torch.equal(one, out)
    assert torch.equal(lse_one, lse)
    planned = headfold.get_scheduler_metadata(
        3, 1, 16, 4, 2, 16, call.tensors["cache_seqlens"], torch.float32, 8, page_size=4, num_splits=2
    )
    call.options["scheduler_metadata"] = planned
    check(call)
    assert [x.num_splits for x in attended] == [0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("q", ["heads first", "inside longer rows", "expanded"])
def test_queries_may_have_any_strides(target: Target, q: str) -> None:
    call = shared_call([(3, 2), (1, 1)], [2] * 4, [2, 5, 3, 9], causal=True, device=target.device)
    t = call.tensors["q"]
    call.tensors["q"] = {
        "heads first": lambda: t.transpose(1, 2).contiguous().transpose(1, 2),
        "inside longer rows": lambda: torch.nn.functional.pad(t, (1, 2))[..., 1:-2],
        "expanded": lambda: t[:1].expand_as(t),
    }[q]()
    check(call)


def test_a_prefix_may_be_the_whole_sequence(target: Target) -> None:
    """Nothing of its own is left to some sequence: its own part sees no key, or the sink alone."""
    for sink in (False, True):
        check(shared_call([(3, 2)], [1] * 3, [0, 0, 5], causal=True, sink=sink, device=target.device))
        check(shared_call([(2, 3)], [2] * 2, [0, 0], sink=sink, device=target.device))


@pytest.mark.parametrize("ragged_q", [False, True])
def test_nothing_to_compute(target: Target, ragged_q: bool, attended: list[Inputs]) -> None:
    """No sequence, no query, a prefix of 0: one attention, as without the promise, and for 0 alone that very call."""
    for groups, q_lens, own in (([], [], []), ([(2, 1)], [0, 0], [3, 3]), ([(2, 0)], [1, 1], [3, 3])):
        call = shared_call(groups, q_lens, own, ragged_q=ragged_q, device=target.device)
        check(call)
        check(call, shared_prefix_len=0)
    assert all(x.cache_leftpad is None for x in attended)
    assert len(attended) == 3


def test_sequences_of_no_length_leave_the_others_alone(target: Target) -> None:
    """Padding of a batch breaks the promise: its rows mean nothing, and the others what they should."""
    call = shared_call([(4, 2)], [1] * 4, [3, 1, 9, 4], causal=True, device=target.device)
    out, lse = check(call)
    call.tensors["cache_seqlens"][2] = 0
    call.tensors["page_table"][2] = 0
    padded, lse_padded = call.run(**call.promise)
    kept = [0, 1, 3]
    assert torch.allclose(padded[kept], out[kept], atol=1e-5)
    assert torch.allclose(lse_padded[kept], lse[kept], atol=1e-5)


# What makes a query's view of the prefix its own, or the prefix another's.
ALONE: dict[str, Any] = {
    "left window": lambda call: {"window_size": (9, None)},
    "attention_chunk": lambda call: {"attention_chunk": 7},
    "alibi_slopes": lambda call: {"alibi_slopes": torch.rand(4, device=call.tensors["q"].device)},
    "cache_leftpad": lambda call: {"cache_leftpad": call.tensors["cache_seqlens"] // 2},
    "cache_batch_idx": lambda call: {
        "cache_batch_idx": torch.arange(5, -1, -1, dtype=torch.int32, device=call.tensors["q"].device),
        "page_table": call.tensors["page_table"].flip(0),
    },
    "rotation of q": lambda call: {
        "rotary_cos": torch.rand(60, 4, device=call.tensors["q"].device),
        "rotary_sin": torch.rand(60, 4, device=call.tensors["q"].device),
    },
}


@pytest.mark.parametrize("name", ALONE)
def test_what_makes_sharing_impossible_reads_pages_once_a_sequence(
    target: Target, name: str, attended: list[Inputs], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits of the same call without the promise, which is checked all the same."""
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    call = step(device=target.device)
    more = ALONE[name](call)
    out, lse = call.run(**more, **call.promise)
    assert len(attended) == 1
    plain, plain_lse = call.run(**more)
    assert torch.equal(out, plain)
    assert torch.equal(lse, plain_lse)
    with pytest.raises(ValueError, match="shared_prefix_len is 15; it must be a multiple"):
        call.run(**more, shared_prefix_len=15)


def test_it_is_done_where_it_pays_alone(attended: list[Inputs]) -> None:
    """What the planner says: a small call is one attention, a large one two."""
    small = step()
    large = shared_call([(8, 512)], [1] * 8, [1] * 8, page_size=16, d=128, dv=128, dtype=torch.bfloat16)
    with shared_prefix.force(False):
        check(small)
    shared_prefix._forced = None  # what force found outside of all tests
    check(small)
    assert len(attended) == 2
    check(large)
    assert len(attended) == 4


def test_states_of_half_precision_are_merged_within_the_accuracy_rule(target: Target) -> None:
    """Both parts are rounded to the dtype of q and the merge once more; equal weights make it worst."""
    for dtype in target.dtypes:
        for i in range(3 if target is CPU else 1):
            rows = {"heads": 16, "d": 64, "dv": 64} if target is CPU else {"heads": 4, "d": 32, "dv": 32}
            call = shared_call(
                [(4, 16)], [1] * 4, [64] * 4, dtype=dtype, device=target.device, seed=i, scale=0.02, **rows
            )
            check(call)
            # Few keys: outputs are as large as the values, and so are their ulps.
            check(
                shared_call(
                    [(4, 1)], [1] * 4, [1] * 4, page_size=1, dtype=dtype, device=target.device, seed=i
                )
            )


# ---- values that are read back ------------------------------------------------------------------------------


def spoilt_table(call: SharedCall) -> None:
    call.tensors["page_table"][2, 1] = call.tensors["page_table"][5, 1]


def short(call: SharedCall, i: int, keys: int) -> None:
    call.tensors["cache_seqlens"][i] = keys


# (message, how the call is made, what is then wrong with it)
BROKEN: dict[str, tuple[str, dict[str, Any], Any]] = {
    "another page": (
        r"page_table \[2, 1\] is \d+; it must be \d+ as in row 0, if the first 16 keys of both are shared",
        {},
        spoilt_table,
    ),
    "another page, appending": (
        r"page_table \[2, 1\] is \d+; it must be \d+ as in row 0",
        {"append": True, "rotary": True},
        spoilt_table,
    ),
    "shorter than the prefix": (
        r"shared_prefix_len is 16; sequence 1 has 15 keys, and all of its 1 queries see so many from 16 on",
        {},
        lambda call: short(call, 1, 15),
    ),
    "causal, shorter than prefix and queries": (
        r"shared_prefix_len is 4; sequence 5 has 5 keys, and all of its 3 queries see so many from 6 on",
        {"q_lens": [3] * 6, "causal": True},
        lambda call: short(call, 5, 5),
    ),
    "a right window": (
        r"shared_prefix_len is 4; sequence 4 has 4 keys, and all of its 3 queries see so many from 5 on",
        {"q_lens": [3] * 6, "right": 1},
        lambda call: short(call, 4, 4),
    ),
    "a tree": (
        r"shared_prefix_len is 16; sequence 0 has 18 keys, and all of its 3 queries see so many from 19 on",
        {"q_lens": [3] * 6, "tree": True},
        lambda call: short(call, 0, 18),
    ),
    "ragged queries": (
        r"shared_prefix_len is 4; sequence 5 has 7 keys, and all of its 5 queries see so many from 8 on",
        {"q_lens": [1, 0, 2, 1, 1, 5], "ragged_q": True, "causal": True},
        lambda call: short(call, 5, 7),
    ),
    "appending": (
        r"shared_prefix_len is 16; sequence 1 has 17 keys, and all of its 3 queries see so many from 18 on",
        {"q_lens": [3] * 6, "append": True, "causal": True},
        lambda call: short(call, 1, 14),
    ),
    "any other value": (
        r"page_table \[3, 0\] is 9999; a page index must be 0 to",
        {},
        lambda call: call.tensors["page_table"][3].fill_(9999),
    ),
}


@pytest.mark.parametrize(("message", "options", "spoil"), BROKEN.values(), ids=BROKEN)
def test_a_broken_promise_is_found_and_nothing_is_written(
    target: Target, message: str, options: dict[str, Any], spoil: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it pays or not."""
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    own = [3, 7, 9, 5, 12, 5]
    call = shared_call(
        [(3, 4), (1, 2), (2, 1)], own=own, device=target.device, **{"q_lens": [1] * 6, **options}
    )
    spoil(call)
    caches = call.caches()
    out = torch.full((*call.tensors["q"].shape[:-1], 8), NAN, device=target.device)
    for share in (True, False):
        with (
            shared_prefix.force(share),
            pytest.raises(ValueError, match=f"flash_attn_with_kvcache: {message}"),
        ):
            call.run(**caches, **call.promise, out=out)
    assert all(torch.equal(bits(caches[n]), bits(call.tensors[n])) for n in caches)
    assert out.isnan().all()


def test_valid_promises_run_under_value_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just enough keys for every query, and a group of one, of which nothing is asked."""
    monkeypatch.setenv("HEADFOLD_CHECK", "1")
    check(step(q_lens=[1] * 6, causal=True))
    check(shared_call([(2, 2)], [3, 3], [2, 4], causal=True))
    check(shared_call([(2, 2)], [3, 3], [1, 4], right=1))
    check(shared_call([(2, 2)], [3, 3], [3, 4], tree=True))
    check(shared_call([(2, 2)], [3, 3], [3, 4], append=True, causal=True, rotary=True))
    check(shared_call([(2, 2)], [1, 4], [0, 3], ragged_q=True, causal=True))
    alone = shared_call([(2, 2), (1, 0)], [1] * 3, [1, 1, 3])
    check(alone, shared_prefix_len=8, shared_prefix_groups=[2, 1])


# ---- what is kept between calls -----------------------------------------------------------------------------


def test_a_step_copies_nothing_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other values, or another call in the same groups: what lies on the device is made once."""
    call = step()
    check(call)
    monkeypatch.setattr(shared_prefix, "_make_parts", lambda *a: pytest.fail("made again"))
    call.tensors["q"] = torch.randn_like(call.tensors["q"])
    call.tensors["cache_seqlens"][5] -= 1
    check(call)
    call.options["softmax_scale"] = 0.5
    check(call)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "MOST", 2)
    call = step()
    for splits in (0, 1, 2, 3):
        call.run(**call.promise, num_splits=splits)
        call.run(shared_prefix_len=4 * splits)
        assert len(shared_prefix._kept) <= 2
        assert len(shared_prefix._made) <= 2


def test_a_captured_call_is_prepared_before_and_kept_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host cannot be captured, and a graph goes on reading what it was captured with."""
    monkeypatch.setattr(shared_prefix, "_captured", {})
    call, other = step(), shared_call([(2, 1)], [1, 1], [2, 3])
    check(call)
    assert not shared_prefix._captured
    monkeypatch.setattr(shared_prefix, "_is_capturing", lambda device: True)
    call.run(**call.promise)
    with pytest.raises(RuntimeError, match="make the same call once before the capture"):
        other.run(**other.promise)
    forget()
    (parts,) = shared_prefix._captured.values()
    assert parts.pads.tolist() == [16, 16, 16, 0, 4, 4]


# ---- the operators ------------------------------------------------------------------------------------------


def operator_arguments(call: SharedCall) -> dict[str, Any]:
    x = call.inputs()
    return {
        **{name: getattr(x, name) for name in Inputs.__slots__},
        "prefix_lengths": call.promise["shared_prefix_len"],
        "group_sizes": call.promise["shared_prefix_groups"],
    }


@pytest.mark.parametrize("ragged_q", [False, True])
def test_opcheck(ragged_q: bool) -> None:
    call = step(q_lens=[2] * 6, ragged_q=ragged_q, sink=True)
    call.tensors |= {n: call.tensors[n].nan_to_num() for n in ("k_cache", "v_cache")}
    arguments = operator_arguments(call)
    new, into = shared_prefix.OPERATORS
    torch.library.opcheck(new, (), arguments)
    x = call.inputs()
    results = {"out": torch.zeros(x.out_shape), "lse": torch.zeros(x.lse_shape)}
    torch.library.opcheck(into, (), {**arguments, **results})


def test_fakes_keep_nothing_and_raise_what_real_calls_raise() -> None:
    call = step()
    arguments = operator_arguments(call)
    bad = {**arguments, "prefix_lengths": [16, 8, 3]}
    new, _ = shared_prefix.OPERATORS
    real = new(**arguments)
    with pytest.raises(ValueError) as error:
        new(**bad)
    forget()
    with FakeTensorMode() as mode:

        def fake(values: dict[str, Any]) -> dict[str, Any]:
            return {n: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()}

        for got, want in zip(new(**fake(arguments)), real, strict=True):
            assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())
        with pytest.raises(ValueError) as fake_error:
            new(**fake(bad))
    assert str(fake_error.value) == str(error.value)
    assert not shared_prefix._kept
    assert not shared_prefix._made
    meta = {n: v.to("meta") if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    assert [t.shape for t in new(**meta)] == [t.shape for t in real]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("append", [False, True])
def test_compiled_whole(dynamic: bool, append: bool) -> None:
    """Calls of several sizes through torch.compile(fullgraph=True), and again with all made before."""
    options = {"append": append, "rotary": append, "causal": True}
    torch._dynamo.reset()

    def attend(call: SharedCall, tensors: dict[str, torch.Tensor], length: int, groups: Any) -> Any:
        return replace(call, tensors=tensors).run(shared_prefix_len=length, shared_prefix_groups=groups)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic)
    for groups in ([(3, 2), (1, 2)], [(2, 3), (3, 3)], [(2, 3), (3, 3)]):
        batch, length = sum(n for n, _ in groups), groups[0][1] * 4
        call = shared_call(groups, [2] * batch, [3 + i for i in range(batch)], **options)
        sizes = [n for n, _ in groups]
        want = attend(call, {**call.tensors, **call.caches()}, length, sizes)
        got = compiled(call, {**call.tensors, **call.caches()}, length, sizes)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)
