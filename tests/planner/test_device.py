"""The device table, the names users may give, and what is read from a driver."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headfold.planner import DEVICES, device, device_named, running_device

H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    shared_memory_per_block_optin=232448,
    L2_cache_size=50 * 2**20,
    clock_rate=1980000,
    memory_clock_rate=3201000,
    memory_bus_width=6016,
)


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Fake GPUs by index, and what the driver was asked: `asked` under key -1."""
    fakes: dict[int, Any] = {-1: []}

    def properties(index: int) -> Any:
        fakes[-1].append(index)
        return fakes[index]

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(device, "_running", {})
    return fakes


@pytest.mark.parametrize("key", DEVICES)
def test_table_is_in_plausible_units(key: str) -> None:
    """Bytes, bytes/s and FLOP/s: a row in GB or TFLOP/s would plan nonsense and still run."""
    d = DEVICES[key]
    assert not d.is_cpu
    assert 30 <= d.sms <= 300
    assert 64 * 1024 <= d.smem < 256 * 1024
    assert 10 * 2**20 <= d.l2 <= 512 * 2**20
    assert 1e11 <= d.bandwidth <= 1e13
    assert 1e13 <= d.matmul_flops <= 1e16


def test_shared_memory_is_what_the_architecture_allows() -> None:
    """One program may use 1 KB less than the multiprocessor holds: 99, 163 and 227 KB (CUDA programming guide)."""
    of_arch = {(8, 0): 163, (8, 9): 99, (9, 0): 227, (10, 0): 227, (12, 0): 99}
    assert {d.arch for d in DEVICES.values()} == set(of_arch)
    assert all(d.smem == of_arch[d.arch] * 1024 for d in DEVICES.values())


def test_a_device_cannot_be_changed_and_can_be_a_key() -> None:
    """Plans are cached by it."""
    with pytest.raises(FrozenInstanceError):
        DEVICES["h200"].sms = 1  # type: ignore[misc]
    assert hash(DEVICES["h200"]) == hash(replace(DEVICES["h200"]))


@pytest.mark.parametrize("name", ["h200", "H200", "RTX 4090", "rtx-4090", "A100"])
def test_names_ignore_case_blanks_and_dashes(name: str) -> None:
    """Users write names as the box does."""
    assert device_named(name) is DEVICES[name.lower().replace(" ", "").replace("-", "")]


def test_cpu_is_a_device_with_a_core_per_thread() -> None:
    """`headfold plan --device cpu` plans for this machine."""
    d = device_named("CPU")
    assert d.is_cpu
    assert d.sms == torch.get_num_threads()
    assert d == running_device(torch.device("cpu"))


@pytest.mark.parametrize("name", ["", "h300", "cuda", "cuda:0"])
def test_an_unknown_name_says_which_exist(name: str) -> None:
    """The message names the argument, what it got and what it needs."""
    with pytest.raises(ValueError, match=r"one of h200, .* or cpu") as raised:
        device_named(name)
    assert repr(name) in str(raised.value)


def test_driver_figures_win_over_the_table(drivers: dict[int, Any]) -> None:
    """An H200 with fewer multiprocessors (MIG, say) is planned as what it is; its FLOP/s come from the table."""
    drivers[0] = SimpleNamespace(**{**vars(H200), "multi_processor_count": 60})
    d = running_device(torch.device("cuda", 0))
    assert (d.name, d.arch, d.sms, d.smem) == ("NVIDIA H200", (9, 0), 60, 232448)
    assert d.bandwidth == pytest.approx(4.81e12, rel=0.01)  # 2 x 3.2 GHz x 752 bytes
    assert d.matmul_flops == DEVICES["h200"].matmul_flops


def test_driver_without_memory_clock_falls_back_to_the_table(drivers: dict[int, Any]) -> None:
    """Newer drivers report no memory clock."""
    drivers[0] = SimpleNamespace(**{**vars(H200), "memory_clock_rate": 0})
    assert running_device(torch.device("cuda", 0)).bandwidth == DEVICES["h200"].bandwidth


def test_an_unknown_gpu_is_estimated_from_its_clocks(drivers: dict[int, Any]) -> None:
    """A GPU that is in no table still gets a plan: FLOP/s from multiprocessors and clock, never another's row."""
    drivers[0] = SimpleNamespace(**{**vars(H200), "name": "NVIDIA GH200 96GB", "multi_processor_count": 100})
    d = running_device(torch.device("cuda", 0))
    assert d.matmul_flops == pytest.approx(4096 * 100 * 1.98e9)
    drivers[2] = SimpleNamespace(
        name="NVIDIA Z9000", major=13, minor=7, multi_processor_count=10, L2_cache_size=2**20
    )
    d = running_device(torch.device("cuda", 2))
    assert (d.arch, d.sms, d.smem) == ((13, 7), 10, 99 * 1024)
    assert d.bandwidth > 0
    assert d.matmul_flops > 0


def test_the_driver_is_asked_once_a_device(drivers: dict[int, Any]) -> None:
    """Reading properties costs tens of microseconds, and a call must not pay for it; no index means the current."""
    drivers[0] = H200
    drivers[1] = SimpleNamespace(**{**vars(H200), "multi_processor_count": 66})
    for _ in range(3):
        assert running_device(torch.device("cuda")).sms == 66
        assert running_device(torch.device("cuda", 1)).sms == 66
        assert running_device(torch.device("cuda", 0)).sms == 132
    assert drivers[-1] == [1, 0]


@pytest.mark.parametrize(("value", "asked"), [("1", True), ("0", False), ("", False), (None, False)])
def test_interpreter_is_asked_for_by_1_only(
    monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool
) -> None:
    """As Triton reads TRITON_INTERPRET."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert device.interpreter_requested() is asked
