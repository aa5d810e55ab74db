"""The door to a device, with a device and a compiled program that only remember what they were told."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from headfold.backends import launch as door


class Compiled:
    """A compiled program: remembers launches by `run` and by Triton's own `compiled[grid](...)`."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        self.told: list[tuple[Any, ...]] = []

    def run(self, *args: Any) -> None:
        self.runs.append(args)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.told.append((grid, *args))


class Kernel:
    """A jitted function: its first launch compiles."""

    def __init__(self) -> None:
        self.compiled = Compiled()
        self.firsts: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **keywords: Any) -> Compiled:
            self.firsts.append((grid, args, keywords))
            return self.compiled

        return launch


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Two pretended devices: the current one, and what was made current in between."""
    state = SimpleNamespace(current=0, visited=[])

    class Visit:
        def __init__(self, device: torch.device) -> None:
            self.device = device

        def __enter__(self) -> None:
            state.visited.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            pass

    hooks = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[])
    )
    state.hooks = hooks
    monkeypatch.setattr(door, "current_device", lambda: state.current)
    monkeypatch.setattr(door, "current_stream", lambda index: 100 + index)
    monkeypatch.setattr(torch.cuda, "device", Visit)
    monkeypatch.setattr(door, "knobs", SimpleNamespace(runtime=hooks))
    monkeypatch.setattr(door, "_compiled", {})
    return state


def launcher(kernel: Kernel, device: int = 0, **constants: int) -> door.Launcher:
    return door.Launcher(kernel, (5,), {"D": 64, **constants}, {"num_warps": 4}, torch.device("cuda", device))


def test_the_first_launch_compiles_and_the_others_go_straight(gpu: SimpleNamespace) -> None:
    """With the arguments of the moment, then the compile-time ones, on the device's stream."""
    kernel = Kernel()
    launch = launcher(kernel)
    launch((1, 2))
    assert kernel.firsts == [((5,), (1, 2), {"D": 64, "num_warps": 4})]
    assert kernel.compiled.runs == []
    launch((3, 4))
    assert kernel.compiled.runs == [(5, 1, 1, 100, "function", "metadata", None, None, None, 3, 4, 64)]
    assert len(kernel.firsts) == 1


def test_launchers_of_one_program_share_it(gpu: SimpleNamespace) -> None:
    """Another constant, option or device is another program."""
    kernel = Kernel()
    launcher(kernel)((1,))
    launcher(kernel)((2,))
    assert (len(kernel.firsts), len(kernel.compiled.runs)) == (1, 1)
    launcher(kernel, D=128)((3,))
    launcher(kernel, device=1)((4,))
    assert (len(kernel.firsts), len(kernel.compiled.runs)) == (3, 1)


def test_a_profiler_that_listens_is_told(gpu: SimpleNamespace) -> None:
    """Triton's hooks get what its own launches give them."""
    kernel = Kernel()
    launch = launcher(kernel)
    launch((1,))
    for hook in (gpu.hooks.launch_enter_hook, gpu.hooks.launch_exit_hook):
        hook.calls.append(print)
        launch((2,))
        hook.calls.clear()
    assert kernel.compiled.told == [((5, 1, 1), 2, 64)] * 2
    assert kernel.compiled.runs == []


def test_the_tensors_device_is_made_current(gpu: SimpleNamespace) -> None:
    launch = launcher(Kernel(), device=1)
    launch((1,))
    assert gpu.visited == [1]
    gpu.current = 1
    launch((2,))
    assert gpu.visited == [1]


def test_tensors_on_the_cpu_are_interpreted() -> None:
    kernel = Kernel()
    launch = door.Launcher(kernel, (5, 2), {"D": 64}, {"num_warps": 4}, torch.device("cpu"))
    launch((1,))
    launch((2,))
    assert [first[1] for first in kernel.firsts] == [(1,), (2,)]
