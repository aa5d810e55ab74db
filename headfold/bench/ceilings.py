"""What this machine can do at best: memory read and matrix products, measured in the run of the cases."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from headfold.bench.inputs import CACHE_MULTIPLE
from headfold.bench.machine import free_memory, last_level_cache
from headfold.bench.measure import playable, quantile, timed

REPEATS = 20


class CudaCeilings:
    """Ceilings of a GPU. Each is measured once, when first asked for."""

    LARGE_BYTES = 8 << 30
    MATMUL_SIZE = 8192

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._read: dict[int, float] = {}
        self._matmul: dict[torch.dtype, float] = {}

    def read_us(self, nbytes: int) -> float:
        """The time to read that many bytes once, none of them cached, with nothing else done."""
        if nbytes not in self._read:
            self._read[nbytes] = self._measure_read(nbytes)
        return self._read[nbytes]

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large square matrix product."""
        if dtype not in self._matmul:
            n = self.MATMUL_SIZE
            a, b = (torch.randn(n, n, device=self.device, dtype=dtype) for _ in range(2))
            out = torch.empty_like(a)
            us = self._replay_us(lambda _: torch.mm(a, b, out=out), copies=1, run_us=0.0)
            self._matmul[dtype] = 2 * n**3 / us / 1e6
        return self._matmul[dtype]

    def record(self) -> dict[str, Any]:
        """The general ceilings, as plain data for a result file."""
        large = min(self.LARGE_BYTES, free_memory(self.device) // 4)
        return {
            "read_gbps": large / self.read_us(large) / 1e3,
            "read_bytes": large,
            "matmul_tflops": self.matmul_tflops(torch.bfloat16),
            "matmul_dtype": "bf16",
        }

    def _measure_read(self, nbytes: int) -> float:
        from headfold.bench.read_kernel import CONFIGS, LARGEST_BLOCK, read

        n = max(1, nbytes // 2 // LARGEST_BLOCK) * LARGEST_BLOCK
        copies = max(1, -(-CACHE_MULTIPLE * last_level_cache(self.device) // (2 * n)))
        source = torch.empty(copies, n, device=self.device, dtype=torch.bfloat16).normal_()
        sms = torch.cuda.get_device_properties(self.device).multi_processor_count
        sums = torch.empty(sms * max(c.programs for c in CONFIGS), device=self.device)

        def call_with(config: Any) -> Callable[[int], torch.Tensor]:
            def call(i: int) -> torch.Tensor:
                read(source[i], sums, config, sms * config.programs)
                return sums

            return call

        best = min(self._replay_us(call_with(c), copies, run_us=1000.0) for c in CONFIGS)
        return best * nbytes / (2 * n)

    def _replay_us(self, call: Callable[[int], torch.Tensor], copies: int, run_us: float) -> float:
        play, n, _ = playable(call, copies, run_us)
        pairs = [timed(play) for _ in range(REPEATS + 2)][2:]
        torch.cuda.synchronize()
        return quantile(sorted(a.elapsed_time(z) * 1e3 for a, z in pairs), 0.5) / n


class CpuCeilings:
    """Ceilings of a CPU: the fastest of PyTorch's own ways to read memory, and a matrix product."""

    LARGE_BYTES = 2 << 30
    MATMUL_SIZE = 2048

    def __init__(self) -> None:
        self._read_gbps = 0.0
        self._matmul: dict[torch.dtype, float] = {}

    def read_us(self, nbytes: int) -> float:
        """The time to read that many bytes once at the rate of a buffer well beyond the cache."""
        if not self._read_gbps:
            self._read_gbps = self._measure_read()
        return nbytes / self._read_gbps / 1e3

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        """TFLOP/s of one large square matrix product."""
        if dtype not in self._matmul:
            n = self.MATMUL_SIZE
            a, b = (torch.randn(n, n, dtype=torch.float32).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            self._matmul[dtype] = 2 * n**3 / _best_us(lambda: torch.mm(a, b, out=out)) / 1e6
        return self._matmul[dtype]

    def record(self) -> dict[str, Any]:
        """The general ceilings, as plain data for a result file."""
        large = self._large()
        return {
            "read_gbps": large / self.read_us(large) / 1e3,
            "read_bytes": large,
            "matmul_tflops": self.matmul_tflops(torch.bfloat16),
            "matmul_dtype": "bf16",
        }

    def _large(self) -> int:
        beyond_cache = CACHE_MULTIPLE * last_level_cache(torch.device("cpu"))
        return min(
            max(self.LARGE_BYTES // 2, beyond_cache), self.LARGE_BYTES, free_memory(torch.device("cpu")) // 4
        )

    def _measure_read(self) -> float:
        width = 4096
        block = torch.randn(1024, width)
        rows = self._large() // 4 // width // block.shape[0] * block.shape[0]
        source = torch.empty(rows, width)
        source.view(-1, *block.shape).copy_(block)
        vector = torch.randn(width)
        flat, half = source.view(-1), source.numel() // 2
        ways: tuple[Callable[[], object], ...] = (
            source.sum,
            source.amax,
            lambda: torch.mv(source, vector),
            lambda: torch.dot(flat[:half], flat[half:]),
        )
        return source.numel() * 4 / min(_best_us(way) for way in ways) / 1e3


def _best_us(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    run()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e6)
    return min(times)


Ceilings = CudaCeilings | CpuCeilings


def ceilings_of(device: torch.device) -> Ceilings:
    """The ceilings of a device, not yet measured."""
    return CudaCeilings(device) if device.type == "cuda" else CpuCeilings()
