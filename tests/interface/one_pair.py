"""Attention computed one (query, key) pair at a time from the rules in words: a second opinion on reference.py.

Python floats and loops, no matrix, no shared code: what both this and the reference say is the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

INF = math.inf


@dataclass(frozen=True)
class Rules:
    """What a call asks for; None or 0 is off. `mask` is (h, sq, sk), `tree` (sq, sq) over the newest keys."""

    scale: float | None = None
    left: int | None = None
    right: int | None = None
    softcap: float = 0.0
    chunk: int = 0
    slopes: torch.Tensor | None = None
    sink: torch.Tensor | None = None
    tree: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    top_left: bool = False


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """out (sq, h, dv) and LSE (h, sq) of q (sq, h, d), k (sk, hk, d) and v (sk, hk, dv), float64 on the CPU."""
    q, k, v = (t.detach().cpu().double() for t in (q, k, v))
    (sq, h, d), (sk, hk, _) = q.shape, k.shape
    out = torch.zeros(sq, h, v.shape[-1], dtype=torch.float64)
    lse = torch.full((h, sq), -INF, dtype=torch.float64)
    scale = d**-0.5 if rules.scale is None else rules.scale
    for i in range(sq):
        for head in range(h):
            scores = {
                j: score
                for j in range(sk)
                if (score := _score(q[i, head], k[j, head // (h // hk)], scale, rules, head, i, j, sq, sk))
                > -INF
            }
            logits = [*scores.values(), *([] if rules.sink is None else [float(rules.sink[head])])]
            if not logits or max(logits) == -INF:
                continue
            lse[head, i] = max(logits) + math.log(sum(math.exp(x - max(logits)) for x in logits))
            for j, score in scores.items():
                out[i, head] += math.exp(score - float(lse[head, i])) * v[j, head // (h // hk)]
    return out, lse


def _score(
    q: torch.Tensor, k: torch.Tensor, scale: float, r: Rules, head: int, i: int, j: int, sq: int, sk: int
) -> float:
    """The score of one pair, -inf where the query does not see the key."""
    at = i if r.top_left else i + sk - sq
    if r.left is not None and j < at - r.left:
        return -INF
    if r.right is not None and j > at + r.right:
        return -INF
    if r.chunk and at // r.chunk != j // r.chunk:
        return -INF
    if r.tree is not None and j >= sk - sq and not r.tree[i, j - (sk - sq)]:
        return -INF
    score = sum(a * b for a, b in zip(q.tolist(), k.tolist(), strict=True)) * scale
    if r.softcap:
        score = r.softcap * math.tanh(score / r.softcap)
    if r.slopes is not None:
        score -= float(r.slopes[head]) * abs(at - j)
    if r.mask is not None:
        entry = r.mask[head, i, j]
        if r.mask.dtype == torch.bool:
            return score if entry else -INF
        score += float(entry)
    return score


def rotate(
    x: torch.Tensor, position: int, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """x (heads, d) at one position, pair by pair; columns past rotary_dim stay."""
    half, out = cos.shape[1], x.detach().cpu().double().clone()
    for j in range(half):
        a, b = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
        c, s = float(cos[position, j]), float(sin[position, j])
        out[:, a], out[:, b] = out[:, a] * c - out[:, b] * s, out[:, b] * c + out[:, a] * s
    return out
