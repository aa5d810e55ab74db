"""Who shares the counter that hands out tiles. On a machine without a GPU: streams and captures are pretended."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from headfold.backends import hopper

CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A pretended device: its current stream, and whether it captures."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda: SimpleNamespace(cuda_stream=state.stream, synchronize=lambda: None),
    )
    monkeypatch.setattr(hopper, "CAPTURED", 3)
    for name in ("_counters", "_pairs", "_captured"):
        monkeypatch.setattr(hopper, name, {})
    return state


def take() -> int:
    """Address of the next counter, which must be two zeros."""
    pair = hopper._counter(CPU)
    assert pair.tolist() == [0, 0]
    assert pair.dtype == torch.int32
    return pair.data_ptr()


def test_launches_of_a_stream_share_a_counter_and_streams_do_not(gpu: SimpleNamespace) -> None:
    first = take()
    assert take() == first
    gpu.stream = 2
    assert take() != first


def test_every_captured_launch_has_a_counter_of_its_own(gpu: SimpleNamespace) -> None:
    eager = take()
    gpu.capturing = True
    addresses = {take(), take(), take()}
    assert len({eager, *addresses}) == 4
    assert all(a % 16 == 0 for a in addresses)  # aligned as an eager call's: no other variant


def test_a_capture_before_any_call_or_after_many_clears_its_own(gpu: SimpleNamespace) -> None:
    gpu.capturing = True
    kept = [hopper._counter(CPU) for _ in range(2)]
    assert kept[0].data_ptr() != kept[1].data_ptr()
    gpu.capturing = False
    take()
    gpu.capturing = True
    kept += [hopper._counter(CPU) for _ in range(5)]
    assert len({t.data_ptr() for t in kept}) == len(kept)
