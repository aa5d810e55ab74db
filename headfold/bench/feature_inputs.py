"""The tensors that a case's features need: sinks, slopes, masks, new tokens, angles."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headfold.bench.cases import Case
from headfold.bench.features import DOCUMENTS


@dataclass(slots=True)
class FeatureInputs:
    """What the features of a case are computed from; None where the case does not have them.

    `sink` and `slopes` (h,) float32; `mask` (1, h, sq, sk) in q's dtype or (1, 1, sq, sk) bool; `tree` (b, sq, sq)
    bool; `k_new`, `v_new` (b, sq, hk, .), the tokens of the cache's last sq places; `cos`, `sin` (sk, d / 2) in q's
    dtype, whose pairs are the halves of a head; `before` (b,) int32, the keys of every sequence before an append.
    """

    sink: torch.Tensor | None = None
    slopes: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    tree: torch.Tensor | None = None
    k_new: torch.Tensor | None = None
    v_new: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    before: torch.Tensor | None = None


def mask_bytes(case: Case) -> int:
    """Memory that the mask tensor of a case takes."""
    if case.features.mask == "additive":
        return case.heads * case.sq * case.sk * case.torch_dtype.itemsize
    return case.sq * case.sk if case.features.mask else 0


def make_features(case: Case, device: torch.device, gen: torch.Generator) -> FeatureInputs:
    """Draw what the case's features need."""
    f, dtype = case.features, case.torch_dtype
    x = FeatureInputs()

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device, dtype=dtype)

    if f.sink:
        x.sink = randn(case.heads).float()
    if f.alibi:  # the slopes of the paper (Press et al. 2021), for any number of heads
        x.slopes = torch.exp2(-8.0 * torch.arange(1, case.heads + 1, device=device) / case.heads)
    if f.mask == "additive":
        x.mask = randn(1, case.heads, case.sq, case.sk)
    if f.mask == "documents":
        text = torch.arange(case.sk, device=device) // (case.sk // DOCUMENTS)
        x.mask = (text.unsqueeze(1) == text).tril()[None, None]
    if f.tree:
        x.tree = _tree(case).to(device)
    if f.append:
        x.k_new = randn(case.batch, case.sq, case.kv_heads, case.d)
        x.v_new = randn(case.batch, case.sq, case.kv_heads, case.dv)
        x.before = torch.full((case.batch,), case.sk - case.sq, dtype=torch.int32, device=device)
    if f.rotary:
        frequency = 10000.0 ** (-torch.arange(0, case.d, 2, device=device) / case.d)
        angle = torch.arange(case.sk, device=device).unsqueeze(1) * frequency
        x.cos, x.sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return x


def _tree(case: Case) -> torch.Tensor:
    """A random tree of drafts for each sequence: a token sees its ancestors and itself. (b, sq, sq) bool."""
    draw = torch.Generator().manual_seed(0)
    tree = torch.zeros(case.batch, case.sq, case.sq, dtype=torch.bool)
    for b in range(case.batch):
        for i in range(case.sq):
            if i:
                tree[b, i] = tree[b, int(torch.randint(i, (1,), generator=draw))]
            tree[b, i, i] = True
    return tree
