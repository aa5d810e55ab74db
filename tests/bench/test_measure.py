"""The arithmetic of timing, under a clock that the test winds."""

from __future__ import annotations

import pytest
import torch

from headfold.bench.machine import OtherWork
from headfold.bench.measure import (
    Timing,
    calls_per_run,
    first_line,
    measure_cpu,
    quantile,
    summarize,
)


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Taking:
    """A call that takes the given microseconds, one after another and then over again."""

    def __init__(self, clock: Clock, *durations_us: float) -> None:
        self.clock, self.durations, self.copies = clock, durations_us, []  # type: ignore[var-annotated]

    def __call__(self, copy: int) -> torch.Tensor:
        self.clock.now += self.durations[len(self.copies) % len(self.durations)] * 1e-6
        self.copies.append(copy)
        return torch.empty(0)


def test_quantiles_lie_between_neighbours() -> None:
    assert quantile([1.0], 0.9) == 1.0
    assert quantile([1.0, 3.0], 0.5) == 2.0
    assert quantile([0.0, 10.0, 20.0], 0.1) == pytest.approx(2.0)


def test_summary_is_order_free() -> None:
    t = summarize([5.0, 1.0, 3.0, 2.0, 4.0])
    assert t == Timing(3.0, pytest.approx(1.4), pytest.approx(4.6), 5)


@pytest.mark.parametrize(
    ("one_us", "run_us", "copies", "limit_us", "calls"),
    [
        (10, 800, 1, 10_000, 80),
        (10, 800, 7, 10_000, 84),  # whole turns over the copies
        (5000, 800, 1, 10_000, 1),
        (5000, 800, 8, 10_000, 1),  # eight calls would take too long
        (0, 1, 4, 10_000, 1000),
    ],
)
def test_calls_per_run(one_us: float, run_us: float, copies: int, limit_us: float, calls: int) -> None:
    assert calls_per_run(one_us, run_us, copies, limit_us) == calls


def test_medians_are_per_call() -> None:
    clock = Clock()
    fast, slow = Taking(clock, 500), Taking(clock, 3000, 5000)
    timings = measure_cpu({"fast": fast, "slow": slow}, copies=3, rounds=10, clock=clock)
    assert isinstance(timings["fast"], Timing)
    assert isinstance(timings["slow"], Timing)
    assert timings["fast"].median_us == pytest.approx(500)
    assert timings["slow"].median_us == pytest.approx(4000)
    assert timings["slow"].p10_us == pytest.approx(3000)
    assert timings["slow"].rounds == 10


def test_runs_alternate_and_rotate_over_the_copies() -> None:
    clock, order = Clock(), []  # type: ignore[var-annotated]

    def call(name: str, us: float):  # type: ignore[no-untyped-def]
        def run(copy: int) -> torch.Tensor:
            order.append((name, copy))
            clock.now += us * 1e-6
            return torch.empty(0)

        return run

    measure_cpu({"a": call("a", 1000), "b": call("b", 4000)}, copies=3, rounds=2, clock=clock)
    estimates, rounds = order[:2], order[2:]
    assert estimates == [("a", 0), ("b", 0)]
    assert rounds == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 0), ("b", 1)]


def test_slow_cases_get_fewer_rounds() -> None:
    clock = Clock()
    slow = measure_cpu({"x": Taking(clock, 1e6)}, copies=1, clock=clock)["x"]
    fast = measure_cpu({"x": Taking(clock, 10)}, copies=1, clock=clock)["x"]
    assert isinstance(slow, Timing)
    assert isinstance(fast, Timing)
    assert (slow.rounds, fast.rounds) == (7, 40)


def test_a_call_that_fails_midway_leaves_the_others_their_times() -> None:
    clock = Clock()
    good, calls = Taking(clock, 3000), []  # type: ignore[var-annotated]

    def bad(copy: int) -> torch.Tensor:
        calls.append(copy)
        clock.now += 3e-3
        if len(calls) > 3:
            raise RuntimeError("out of patience\nand more")
        return torch.empty(0)

    timings = measure_cpu({"bad": bad, "good": good}, copies=1, rounds=5, clock=clock)
    assert isinstance(timings["bad"], RuntimeError)
    assert first_line(timings["bad"]) == "RuntimeError: out of patience"
    assert isinstance(timings["good"], Timing)
    assert timings["good"].rounds == 5


def test_first_line_is_short() -> None:
    assert len(first_line(ValueError("x" * 999))) == 200
    assert first_line(KeyError()) == "KeyError"


def test_other_work_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter([(100.0, 10.0, 0.0), (102.0, 12.0, 1.0), (0.0, 0.0, 0.0), (5.0, 1.0, 2.0)])
    monkeypatch.setattr(OtherWork, "_now", staticmethod(lambda: next(states)))
    monkeypatch.setattr("os.cpu_count", torch.get_num_threads)
    assert not OtherWork().disturbs()  # two core seconds, both our own
    assert OtherWork().disturbs()  # two cores of others for two seconds
