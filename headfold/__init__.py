"""headfold: attention for grouped-query models that reads every K/V byte once.

The public names load on first use, so that `headfold --help` does not wait for PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headfold.interface import (
        flash_attn_combine,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
    )
    from headfold.sdpa import scaled_dot_product_attention

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headfold' has no attribute {name!r}")
    from headfold import interface, sdpa

    value = getattr(sdpa if name == "scaled_dot_product_attention" else interface, name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
