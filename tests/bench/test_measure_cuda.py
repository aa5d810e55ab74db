"""The arithmetic of timing on a GPU, with a GPU that is pretended: time passes when a call says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch

from headfold.bench.measure import Timing, measure

HOST_US = 50.0  # what launching a call costs outside a graph


class PretendedGPU:
    """Stands in for torch.cuda: calls outside a graph cost host time too, replays of a graph do not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_us = 0.0
        self.capturing: list[tuple[str, float, int]] | None = None
        self.log: list[tuple[str, int]] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at_us = gpu.now_us

            def elapsed_time(self, end: Event) -> float:
                return (end.at_us - self.at_us) / 1e3

        class Graph:
            def __init__(self) -> None:
                self.calls: list[tuple[str, float, int]] = []

            def replay(self) -> None:
                for name, us, copy in self.calls:
                    gpu.log.append((name, copy))
                    gpu.now_us += us

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            self.capturing = graph.calls
            try:
                yield
            finally:
                self.capturing = None

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: nullcontext(),
            "set_stream": lambda stream: None,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self, name: str, us: float, capturable: bool = True):  # type: ignore[no-untyped-def]
        def run(copy: int) -> torch.Tensor:
            if self.capturing is None:
                self.log.append((name, copy))
                self.now_us += us + HOST_US
            elif capturable:
                self.capturing.append((name, us, copy))
            else:
                raise RuntimeError("operation not permitted when stream is capturing")
            return torch.empty(0)

        return run


CUDA = torch.device("cuda")


def test_graphs_are_filled_and_alternate(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGPU(monkeypatch)
    found = measure({"a": gpu.call("a", 10), "b": gpu.call("b", 400)}, CUDA, copies=3, rounds=4)
    assert found["a"] == Timing(pytest.approx(10), pytest.approx(10), pytest.approx(10), 4)
    assert isinstance(found["b"], Timing)
    assert found["b"].median_us == pytest.approx(400)
    last_round = gpu.log[-(81 + 3) :]
    assert last_round == [("a", i % 3) for i in range(81)] + [("b", i) for i in range(3)]


def test_what_cannot_be_captured_is_timed_with_events_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PretendedGPU(monkeypatch)
    found = measure({"a": gpu.call("a", 10, capturable=False), "b": gpu.call("b", 100)}, CUDA, copies=2)
    a, b = found["a"], found["b"]
    assert isinstance(a, Timing)
    assert isinstance(b, Timing)
    assert a.median_us == pytest.approx(10 + HOST_US)
    assert "no CUDA graph (RuntimeError: operation not permitted" in (a.note or "")
    assert (b.median_us, b.rounds, b.note) == (pytest.approx(100), 20, None)
