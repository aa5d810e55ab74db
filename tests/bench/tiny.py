"""Small cases and small ceilings, so that the benchmark runs from end to end in a moment."""

from __future__ import annotations

import pytest

from headfold.bench import ceilings, inputs, measure, session
from headfold.bench.cases import Case
from headfold.bench.features import Features

TINY = (
    Case("tiny-decode", "decode", 8, 2, 32, 32, 2, 1, 96, dtype="fp32"),
    Case("tiny-paged", "paged decode", 8, 2, 32, 32, 2, 1, 50, page_size=16),
    Case("tiny-ragged", "ragged decode", 8, 2, 32, 32, 3, 1, 70, (70, 1, 33)),
    Case("tiny-ragged-paged", "ragged decode", 8, 2, 32, 32, 3, 1, 70, (5, 70, 33), 4),
    Case("tiny-speculative", "speculative", 8, 2, 32, 32, 1, 4, 90, causal=True),
    Case("tiny-prefill", "prefill", 8, 2, 32, 32, 1, 200, 200, causal=True),
    Case("tiny-prefill-paged", "prefill", 8, 2, 32, 32, 2, 60, 60, page_size=16, causal=True),
    Case("tiny-mha", "prefill", 3, 3, 32, 16, 1, 40, 60),
    Case("tiny-prefix", "paged decode", 8, 2, 32, 32, 3, 1, 50, page_size=16, shared=32),
    Case(
        *("tiny-mixed", "ragged prefill", 8, 2, 32, 32, 3, 30, 70, (70, 33, 40)),
        causal=True,
        queries=(1, 9, 30),
    ),
)


def _tiny(name: str, sq: int, sk: int, features: Features, base: str, causal: bool = False) -> Case:
    kind = "speculative" if sq > 1 else "decode"
    return Case(
        f"tiny-{name}",
        kind,
        8,
        2,
        32,
        32,
        2,
        sq,
        sk,
        causal=causal,
        dtype="fp32",
        features=features,
        base=base,
    )


# Every feature once, and most of them together, beside the first tiny case or one of their own.
TINY_FEATURES = (
    _tiny("sink", 1, 96, Features(sink=True), "tiny-decode"),
    _tiny("softcap", 1, 96, Features(softcap=2.0), "tiny-decode"),
    _tiny("alibi", 1, 96, Features(alibi=True), "tiny-decode"),
    _tiny("window", 1, 200, Features(window=96), "tiny-decode"),
    _tiny("everything", 1, 200, Features(sink=True, softcap=2.0, alibi=True, window=96), "tiny-decode"),
    _tiny("split", 1, 96, Features(tokens_per_split=32), "tiny-decode"),
    _tiny("cache", 1, 96, Features(cache=True), "tiny-decode"),
    _tiny("append", 1, 96, Features(cache=True, append=True), "tiny-cache"),
    _tiny("append-rotary", 1, 96, Features(cache=True, append=True, rotary=True), "tiny-cache"),
    _tiny("append-4", 4, 96, Features(cache=True, append=True, rotary=True), "tiny-cache", causal=True),
    _tiny("tree", 4, 96, Features(cache=True, tree=True), "tiny-cache"),
    Case(
        "tiny-bias", "prefill", 8, 2, 32, 32, 1, 80, 80, features=Features(mask="additive"), base="tiny-mha"
    ),
    Case(
        "tiny-texts", "prefill", 8, 2, 32, 32, 1, 80, 80, features=Features(mask="documents"), base="tiny-mha"
    ),
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
