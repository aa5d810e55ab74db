"""What calls hand on, without running it."""

from __future__ import annotations

import pytest

from headfold import backends
from headfold.problem import Inputs


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Inputs]:
    """The checked inputs of every call, which go no further."""
    calls: list[Inputs] = []
    monkeypatch.setattr(backends, "run", lambda x, out, lse: calls.append(x))
    return calls
