"""Small cases and small ceilings, so that the benchmark runs from end to end in a moment."""

from __future__ import annotations

import pytest

from headfold.bench import ceilings, inputs, measure, session
from headfold.bench.cases import Case

TINY = (
    Case("tiny-decode", "decode", 8, 2, 32, 32, 2, 1, 96, dtype="fp32"),
    Case("tiny-paged", "paged decode", 8, 2, 32, 32, 2, 1, 50, page_size=16),
    Case("tiny-ragged", "ragged decode", 8, 2, 32, 32, 3, 1, 70, (70, 1, 33)),
    Case("tiny-ragged-paged", "ragged decode", 8, 2, 32, 32, 3, 1, 70, (5, 70, 33), 4),
    Case("tiny-speculative", "speculative", 8, 2, 32, 32, 1, 4, 90, causal=True),
    Case("tiny-prefill", "prefill", 8, 2, 32, 32, 1, 200, 200, causal=True),
    Case("tiny-mha", "prefill", 3, 3, 32, 16, 1, 40, 60),
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[Case, ...]:
    """Let the command line find the tiny cases instead of the catalogue."""
    monkeypatch.setattr(session, "catalogue", lambda device, suite="all": TINY)
    monkeypatch.setattr(ceilings.CpuCeilings, "LARGE_BYTES", 1 << 25)
    monkeypatch.setattr(ceilings.CpuCeilings, "MATMUL_SIZE", 128)
    monkeypatch.setattr(inputs, "CPU_COPIES_BYTES", 1 << 17)
    monkeypatch.setattr(measure, "CPU_RUN_US", 100.0)
    monkeypatch.setattr(measure, "CPU_BUDGET_US", 1e4)
    return TINY
