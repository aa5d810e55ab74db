"""headfold: attention for grouped-query models that reads every K/V byte once.

The public names load on first use, so that `headfold --help` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headfold.interface import (
        flash_attn_combine,
        flash_attn_func,
        flash_attn_varlen_func,
        flash_attn_with_kvcache,
        get_scheduler_metadata,
    )
    from headfold.kv_cache import PagedKVCache
    from headfold.kv_pages import OutOfPages, OutOfSequences
    from headfold.sdpa import scaled_dot_product_attention
    from headfold.states import merge_states

__all__ = [
    "OutOfPages",
    "OutOfSequences",
    "PagedKVCache",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "merge_states",
    "scaled_dot_product_attention",
]

_HOMES = {
    "OutOfPages": "headfold.kv_pages",
    "OutOfSequences": "headfold.kv_pages",
    "PagedKVCache": "headfold.kv_cache",
    "merge_states": "headfold.states",
    "scaled_dot_product_attention": "headfold.sdpa",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'headfold' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "headfold.interface")), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
