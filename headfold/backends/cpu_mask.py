"""What queries of a run of sequences see and what is added to their scores, one block of pairs at a time.

Nothing of a mask's full size is ever made: a block is cut out of the caller's tensors where they lie, and a
dimension along which a mask is expanded (stride 0) stays of size 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfold.backends.cpu_band import Band
from headfold.backends.cpu_states import NEG_INF
from headfold.problem import Inputs


@dataclass(frozen=True, slots=True)
class Block:
    """Positions x keys: seen bool and bias float32, (n | 1, hk | 1, p | 1, G | 1, e); None for all seen and for 0."""

    seen: torch.Tensor | None
    bias: torch.Tensor | None

    def keys_seen(self) -> torch.Tensor | None:
        """Bool (n | 1, hk | 1, e): the keys of a head that some of its queries sees; None for all of them."""
        return None if self.seen is None else self.seen.flatten(2, 3).any(2)

    def live(self, positions: int, group: int) -> torch.Tensor | None:
        """Bool (n | 1, hk | 1, p * G): the folded rows that see some key; None for all of them."""
        if self.seen is None:
            return None
        return _rows(self.seen.any(-1, keepdim=True), positions, group).squeeze(-1)

    def added(self, dtype: torch.dtype, positions: int, group: int) -> torch.Tensor | None:
        """What is added to the scaled scores of folded rows, (n | 1, hk | 1, p * G, e), -inf where a key is hidden.

        Of `dtype`, or float32 with a bias.
        """
        added = self.bias
        if self.seen is not None:
            hidden = torch.tensor(NEG_INF, dtype=dtype if added is None else added.dtype)
            added = torch.where(self.seen, torch.zeros_like(hidden) if added is None else added, hidden)
        return None if added is None else _rows(added, positions, group)


@dataclass(frozen=True, slots=True)
class Masks:
    """All that hides keys from n sequences of equal lengths or biases their scores, in the order of folded rows.

    tree: bool (n, sq, sq); slopes: float32 (n | 1, hk, 1, G, 1); mask: (n | 1, hk | 1, sq | 1, G | 1, sk | 1).
    """

    band: Band
    tree: torch.Tensor | None
    slopes: torch.Tensor | None
    mask: torch.Tensor | None

    @classmethod
    def of(cls, x: Inputs, band: Band, batch: slice) -> Masks:
        """The masks of those sequences of x; mask rows and columns past the band's lengths are not read."""
        heads = (x.k.shape[-2], x.q.shape[-2] // x.k.shape[-2])
        slopes, mask = x.alibi_slopes, x.mask
        if slopes is not None:
            slopes = slopes.unsqueeze(0) if slopes.dim() == 1 else slopes[batch]
            slopes = slopes.unflatten(1, heads)[:, :, None, :, None]
        if mask is not None:
            mask = _unexpanded(mask[batch].unflatten(1, heads).transpose(2, 3))
        return cls(band, None if x.tree_mask is None else x.tree_mask[batch], slopes, mask)

    def block(self, first: int, last: int, start: int, end: int) -> Block:
        """Queries first..last-1 against keys start..end-1."""
        band, seen, bias = self.band, None, None
        if not band.is_full(first, last, start, end):
            seen = band.visible(first, last, start, end)[None, None, :, None]
        newest = max(start, band.sk - min(band.sq, band.sk))
        if self.tree is not None and newest < end:
            shift = band.sk - band.sq
            tree = self.tree[:, None, first:last, None, newest - shift : end - shift]
            listed = tree.new_ones((*tree.shape[:-1], end - start))
            listed[..., newest - start :] = tree
            seen = _both(seen, listed)
        if self.slopes is not None:
            distance = torch.arange(start, end) - torch.arange(first, last).unsqueeze(1) - band.diagonal
            bias = -self.slopes * distance.abs().float()[:, None]
        if self.mask is not None:
            mask = _cut(_cut(self.mask, 2, first, last), 4, start, end).expand(-1, -1, -1, -1, end - start)
            if mask.dtype == torch.bool:
                seen = _both(seen, mask)
            else:
                seen = _both(seen, mask > NEG_INF)
                bias = mask.float() if bias is None else bias + mask.float()
        return Block(seen, bias)


def _rows(t: torch.Tensor, positions: int, group: int) -> torch.Tensor:
    """t (n | 1, hk | 1, p | 1, G | 1, e) for folded rows, (n | 1, hk | 1, p * G, e)."""
    return t.expand(-1, -1, positions, group, -1).flatten(2, 3)


def _both(seen: torch.Tensor | None, also: torch.Tensor) -> torch.Tensor:
    return also if seen is None else seen & also


def _unexpanded(t: torch.Tensor) -> torch.Tensor:
    """t with size 1 in every dimension along which it is expanded."""
    for dim, stride in enumerate(t.stride()):
        if stride == 0:
            t = t.narrow(dim, 0, min(1, t.shape[dim]))
    return t


def _cut(t: torch.Tensor, dim: int, start: int, end: int) -> torch.Tensor:
    """start..end-1 along a dimension, or all of it where it is expanded."""
    return t if t.stride(dim) == 0 else t.narrow(dim, start, end - start)
