"""Cases with features: each has a plain case of the same work, is checked against its meaning, and is compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from headfold.bench import peers, session
from headfold.bench.calls import HEADFOLD
from headfold.bench.cases import Case
from headfold.bench.catalogue import catalogue
from headfold.bench.errors import WrongOutput, error_of, max_error
from headfold.bench.features import ALL, Features
from headfold.bench.inputs import CaseInputs, make_inputs
from headfold.bench.names import APPENDED
from headfold.bench.report import console, feature_table, show
from headfold.bench.results import Result
from tests.bench.tiny import TINY, TINY_FEATURES

CPU = torch.device("cpu")
NAMED = {c.name: c for c in TINY_FEATURES}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_case_with_features_has_its_plain_case_in_the_suite(device: str) -> None:
    cases = {c.name: c for c in catalogue(device, "features")}
    seen: set[str] = set()
    for case in cases.values():
        if case.base is None:
            continue
        base = cases[case.base]
        assert list(cases).index(base.name) < list(cases).index(case.name)
        assert base.base is None
        assert case.kv_bytes == base.kv_bytes, "the same keys are read"
        assert (case.batch, case.sq, case.dtype) == (base.batch, base.sq, base.dtype)
        seen |= case.features.names
    assert seen == ALL


def test_a_case_survives_its_record() -> None:
    for case in (*TINY, *TINY_FEATURES):
        assert Case.from_record(case.name, case.record()) == case
    ragged = next(c for c in TINY if c.name == "tiny-ragged")
    old = ragged.record()
    del old["features"], old["base"], old["shared"]
    assert Case.from_record("tiny-ragged", old) == ragged


def test_bytes_and_flops_are_those_that_features_leave() -> None:
    window, texts = NAMED["tiny-window"], NAMED["tiny-texts"]
    assert window.kv_bytes == 2 * 96 * 2 * 2 * 32 * 4
    assert window.cache_bytes == 2 * 200 * 2 * 2 * 32 * 4
    assert texts.flops == 4 * 32 * 8 * 4 * (20 * 21 // 2)


def test_features_reach_the_planner() -> None:
    p = NAMED["tiny-everything"].problem("cuda")
    assert (p.window_left, p.softcap, p.lengths_on_device) == (95, True, False)
    assert NAMED["tiny-split"].problem("cuda").tokens_per_split == 32
    assert NAMED["tiny-tree"].problem("cuda").tensor_mask
    assert p.featured
    rotated = NAMED["tiny-append-rotary"].problem("cuda")
    assert not rotated.featured, "an append rotates q: attention gets a plain one"
    assert rotated.lengths_on_device


def pairs() -> list[tuple[str, Case]]:
    """Every implementation that runs on a CPU with every tiny case whose features it can compute."""
    return [(i.name, c) for i in peers.chosen(["math"], "cpu") for c in TINY_FEATURES if i.runs(c, "cpu")]


@pytest.mark.parametrize(("name", "case"), pairs(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_way_that_runs_has_the_features(name: str, case: Case) -> None:
    x = make_inputs(case, CPU, copies=2)
    call = peers.REGISTRY[name].prepare(case, x)
    assert not isinstance(call, peers.Unsupported)
    x.forget_new_tokens()
    first = call(0)
    max_error(x, first)
    assert torch.equal(call(0), first), "a second append writes the same tokens to the same places"
    torch.testing.assert_close(call(1), first)


def test_headfold_has_a_row_of_every_case_and_pytorch_of_what_it_can() -> None:
    assert all(HEADFOLD.runs(c, "cpu") for c in TINY_FEATURES)
    ways = [i for i in peers.chosen((), "cuda") if i.is_torch]
    without = {c.name for c in TINY_FEATURES if not any(i.runs(c, "cuda") for i in ways)}
    assert without == {"tiny-sink", "tiny-softcap", "tiny-everything", "tiny-split"}
    assert not any(i.runs(NAMED["tiny-bias"], "cuda") for i in ways if i.name == "torch-flash")


@pytest.mark.parametrize(
    ("name", "left_out"),
    [(c.name, n) for c in TINY_FEATURES for n in sorted(c.features.names - {"cache", "tokens_per_split"})],
)
def test_a_feature_left_out_is_noticed(name: str, left_out: str) -> None:
    case = NAMED[name]
    x = make_inputs(case, CPU, copies=1)
    off = getattr(Features(), left_out)
    less = dataclasses.replace(case, features=dataclasses.replace(case.features, **{left_out: off}))
    y = make_inputs(less, CPU, copies=1)  # draws others, so the shared tensors are handed over
    y.q, y.k, y.v = x.q, x.k, x.v
    for shared in ("sink", "slopes", "mask", "tree", "k_new", "v_new", "cos", "sin"):
        if getattr(y.extra, shared) is not None:
            setattr(y.extra, shared, getattr(x.extra, shared))
    call = HEADFOLD.prepare(less, y)
    assert not isinstance(call, peers.Unsupported)
    x.forget_new_tokens()
    with pytest.raises(WrongOutput):
        max_error(x, call(0))


def test_a_cache_that_was_not_written_is_noticed() -> None:
    x = make_inputs(NAMED["tiny-append"], CPU, copies=1)
    call = HEADFOLD.prepare(x.case, x)
    assert not isinstance(call, peers.Unsupported)
    out = call(0)
    x.forget_new_tokens()
    with pytest.raises(WrongOutput, match="the cache does not hold the new k"):
        max_error(x, out)


@pytest.mark.parametrize("name", ["tiny-append", "tiny-append-rotary"])
def test_attention_after_an_append_is_timed_beside_it(name: str) -> None:
    x = make_inputs(NAMED[name], CPU, copies=1)
    assert not peers.REGISTRY[APPENDED].runs(TINY[0], "cuda")
    alone, whole = (peers.REGISTRY[n].prepare(x.case, x) for n in (APPENDED, "headfold"))
    assert not isinstance(alone, peers.Unsupported)
    assert not isinstance(whole, peers.Unsupported)
    error_of(alone, x, appends=False)
    with pytest.raises(WrongOutput, match="NaN"):
        error_of(alone, x)
    written = whole(0)
    torch.testing.assert_close(alone(0), written)


def test_lengths_stay_when_a_row_appends() -> None:
    x = make_inputs(NAMED["tiny-append"], CPU, copies=1)
    assert x.extra.before is not None
    assert x.extra.before.tolist() == [95, 95]
    call = HEADFOLD.prepare(x.case, x)
    assert not isinstance(call, peers.Unsupported)
    kept = x.k[0][:, :95].clone()
    for _ in range(3):
        call(0)
    assert x.extra.before.tolist() == [95, 95]
    assert torch.equal(x.k[0][:, :95], kept)


def test_features_of_ragged_and_paged_cases_are_refused() -> None:
    for case in (TINY[1], TINY[2]):
        with pytest.raises(ValueError, match="only dense cases of equal lengths"):
            dataclasses.replace(case, features=Features(sink=True))
    with pytest.raises(ValueError, match="documents need as many queries"):
        dataclasses.replace(TINY[0], features=Features(mask="documents"))


@pytest.mark.usefixtures("tiny")
def test_the_report_sets_features_beside_their_plain_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(session, "catalogue", lambda device, suite="all": TINY + TINY_FEATURES)
    options = session.Options("cpu", names=("tiny-decode", "tiny-sink", "tiny-mha", "tiny-append*"), rounds=1)
    result = session.run(options, session.cases_of(options), tmp_path / "r.json")
    assert Result.load(tmp_path / "r.json") == result
    assert result.own_failures() == []
    pair = result.beside_base("tiny-sink")
    assert pair is not None
    assert [r.case for r in pair] == ["tiny-sink", "tiny-decode"]
    assert result.beside_base("tiny-decode") is None
    assert result.beside_base("tiny-append") is None, "its plain case was not measured"
    assert feature_table(result).row_count == 1
    out = console()
    with out.capture() as capture:
        show(result, out)
    text = capture.get()
    assert "What features cost" in text
    assert "geometric mean of 1 case;" in text
    lead = result.lead()
    assert lead is not None
    assert lead[2] == 1, "cases with features are left out of the mean"


def arguments(x: CaseInputs) -> dict[str, object]:
    """What the reference is told of the features."""
    y = x.arguments()
    return {"window": (y.window_left, y.window_right), "softcap": y.softcap, "sink": y.sink is not None}


def test_the_reference_gets_the_features() -> None:
    x = make_inputs(NAMED["tiny-everything"], CPU, copies=1)
    assert arguments(x) == {"window": (95, -1), "softcap": 2.0, "sink": True}
