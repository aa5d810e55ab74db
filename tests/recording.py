"""Calls that go no further than the backends: what would have run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from headfold import backends, prepared
from headfold.problem import Inputs


def run_instead(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[Inputs, torch.Tensor, torch.Tensor], None]
) -> None:
    """Checked calls of the attention operators come to `run` with (inputs, out, lse). Nothing is found."""
    monkeypatch.setattr(prepared, "find", lambda facts: None)
    monkeypatch.setattr(backends, "prepare", lambda x, out, lse: run)
