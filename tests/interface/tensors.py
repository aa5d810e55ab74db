"""Small tensors of the interface tests."""

from __future__ import annotations

from typing import Any

import torch


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def bits(t: torch.Tensor) -> torch.Tensor:
    """A copy of every byte, which compares NaN too."""
    return t.detach().flatten().clone().view(torch.uint8)


def placed(fields: dict[str, Any], device: str) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
