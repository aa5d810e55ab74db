"""Signatures are those that callers of FlashAttention-3 know, with headfold's own arguments behind them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch  # noqa: F401 - the signatures name its dtypes

from tests.interface.functions import FUNCTIONS, SIGNATURES


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_the_one_callers_know(name: str) -> None:
    expected = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None".replace("\n", " ")))
    found = inspect.signature(FUNCTIONS[name])

    def facts(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert facts(found) == facts(expected)
