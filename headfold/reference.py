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
        n, sk = q.shape[0], k.shape[0]
        seen, bias = mask_of(x, i, n, sk)
        sink = None if x.sink is None else x.sink.to(dtype)
        o, s = attend(q, k, v, x.scale, seen, bias.to(dtype), x.softcap, sink)
        if x.cu_seqlens_q is None:
            out[i, :n], lse[i, :, :n] = o, s
        else:
            first = int(x.cu_seqlens_q[i])
            out[first : first + n], lse[:, first : first + n] = o, s
    return out, lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: torch.Tensor,
    bias: torch.Tensor | float = 0.0,
    softcap: float = 0.0,
    sink: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence.

    Args:
        q: (sq, h, d); k: (sk, hk, d); v: (sk, hk, dv). Query head i reads KV head i // (h // hk).
        scale: factor on the scores.
        seen: bool, broadcast to (h, sq, sk): which keys each query sees.
        bias: added to the scaled scores, broadcast to (h, sq, sk).
        softcap: with a cap > 0 the scaled scores become cap * tanh(score / cap), before the bias.
        sink: (h,), one more logit per head in the denominator, with no value.

    Returns:
        out (sq, h, dv) and LSE (h, sq), natural logarithm. A row that sees no key is 0, with LSE -inf, or the sink.
    """
    h, group = q.shape[1], q.shape[1] // k.shape[1]
    seen = seen.expand(h, q.shape[0], k.shape[0])
    unseen = ~seen.any(0).any(0)[:, None, None]  # a key that no query sees does not count, whatever it holds
    k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~seen, float("-inf"))
    if sink is not None:
        scores = torch.cat([scores, sink[:, None, None].expand(h, q.shape[0], 1)], dim=-1)
    lse = (
        torch.logsumexp(scores, dim=-1)
        if scores.shape[-1]
        else scores.new_full(scores.shape[:2], float("-inf"))
    )
    p = torch.exp(scores - lse.unsqueeze(-1))[..., : k.shape[0]]
    p = torch.where(
        scores[..., : k.shape[0]] > float("-inf"), p, torch.zeros_like(p)
    )  # exp(-inf + inf) means 0
    return torch.einsum("hqk,khd->qhd", p, v), lse


def mask_of(x: Inputs, i: int, sq: int, sk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What query rows of sequence i see, bool, and what is added to their scores; both broadcast to (h, sq, sk)."""
    device = x.q.device
    shift = sk - sq if x.bottom_right else 0
    position = torch.arange(sq, device=device).unsqueeze(1) + shift
    key = torch.arange(sk, device=device).unsqueeze(0)
    seen = visible(sq, sk, x.window_left, x.window_right, x.bottom_right).to(device)
    if x.attention_chunk > 0:
        seen = seen & (position.div(x.attention_chunk, rounding_mode="floor") == key // x.attention_chunk)
    seen, bias = seen.unsqueeze(0), torch.zeros(1, 1, 1, device=device, dtype=torch.float64)
    if x.tree_mask is not None:
        tree = torch.ones(sq, sk, dtype=torch.bool, device=device)
        newest = min(sq, sk)
        tree[:, sk - newest :] = x.tree_mask[i, :sq, sq - newest : sq]
        seen = seen & tree
    if x.alibi_slopes is not None:
        slopes = x.alibi_slopes if x.alibi_slopes.dim() == 1 else x.alibi_slopes[i]
        bias = bias - slopes.double()[:, None, None] * (position - key).abs()
    if x.mask is not None:
        mask = x.mask[i, :, :sq, :sk]
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            seen, bias = (
                seen & (mask > float("-inf")),
                bias + mask.double().masked_fill(mask == float("-inf"), 0.0),
            )
    return seen, bias


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
    """The queries of sequence i that count, (sq_i, h, d), rotated where asked."""
    if x.cu_seqlens_q is None:
        q = x.q[i]
    else:
        q = x.q[int(x.cu_seqlens_q[i]) : int(x.cu_seqlens_q[i + 1])]
    q = q if x.seqused_q is None else q[: int(x.seqused_q[i])]
    if x.rotary_cos is None or x.rotary_sin is None or x.rotary_positions is None:
        return q
    steps = torch.arange(q.shape[0], device=q.device) * int(x.rotary_advances)
    return rotate(q, x.rotary_cos, x.rotary_sin, int(x.rotary_positions[i]) + steps, x.rotary_interleaved)


def rotate(
    t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    """Rotary position embedding (Su et al. 2021) of t (n, heads, d) at `positions` (n,), rounded to t's dtype.

    cos, sin: (max_len, rotary_dim / 2). Interleaved: the pairs are columns (0, 1), (2, 3)...; else (i,
    i + rotary_dim / 2). Columns past rotary_dim stay as they are.
    """
    half = cos.shape[1]
    c, s = (f[positions.long()].double().unsqueeze(1) for f in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out, a, b = t.clone(), t[..., first].double(), t[..., second].double()
    out[..., first], out[..., second] = (a * c - b * s).to(t.dtype), (a * s + b * c).to(t.dtype)
    return out


def keys_of(x: Inputs, i: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of sequence i that count, (sk_i, hk, d) and (sk_i, hk, dv), whatever the layout."""
    row = i if x.cache_batch_idx is None else int(x.cache_batch_idx[i])
    pad = 0 if x.cache_leftpad is None else int(x.cache_leftpad[i])
    if x.page_table is not None:
        n = int(x.seqused_k[i]) if x.seqused_k is not None else _slot(x.cu_seqlens_k, i)
        size = x.k.shape[1]
        first = pad // size  # pages that lie wholly before the first valid key are not read
        pages = x.page_table[row, first : -(-n // size)].long()
        rows = slice(pad - first * size, max(n, pad) - first * size)
        return x.k[pages].flatten(0, 1)[rows], x.v[pages].flatten(0, 1)[rows]
    if x.cu_seqlens_k is None:
        k, v = x.k[row], x.v[row]
    else:
        first, last = int(x.cu_seqlens_k[i]), int(x.cu_seqlens_k[i + 1])
        k, v = x.k[first:last], x.v[first:last]
    n = k.shape[0] if x.seqused_k is None else int(x.seqused_k[i])
    return k[pad : max(n, pad)], v[pad : max(n, pad)]


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
