"""What HEADFOLD_CHECK=1 reads, and what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from headfold import ops
from headfold.problem import (
    Inputs,
    check,
    problem_of,
)
from headfold.values import check_values, value_checks_enabled
from tests.cases import make, poisoned
from tests.problem.calls import (
    Change,
    dense,
    drawn_calls,
    grown,
    ints,
    paged,
    ragged,
    value,
)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADFOLD_CHECK", "1")


def page(i: int, j: int, entry: int) -> Change:
    def change(x: Inputs) -> dict[str, Any]:
        table = x.page_table.clone()
        table[i, j] = entry
        return {"page_table": table}

    return change


BAD_VALUES: list[tuple[Callable[[], Inputs], Change, str]] = [
    (ragged, value(cu_seqlens_q=ints(1, 3, 9)), "cu_seqlens_q [0] is 1; the first offset must be 0"),
    (ragged, value(cu_seqlens_k=ints(-1, 8, 13)), "cu_seqlens_k [0] is -1; the first offset must be 0"),
    (
        ragged,
        value(cu_seqlens_q=ints(0, 6, 3)),
        "cu_seqlens_q [2] is 3, below [1] = 6; offsets must not decrease",
    ),
    (
        ragged,
        value(cu_seqlens_k=ints(0, -8, 13)),
        "cu_seqlens_k [1] is -8, below [0] = 0; offsets must not decrease",
    ),
    (ragged, value(cu_seqlens_q=ints(0, 3, 10)), "cu_seqlens_q [2] is 10; only 9 rows are there"),
    (ragged, value(cu_seqlens_k=ints(0, 8, 14)), "cu_seqlens_k [2] is 14; only 13 rows are there"),
    (ragged, value(seqused_q=ints(4, 3)), "seqused_q [0] is 4; that sequence has room for 0 to 3"),
    (ragged, value(seqused_q=ints(3, -1)), "seqused_q [1] is -1; that sequence has room for 0 to 6"),
    (ragged, value(seqused_k=ints(5, 6)), "seqused_k [1] is 6; that sequence has room for 0 to 5"),
    (dense, value(seqused_q=ints(3, 4)), "seqused_q [1] is 4; that sequence has room for 0 to 3"),
    (dense, value(seqused_k=ints(6, 5)), "seqused_k [0] is 6; that sequence has room for 0 to 5"),
    (dense, value(seqused_k=ints(5, -2)), "seqused_k [1] is -2; that sequence has room for 0 to 5"),
    (paged, value(seqused_k=ints(5, 13)), "seqused_k [1] is 13; that sequence has room for 0 to 12"),
    (
        paged,
        value(seqused_k=None, cu_seqlens_k=ints(0, 5, 18)),
        "cu_seqlens_k gives sequence 1 13 keys; its row of page_table has room for 12",
    ),
    (
        ragged,
        value(seqused_q=None, max_seqlen_q=5),
        "max_seqlen_q is 5; sequence 1 has length 6, and it must bound them all",
    ),
    (
        ragged,
        value(seqused_k=None, max_seqlen_k=7),
        "max_seqlen_k is 7; sequence 0 has length 8, and it must bound them all",
    ),
    (
        dense,
        value(seqused_q=ints(1, 2), max_seqlen_q=1),
        "max_seqlen_q is 1; sequence 1 has length 2, and it must bound them all",
    ),
    (
        paged,
        value(max_seqlen_k=5),
        "max_seqlen_k is 5; sequence 1 has length 6, and it must bound them all",
    ),
    (paged, page(0, 1, 6), "page_table [0, 1] is 6; a page index must be 0 to 5"),
    (paged, page(1, 0, -1), "page_table [1, 0] is -1; a page index must be 0 to 5"),
    (
        paged,
        lambda x: {"seqused_k": None, "cu_seqlens_k": ints(0, 5, 11), **page(1, 1, 2**31 - 1)(x)},
        f"page_table [1, 1] is {2**31 - 1}; a page index must be 0 to 5",
    ),
]


def rotated(rows: int, *positions: int, advances: bool = True) -> Change:
    """Angles for positions 0 to rows - 1, and each sequence rotated from its own on."""
    return value(
        rotary_cos=torch.ones(rows, 3),
        rotary_sin=torch.ones(rows, 3),
        rotary_positions=ints(*positions),
        rotary_advances=advances,
    )


BAD_VALUES += [
    (dense, value(cache_batch_idx=ints(0, 2)), "cache_batch_idx [1] is 2; a row must be 0 to 1"),
    (paged, value(cache_batch_idx=ints(-1, 0)), "cache_batch_idx [0] is -1; a row must be 0 to 1"),
    (
        paged,
        lambda x: {"cache_batch_idx": ints(1, 0), "seqused_k": ints(5, 5), **page(0, 1, 9)(x)},
        "page_table [0, 1] is 9; a page index must be 0 to 5",
    ),
    (dense, value(cache_leftpad=ints(0, 6)), "cache_leftpad [1] is 6; that sequence has room for 0 to 5"),
    (
        dense,
        value(seqused_k=ints(4, 2), cache_leftpad=ints(4, 3)),
        "cache_leftpad [1] is 3; that sequence has room for 0 to 2",
    ),
    (
        grown,
        value(early_lengths=ints(3, 1)),
        "early_lengths [1] is 1; with early_new it must be what seqused_k holds, 2",
    ),
    (paged, value(cache_leftpad=ints(-1, 0)), "cache_leftpad [0] is -1; that sequence has room for 0 to 5"),
    (
        dense,
        rotated(9, 0, 7),
        "rotary_cos has 9 positions; the queries of sequence 1 are rotated at 7 to 9",
    ),
    (
        dense,
        rotated(9, 9, 0, advances=False),
        "rotary_cos has 9 positions; the queries of sequence 0 are rotated at 9 to 9",
    ),
    (
        ragged,
        rotated(9, -1, 0),
        "rotary_cos has 9 positions; the queries of sequence 0 are rotated at -1 to 1",
    ),
]


@pytest.mark.parametrize(("base", "change", "message"), BAD_VALUES, ids=[m[:30] for _, _, m in BAD_VALUES])
@pytest.mark.usefixtures("reading")
def test_check_values_names_the_entry_and_leaves_out_untouched(
    base: Callable[[], Inputs], change: Change, message: str
) -> None:
    x = base()
    x = dataclasses.replace(x, **change(x))
    check(x)
    out, lse = poisoned(x)
    with pytest.raises(ValueError) as error:
        ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert str(error.value) == f"attention: {message}"
    assert out.isnan().all()
    assert lse.isnan().all()
    with pytest.raises(ValueError) as again:
        ops.attention(**as_kwargs(x))
    assert str(again.value) == str(error.value)


def as_kwargs(x: Inputs) -> dict[str, Any]:
    return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}


@settings(max_examples=60)
@given(drawn_calls())
def test_check_values_is_silent_on_valid_inputs(drawn: tuple[Inputs, list[tuple[int, int]]]) -> None:
    check_values(drawn[0])


def test_lengths_of_a_paged_cache_may_come_as_offsets_or_beside_them() -> None:
    """seqused_k wins over cu_seqlens_k, whose slots then bound nothing: the table does."""
    x = paged()
    check_values(dataclasses.replace(x, seqused_k=None, cu_seqlens_k=ints(0, 5, 11)))
    check_values(dataclasses.replace(x, cu_seqlens_k=ints(0, 1, 2)))


def test_values_that_just_fit_are_silent() -> None:
    x = dense()
    for change in (rotated(9, 6, 0), rotated(9, 8, 8, advances=False), value(cache_leftpad=ints(5, 0))):
        check_values(dataclasses.replace(x, **change(x)))
    nobody = make([0, 2], [5, 5], q_layout="ragged", kv_layout="paged", slack=0)
    check_values(dataclasses.replace(nobody, **rotated(9, 99, 7)(nobody)))
    # Pages that lie wholly before the first valid key are not read.
    table = page(1, 0, 2**31 - 1)(paged())["page_table"]
    check_values(dataclasses.replace(paged(), page_table=table, cache_leftpad=ints(0, 4)))


@pytest.mark.usefixtures("reading")
def test_valid_calls_run_under_value_checks() -> None:
    x = ragged()
    out, lse = poisoned(x)
    ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert not out[:3].isnan().any()


@pytest.mark.usefixtures("reading")
def test_bad_arguments_are_refused_before_values_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "check_values", lambda x: pytest.fail("values were read"))
    x = ragged()
    out, lse = poisoned(x)
    with pytest.raises(ValueError, match="num_splits"):
        ops.attention_out(**as_kwargs(dataclasses.replace(x, num_splits=-1)), out=out, lse=lse)
    with pytest.raises(ValueError, match="out has shape"):
        ops.attention_out(**as_kwargs(x), out=out[1:], lse=lse)


@pytest.mark.parametrize(("setting", "enabled"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_values_are_read_only_when_asked(
    setting: str | None, enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting is None:
        monkeypatch.delenv("HEADFOLD_CHECK", raising=False)
    else:
        monkeypatch.setenv("HEADFOLD_CHECK", setting)
    calls: list[Inputs] = []
    monkeypatch.setattr(ops, "check_values", calls.append)
    x = ragged()
    ops.attention(**as_kwargs(x))
    out, lse = poisoned(x)
    ops.attention_out(**as_kwargs(x), out=out, lse=lse)
    assert len(calls) == (2 if enabled else 0)
    assert value_checks_enabled() is enabled


def test_checks_read_no_index_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """check and problem_of may look at an index tensor's metadata alone, on any device."""
    instances = (dense(), ragged(), paged())
    for name in ("tolist", "item", "cpu", "numpy", "__getitem__", "__bool__", "__int__"):
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, _name=name, **k: pytest.fail(f"Tensor.{_name} was called")
        )
    for x in instances:
        check(x)
        problem_of(x)
