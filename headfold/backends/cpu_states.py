"""States on a CPU, (output, LSE) over some of the keys: by PyTorch's flash kernel, merged, given a sink.

`aten::_scaled_dot_product_flash_attention_for_cpu` keeps scores and sums in float32, takes strided K and V, serves
a group from its one KV head without expanding it, and returns the LSE. What it returns for a row that a mask
hides wholly is output 0 and LSE 0; `flash_masked` mends that LSE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

NEG_INF = float("-inf")
State = tuple[torch.Tensor, torch.Tensor]
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def flash_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    seen: torch.Tensor | None = None,
    causal: bool = False,
) -> State:
    """One kernel call: q (n, heads, rows, d), k (n, hk, e, d), v (n, hk, e, dv), seen bool (rows, e).

    Returns:
        out (n, heads, rows, dv) in q's dtype and LSE (n, heads, rows) in float32; 0 and -inf for a row that
        sees none of these keys.
    """
    if seen is None:
        return flash_masked(q, k, v, scale, causal=causal)
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, NEG_INF)
    return flash_masked(q, k, v, scale, mask, seen.any(1))


def flash_masked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None = None,
    live: torch.Tensor | None = None,
    causal: bool = False,
) -> State:
    """`flash_state` with what is added to the scaled scores instead of what is seen.

    Args:
        mask: (rows, e) or (n | 1, heads | 1, rows, e), of q's dtype or float32; -inf hides a key.
        live: bool, broadcast to (n, heads, rows): the rows of which the mask hides not everything.
    """
    d, dv = q.shape[-1], v.shape[-1]
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    out, lse = _flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    if live is not None:
        lse = lse.masked_fill(~live, NEG_INF)
    return out[..., :dv], lse


def merge_all(out: torch.Tensor, lse: torch.Tensor) -> State:
    """Merge states along the first dimension, at float32; a single one stays as it is."""
    if out.shape[0] == 1:
        return out[0], lse[0]
    total = torch.logsumexp(lse, 0)
    return (out * torch.exp(lse - total).unsqueeze(-1)).sum(0), total


def merge_into(out: torch.Tensor, lse: torch.Tensor, state: State) -> None:
    """Merge a state (out (..., dv), LSE (...)) into the one held, at float32."""
    new_out, new_lse = state
    total, base = _total(lse, new_lse)
    held = out * torch.exp(lse - base).unsqueeze(-1)
    out.copy_(held.addcmul_(new_out.float(), torch.exp(new_lse - base).unsqueeze(-1)))
    lse.copy_(total)


def add_sink(out: torch.Tensor, lse: torch.Tensor, sink: torch.Tensor) -> None:
    """Merge the state (0, sink) into out (..., h, dv) and lse (..., h), in place; sink (h,)."""
    total, base = _total(lse, sink.float())
    out.mul_(torch.exp(lse - base).unsqueeze(-1))
    lse.copy_(total)


def _total(lse: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The LSE of both, and what to subtract from each: where neither saw a key, exp(-inf + inf) would be NaN."""
    total = torch.logaddexp(lse, new)
    return total, total.masked_fill(total == NEG_INF, 0.0)
