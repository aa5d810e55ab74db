"""Device: the numbers of the machine that a plan is made for. Never literals in a kernel or a heuristic."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from headfold.planner.tuned import Entry, check_entries
from headfold.planner.tuned_file import entries_in_force


@dataclass(frozen=True, slots=True)
class Device:
    """What the planner needs to know of a machine.

    `arch` is the CUDA compute capability, (0, 0) for a CPU. `sms` counts multiprocessors (CPU: cores);
    `smem` is the shared memory one program may use, in bytes; `l2` the last-level cache in bytes;
    `bandwidth` the memory's peak in bytes/s; `matmul_flops` dense bf16 FLOP/s. `tiles` are the machine's own decode
    tiles, where it has measured any.
    """

    name: str
    arch: tuple[int, int]
    sms: int
    smem: int
    l2: int
    bandwidth: float
    matmul_flops: float
    tiles: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        check_entries(self.tiles)

    @property
    def starts_early(self) -> bool:
        """True where a kernel can be launched while the one before it ends: programmatic dependent launch."""
        return self.arch >= (9, 0)

    @property
    def is_cpu(self) -> bool:
        """True for the CPU backend's device."""
        return self.arch == (0, 0)


_KB, _MB, _GB, _TF = 1024, 1024**2, 1e9, 1e12

# Vendor datasheet figures (dense bf16 without sparsity), and shared memory per program from the CUDA
# programming guide's table of compute capabilities.
DEVICES: dict[str, Device] = {
    "h200": Device("NVIDIA H200", (9, 0), 132, 227 * _KB, 50 * _MB, 4800 * _GB, 989 * _TF),
    "h100": Device("NVIDIA H100 SXM", (9, 0), 132, 227 * _KB, 50 * _MB, 3350 * _GB, 989 * _TF),
    "a100": Device("NVIDIA A100 80GB SXM", (8, 0), 108, 163 * _KB, 40 * _MB, 2039 * _GB, 312 * _TF),
    "b200": Device("NVIDIA B200", (10, 0), 148, 227 * _KB, 126 * _MB, 8000 * _GB, 2250 * _TF),
    "l4": Device("NVIDIA L4", (8, 9), 58, 99 * _KB, 48 * _MB, 300 * _GB, 121 * _TF),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", (8, 9), 128, 99 * _KB, 72 * _MB, 1008 * _GB, 165 * _TF),
    "rtx5090": Device("NVIDIA GeForce RTX 5090", (12, 0), 170, 99 * _KB, 96 * _MB, 1792 * _GB, 209 * _TF),
}

# Dense bf16 FLOP per clock and multiprocessor, to estimate a GPU that is not in the table.
_FLOPS_PER_CLOCK = {(8, 0): 2048, (8, 6): 512, (8, 9): 512, (9, 0): 4096, (10, 0): 8192, (12, 0): 512}


def cpu_device() -> Device:
    """The CPU this process runs on, with as many cores as PyTorch uses threads.

    Bandwidth and FLOP/s are order-of-magnitude figures for a server core (20 GB/s, 0.2 TFLOP/s): the CPU plan
    depends on neither, `explain()` uses them and says so.
    """
    threads = torch.get_num_threads()
    return Device(
        f"CPU, {threads} threads", (0, 0), threads, 0, 2 * _MB * threads, 20e9 * threads, 2e11 * threads
    )


def device_named(name: str) -> Device:
    """The device a user named: a key of `DEVICES`, or "cpu".

    Raises:
        ValueError: no such device.
    """
    key = name.lower().replace(" ", "").replace("-", "")
    if key == "cpu":
        return cpu_device()
    if key not in DEVICES:
        raise ValueError(f"device is {name!r}; it must be one of {', '.join(DEVICES)} or cpu")
    return DEVICES[key]


_running: dict[int, Device] = {}


def running_device(device: torch.device) -> Device:
    """The device a tensor lives on, read from the driver once per process, and its own tiles from their file."""
    if device.type != "cuda":
        return cpu_device()
    index = device.index if device.index is not None else torch.cuda.current_device()
    if index not in _running:
        _running[index] = _read_driver(index)
    return _running[index]


def _read_driver(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    arch = (p.major, p.minor)
    known = next((d for d in DEVICES.values() if d.arch == arch and p.name.startswith(d.name)), None)
    clock = getattr(p, "clock_rate", 1_500_000) * 1e3
    memory_clock = getattr(p, "memory_clock_rate", 0) * 1e3
    bus_bytes = getattr(p, "memory_bus_width", 0) / 8
    bandwidth = 2 * memory_clock * bus_bytes or (known.bandwidth if known else 1e12)
    per_clock = _FLOPS_PER_CLOCK.get(arch, 1024)
    return Device(
        name=p.name,
        arch=arch,
        sms=p.multi_processor_count,
        smem=getattr(p, "shared_memory_per_block_optin", 99 * _KB),
        l2=p.L2_cache_size,
        bandwidth=bandwidth,
        matmul_flops=known.matmul_flops if known else per_clock * p.multi_processor_count * clock,
        tiles=entries_in_force(p.name, arch),
    )


def interpreter_requested() -> bool:
    """True when TRITON_INTERPRET asks Triton to run kernels on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
