"""The check before timing tells right outputs from wrong ones, in every layout."""

from __future__ import annotations

import pytest
import torch

from headfold import reference
from headfold.bench.cases import Case
from headfold.bench.errors import WrongOutput, expected, max_error
from headfold.bench.inputs import CaseInputs, copies_needed, make_inputs
from tests.bench.tiny import TINY

CPU = torch.device("cpu")


def answer(x: CaseInputs) -> torch.Tensor:
    return reference.attention(x.arguments())[0].view(x.case.out_shape)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_slices_of_the_reference_are_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfold.bench.errors.KEYS", 17)
    x = make_inputs(case, CPU, copies=1)
    sq = case.all_queries[-1]
    want = answer(x).flatten(0, -3)[-sq:, -case.group :]
    for rows in (slice(0, 1), slice(sq // 2, sq)):
        torch.testing.assert_close(expected(x, rows), want[rows])


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_a_rounded_answer_passes(case: Case) -> None:
    x = make_inputs(case, CPU, copies=1)
    assert 0 < max_error(x, answer(x).to(case.torch_dtype)) < 0.02


def test_nan_anywhere_is_an_error() -> None:
    x = make_inputs(TINY[0], CPU, copies=1)
    out = answer(x).float()
    out[0, 0, 0, 0] = float("nan")  # outside the slice that is compared
    with pytest.raises(WrongOutput, match="NaN"):
        max_error(x, out)


def test_wrong_values_and_shapes_are_errors() -> None:
    x = make_inputs(TINY[0], CPU, copies=1)
    out = answer(x).float()
    with pytest.raises(WrongOutput, match="wrong result: max error") as e:
        max_error(x, out.roll(1, dims=-1))
    assert e.value.error is not None
    with pytest.raises(WrongOutput, match="shape"):
        max_error(x, out.transpose(1, 2))


def test_inputs_are_fresh_normal_and_shuffled() -> None:
    case = Case("pages", "paged decode", 4, 2, 64, 64, 2, 1, 640, page_size=8)
    x = make_inputs(case, CPU, copies=2)
    assert x.page_table is not None
    assert sorted(x.page_table.flatten().tolist()) == list(range(160))
    assert x.page_table.flatten().tolist() != list(range(160))
    assert x.k[0].data_ptr() != x.k[1].data_ptr()
    assert abs(x.k[0].float().std() - 1) < 0.05
    assert abs(x.k[0].float().mean()) < 0.05


def test_copies_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfold.bench.inputs.last_level_cache", lambda device: 1 << 20)
    decode = Case("d", "decode", 4, 2, 64, 64, 1, 1, 1024)  # 512 KiB of K and V
    assert copies_needed(decode, CPU) == 8
    prefill = Case("p", "prefill", 4, 2, 64, 64, 1, 1024, 1024)
    assert copies_needed(prefill, CPU) == 1
