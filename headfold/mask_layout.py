"""What of a mask is there to read: a mask that broadcasts has fewer elements than its shape says."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headfold.problem import Inputs


def mask_sizes(x: Inputs) -> tuple[int, int, int, int]:
    """(sequences, heads, queries, keys) of checked inputs' mask that differ, 1 for what is expanded; zeros without one.

    Where lengths or padding are given, sequences differ in how much of the mask counts, whatever it holds.
    """
    if x.mask is None:
        return 0, 0, 0, 0
    given = any(t is not None for t in (x.seqused_q, x.seqused_k, x.cache_leftpad))
    b, h, sq, sk = (1 if s == 0 else n for n, s in zip(x.mask.shape, x.mask.stride(), strict=True))
    return x.batch if given else b, h, sq, x.mask.shape[3]
