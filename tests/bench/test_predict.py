"""Predictions beside measured times, from a result alone."""

from __future__ import annotations

from typing import Any

import pytest

from headfold.bench.catalogue import catalogue
from headfold.bench.predict import predictions
from headfold.bench.report import console, show_predictions
from headfold.bench.results import Result, Row
from headfold.planner import DEVICES, make_plan
from headfold.planner.cost import predicted_seconds


def result_of(times: dict[str, float | None], **facts: Any) -> Result:
    """A result with these microseconds of headfold's."""
    cases = {c.name: c for c in catalogue("cuda")}
    return Result(
        device="NVIDIA H200",
        device_facts={"type": "cuda", "name": "NVIDIA H200"} | facts,
        versions={},
        commit=None,
        command="",
        date="",
        ceilings={},
        cases={name: cases[name].record() for name in times},
        rows=[Row(name, cases[name].kind, "headfold", median_us=us) for name, us in times.items()],
    )


def test_predictions_are_the_planners_for_every_decode_row() -> None:
    name = "llama3-8b-decode-b16-s8192"
    problem = next(c for c in catalogue("cuda") if c.name == name).problem("cuda")
    us = predicted_seconds(problem, make_plan(problem, DEVICES["h200"]), DEVICES["h200"]) * 1e6
    times = {name: us / 1.5, "llama3-8b-paged16-b16-s8192": 1.0, "d128-h16-prefill-b4-s4096-full": 9.0}
    times["llama3-8b-prefix8192-paged16-b64-s8704"] = 1.0  # two plans and a merge: no row
    found = predictions(result_of(times | {"glm4.7-decode-b4-s65536": None}))
    assert [p.case for p in found] == [name, "llama3-8b-paged16-b16-s8192"]
    assert found[0].predicted_us == pytest.approx(us)
    assert found[0].error == pytest.approx(0.5)
    assert not found[0].is_near


def test_the_share_of_near_rows_is_printed() -> None:
    names = ("llama3-8b-decode-b16-s8192", "llama3-8b-decode-b1-s8192")
    exact = {p.case: p.predicted_us for p in predictions(result_of(dict.fromkeys(names, 1.0)))}
    found = predictions(result_of({names[0]: exact[names[0]] * 1.19, names[1]: exact[names[1]] * 1.3}))
    out = console()
    with out.capture() as capture:
        show_predictions(found, out)
    assert "within 20 % of the measured time: 1 of 2 rows (50%)" in capture.get()
    with out.capture() as capture:
        show_predictions([], out)
    assert "No case here" in capture.get()


def test_devices_without_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a result of a GPU"):
        predictions(result_of({}, type="cpu"))
    with pytest.raises(ValueError, match="no numbers for 'Abacus'"):
        predictions(result_of({}, name="Abacus"))
