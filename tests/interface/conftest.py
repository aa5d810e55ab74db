"""What calls hand on, without running it."""

from __future__ import annotations

import pytest

from headfold.problem import Inputs
from tests.recording import run_instead


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The checked inputs of every call, which go no further."""
    calls: list[Inputs] = []
    run_instead(monkeypatch, lambda x, out, lse: calls.append(x))
    return calls
