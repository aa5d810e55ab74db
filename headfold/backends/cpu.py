"""The CPU backend: a Plan run over K and V where they lie.

A call goes one of two ways. The plain forms (`cpu_plain`) take everything that is a band of visible keys, causal,
windows and attention chunks, by PyTorch's CPU flash kernel alone. What shapes the scores themselves, softcap,
masks, ALiBi, and splits of a fixed extent, goes block by block (`cpu_blocks`). Where keys lie, and rotary q, is
`cpu_sequences`' matter for both.

How a Plan reads here: `block_n` keys are a split, or 0: `num_splits` equal parts of each sequence.
`num_stages` sequences (when one split holds a sequence) or splits (when it does not) go into one call; a prefill
makes `head_units` calls to cover the KV heads, and `block_m` of its query positions share a mask. Block by block,
`block_m` folded rows at most are a block, and the last two do not count.

Causal calls of the kernel mask before they scale, which breaks for a scale <= 0; `_scaled` mends that.
"""

from __future__ import annotations

import torch

from headfold.backends import cpu_blocks, cpu_plain
from headfold.backends.cpu_band import Band
from headfold.backends.cpu_sequences import Sequences, sequences
from headfold.backends.cpu_states import NEG_INF, add_sink
from headfold.planner.plan import Plan
from headfold.problem import Inputs


def run(plan: Plan, x: Inputs, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Compute attention of checked inputs into `out` and `lse`.

    Args:
        plan: a plan of the CPU backend for the problem of x; its kernel is "decode" or "prefill".
        x: checked inputs; shapes as `Inputs` says.
        out: x.out_shape in the dtype of q, any strides whose last one is 1; its content is overwritten.
        lse: x.lse_shape in float32, any strides; the natural logarithm of the sum of exponentials. None
            where nobody asks for it.
    """
    lse = x.empty_lse() if lse is None else lse
    form = cpu_blocks.attend if cpu_blocks.needs_blocks(x) else _plain
    for s in sequences(plan, x, out, lse):
        form(plan, x, s, Band.of(x, s.q.shape[1], s.sk))


def _plain(plan: Plan, x: Inputs, s: Sequences, band: Band) -> None:
    first, last = band.rows()
    for dead in (slice(0, first), slice(last, None)):
        s.out[:, dead] = 0
        s.lse[:, :, dead] = NEG_INF
    if first < last:
        q, scale = _scaled(s.q, x.scale)
        form = cpu_plain.decode if plan.kernel == "decode" else cpu_plain.prefill
        form(plan, q, scale, s, band)
        if x.scale == 0:
            # The kernel's half-precision exp(0) is 1 - 5e-5, and here the exact LSE costs nothing.
            s.lse[:, :, first:last] = band.counts(first, last).log()
    if x.sink is not None:
        add_sink(s.out, s.lse.transpose(1, 2), x.sink)


def _scaled(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The same scores with a scale above 0: the kernel's causal form multiplies its -inf by the scale."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (q * 0, 1.0)
