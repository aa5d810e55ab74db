"""The CPU backend's own attention over a block of keys, for scores that PyTorch's flash kernel cannot make.

Scores, probabilities and sums are float32 throughout: half-precision products on a CPU either round the scores or,
as measured, take no less time than float32 ones over K and V that were converted a block at a time.
"""

from __future__ import annotations

import torch

from headfold.backends.cpu_states import NEG_INF, State


def score_state(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softcap: float,
    mask: torch.Tensor | None,
) -> State:
    """The state of q (n, hk, rows, d) over k (n, hk, e, d) and v (n, hk, e, dv), all float32.

    Args:
        q: its products with k are the scores, or score / cap with a softcap.
        softcap: with a cap > 0 the scores become cap * tanh(score / cap), before the mask.
        mask: added to them, broadcast to (n, hk, rows, e); -inf hides a key.

    Returns:
        out (n, hk, rows, dv) and LSE (n, hk, rows); 0 and -inf for a row that sees none of these keys.
    """
    scores = torch.matmul(q, k.mT)
    if softcap > 0:
        scores.tanh_()
    if mask is not None:
        torch.add(mask, scores, alpha=softcap or 1.0, out=scores)
    elif softcap > 0:
        scores.mul_(softcap)
    top = scores.amax(-1, keepdim=True)
    top.masked_fill_(top == NEG_INF, 0.0)  # a row that sees nothing: exp(-inf + inf) would be NaN
    p = scores.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    out = torch.matmul(p, v).div_(total.masked_fill(total == 0, 1.0))
    return out, total.log_().add_(top).squeeze(-1)
