"""What the benchmark must know of the machine it runs on: caches, free memory, versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from headfold.planner import running_device

_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1024, "M": 1024**2, "G": 1024**3}


def last_level_cache(device: torch.device) -> int:
    """Bytes of the cache nearest to memory; 32 MiB where a CPU does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_size(p.read_text().strip()) for p in _CPU_CACHES.glob("index*/size")]
    return max(sizes, default=32 * 1024**2)


def _size(text: str) -> int:
    return int(text[:-1]) * _UNITS[text[-1]] if text[-1] in _UNITS else int(text)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor on the device may take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device's name and the numbers that a reader of a result needs."""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": p.name,
            "arch": f"sm_{p.major}{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "cache_bytes": last_level_cache(device),
            "own_tiles": len(running_device(device).tiles),
            **_driver_facts(str(p.uuid)),
        }
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    return {
        "type": "cpu",
        "name": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "cache_bytes": last_level_cache(device),
    }


def _driver_facts(uuid: str) -> dict[str, str]:
    fields = ("driver_version", "clocks.max.sm", "power.limit")
    text = _output(
        ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", f"GPU-{uuid}"]
    )
    values = [v.strip() for v in (text or "").split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


class OtherWork:
    """Watches whether other processes take the cores that times on a CPU are measured with."""

    def __init__(self) -> None:
        self._start = self._now()

    def disturbs(self) -> bool:
        """True if, since this was made, other work left too few cores for PyTorch's threads."""
        busy, own, seconds = (now - start for now, start in zip(self._now(), self._start, strict=True))
        spare = (os.cpu_count() or 1) - torch.get_num_threads()
        return seconds > 0 and (busy - own) / seconds > spare + 0.2

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Core seconds of everything and of this process, and the time."""
        words = (_lines("/proc/stat") or ["cpu"])[0].split()[1:]
        ticks = [int(n) for i, n in enumerate(words[:8]) if i not in (3, 4)]  # without idle and waiting
        times = os.times()
        return sum(ticks) / os.sysconf("SC_CLK_TCK"), times.user + times.system, times.elapsed


def versions() -> dict[str, str | None]:
    """Versions of everything that a time depends on; None for what is not there."""
    import headfold

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "headfold": headfold.__version__,
    }


def commit() -> str | None:
    """The commit that headfold runs from, with "-dirty" where files differ; None outside its checkout."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    if _output([*git, "ls-files", "--error-unmatch", Path(__file__).name]) is None:
        return None  # installed inside someone else's checkout
    head = _output([*git, "rev-parse", "HEAD"])
    changes = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return None if head is None else head + ("-dirty" if changes else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
