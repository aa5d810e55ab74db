"""The definition of the result, in plain PyTorch at float64.

Every backend is tested against this file. It is written to be read, not to be fast: one sequence at a time,
the whole score matrix at once, every rule on a line of its own.
"""

from __future__ import annotations

import torch

from headfold.problem import Inputs


def attention(x: Inputs, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over any layout.

    Args:
        x: the arguments of the call; shapes as `Inputs` says.
        dtype: the precision of every step. With the inputs' own dtype this is the plain attention that the
            accuracy rule compares with.

    Returns:
        out, of `x.out_shape`, and the LSE, of `x.lse_shape`, both of `dtype`. Rows of q that lie past
        `seqused_q` are zero and -inf.
    """
    out = torch.zeros(x.out_shape, dtype=dtype, device=x.q.device)
    lse = torch.full(x.lse_shape, float("-inf"), dtype=dtype, device=x.q.device)
    for i in range(x.batch):
        q = queries_of(x, i).to(dtype)
        k, v = (t.to(dtype) for t in keys_of(x, i))
        seen = visible(q.shape[0], k.shape[0], x.window_left, x.window_right, x.bottom_right).to(q.device)
        o, s = attend(q, k, v, x.scale, seen)
        n = q.shape[0]
        if x.cu_seqlens_q is None:
            out[i, :n], lse[i, :, :n] = o, s
        else:
            first = int(x.cu_seqlens_q[i])
            out[first : first + n], lse[:, first : first + n] = o, s
    return out, lse


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence.

    Args:
        q: (sq, h, d); k: (sk, hk, d); v: (sk, hk, dv). Query head i reads KV head i // (h // hk).
        scale: factor on the scores.
        seen: (sq, sk) bool, which keys each query sees.

    Returns:
        out (sq, h, dv) and LSE (h, sq), natural logarithm. A row that sees no key is 0, with LSE -inf.
    """
    group = q.shape[1] // k.shape[1]
    unseen = ~seen.any(0)[:, None, None]  # a key that no query sees does not count, whatever it holds
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = scores.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1) if k.shape[0] else scores.new_full(scores.shape[:2], float("-inf"))
    p = torch.exp(scores - lse.unsqueeze(-1))
    p = torch.where(seen, p, torch.zeros_like(p))  # a row with no key: exp(-inf + inf) is NaN, and means 0
    return torch.einsum("hqk,khd->qhd", p, v), lse


def visible(sq: int, sk: int, left: int, right: int, bottom_right: bool) -> torch.Tensor:
    """The mask (sq, sk): key j is seen by query i iff i + shift - left <= j <= i + shift + right.

    shift is sk - sq when the diagonal ends bottom-right, else 0; a side of -1 is open.
    """
    i = torch.arange(sq).unsqueeze(1) + (sk - sq if bottom_right else 0)
    j = torch.arange(sk).unsqueeze(0)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    return seen


def queries_of(x: Inputs, i: int) -> torch.Tensor:
    """The queries of sequence i that count, (sq_i, h, d)."""
    if x.cu_seqlens_q is None:
        q = x.q[i]
    else:
        q = x.q[int(x.cu_seqlens_q[i]) : int(x.cu_seqlens_q[i + 1])]
    return q if x.seqused_q is None else q[: int(x.seqused_q[i])]


def keys_of(x: Inputs, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of sequence i that count, (sk_i, hk, d) and (sk_i, hk, dv), whatever the layout."""
    if x.page_table is not None:
        n = int(x.seqused_k[i]) if x.seqused_k is not None else _slot(x.cu_seqlens_k, i)
        pages = x.page_table[i, : -(-n // x.k.shape[1])].long()
        return x.k[pages].flatten(0, 1)[:n], x.v[pages].flatten(0, 1)[:n]
    if x.cu_seqlens_k is None:
        k, v = x.k[i], x.v[i]
    else:
        first, last = int(x.cu_seqlens_k[i]), int(x.cu_seqlens_k[i + 1])
        k, v = x.k[first:last], x.v[first:last]
    n = k.shape[0] if x.seqused_k is None else int(x.seqused_k[i])
    return k[:n], v[:n]


def _slot(offsets: torch.Tensor | None, i: int) -> int:
    assert offsets is not None, "check() lets a paged cache through only with lengths"
    return int(offsets[i + 1]) - int(offsets[i])


def combine(out_partial: torch.Tensor, lse_partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge finished states along the first dimension, at float64.

    Args:
        out_partial: (splits, ..., d).
        lse_partial: (splits, ...); -inf means a state that saw no key, whose output does not count.

    Returns:
        out (..., d) and LSE (...); 0 and -inf where no state saw a key.
    """
    out, lse_partial = out_partial.double(), lse_partial.double()
    lse = torch.logsumexp(lse_partial, dim=0)
    weight = torch.exp(lse_partial - lse)
    weight = torch.where(lse_partial == float("-inf"), torch.zeros_like(weight), weight).unsqueeze(-1)
    return torch.where(weight > 0, out * weight, torch.zeros_like(out)).sum(0), lse
