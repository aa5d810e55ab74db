"""Extras: what a call asks beyond dense attention with a mask, in the words that a plan gives as its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from headfold.problem import Inputs


# Rows that begin so many bytes behind the first are out of reach of 32 bits with a sign, in units of 16 bytes.
FAR = 2**35
FAR_CACHE = "a cache of more than 32 GiB"


def extras_of(x: Inputs, out: torch.Tensor | None) -> tuple[str, ...]:
    """Everything about checked inputs that a kernel for common calls may leave to a general one, in a fixed order."""
    scale = x.softmax_scale
    told = (
        (x.sink is not None, "a sink"),
        (x.alibi_slopes is not None, "ALiBi slopes"),
        (x.softcap > 0, "a softcap"),
        (x.attention_chunk > 0, "attention chunks"),
        (x.tree_mask is not None, "a tree mask"),
        (x.cache_batch_idx is not None, "cache_batch_idx"),
        (x.cache_leftpad is not None, "cache_leftpad"),
        (x.rotary_cos is not None, "a rotation of q"),
        (scale is not None and scale < 0, "a negative softmax scale"),
        (any(_expanded(t) for t in (x.q, x.k, x.v)), "an expanded tensor"),
        (x.page_table is not None and x.k.shape[0] == 0, "cache without a page"),
        (x.page_table is not None and max(_reach(x.k), _reach(x.v)) >= FAR, FAR_CACHE),
        (
            not all(_copy_engine_strides(t) for t in (x.q, x.k, x.v)),
            "strides that the copy engine cannot walk",
        ),
        (x.mask is not None and x.mask.element_size() > 2, "a float32 mask"),
        # Boxes begin at multiples of 16 bytes in a row: the copy engine stops with an illegal instruction elsewhere.
        (x.mask is not None and x.window_left >= 0, "a mask within a left window"),
        (x.mask is not None and not mask_boxes(x.mask), "a mask without rows of 16-byte multiples"),
    )
    return tuple(word for true, word in told if true)


def mask_boxes(mask: torch.Tensor) -> bool:
    """True when the copy engine can fetch boxes of a mask (b, h, sq, sk); batch and heads may be expanded."""
    if mask.stride(3) != 1 or mask.data_ptr() % 16:
        return False
    size = mask.element_size()
    pairs = zip(mask.shape[:3], mask.stride()[:3], strict=True)
    return all(n == 1 or s * size % 16 == 0 for n, s in pairs) and (mask.shape[2] == 1 or mask.stride(2) > 0)


def _expanded(t: torch.Tensor) -> bool:
    return any(n > 1 and s == 0 for n, s in zip(t.shape, t.stride(), strict=True))


def _reach(t: torch.Tensor) -> int:
    """Bytes from the first row of a tensor to its last."""
    return sum((n - 1) * s for n, s in zip(t.shape[:-1], t.stride()[:-1], strict=True)) * t.element_size()


def _copy_engine_strides(t: torch.Tensor) -> bool:
    """Strides of 16-byte multiples below 2**40 bytes; those of dimensions of size 1 do not matter."""
    size = t.element_size()
    pairs = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    return t.data_ptr() % 16 == 0 and all(
        n <= 1 or (s * size % 16 == 0 and 0 <= s * size < 2**40) for n, s in pairs
    )
