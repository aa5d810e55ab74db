"""headfold: attention for grouped-query models that reads every K/V byte once."""

from headfold.interface import (
    flash_attn_combine,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from headfold.sdpa import scaled_dot_product_attention

__version__ = "0.1.0"

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "scaled_dot_product_attention",
]
