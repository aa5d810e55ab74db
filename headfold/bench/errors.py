"""The error of an output: against the definition in float64, on a slice that bounds time and memory."""

from __future__ import annotations

import torch

from headfold import reference
from headfold.bench.inputs import CaseInputs

ROWS = 64  # queries compared at each of three places
KEYS = 8192  # keys of one piece of the reference
# Largest error that an output of the right formula can have, as a fraction of the largest reference value:
# wide, since it tells wrong results from right ones, not good kernels from better ones.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float32: 0.001}


class WrongOutput(Exception):
    """An output that is not attention of the inputs: NaN, a wrong shape, or too large an error."""

    def __init__(self, message: str, error: float | None = None) -> None:
        super().__init__(message)
        self.error = error


def max_error(inputs: CaseInputs, out: torch.Tensor) -> float:
    """Largest error over the last sequence and the last KV head's group: its first, middle and last queries.

    Args:
        inputs: the inputs; their first copy is what `out` was computed from.
        out: (b, sq, h, dv).

    Raises:
        WrongOutput: `out` has another shape, is NaN somewhere, or is too far from the reference.
    """
    case = inputs.case
    shape = (case.batch, case.sq, case.heads, case.dv)
    if tuple(out.shape) != shape:
        raise WrongOutput(f"the output has shape {tuple(out.shape)}, not {shape}")
    if not bool(torch.isfinite(out).all()):
        raise WrongOutput("the output holds NaN or infinity")
    worst = largest = 0.0
    for first in sorted({0, max(0, case.sq // 2 - ROWS // 2), max(0, case.sq - ROWS)}):
        rows = slice(first, min(first + ROWS, case.sq))
        want = expected(inputs, rows)
        got = out[-1, rows, -case.group :].double()
        worst = max(worst, float((got - want).abs().max()))
        largest = max(largest, float(want.abs().max()))
    if worst > TOLERANCE[out.dtype] * largest:
        raise WrongOutput(f"wrong result: max error {worst:.2g} where values reach {largest:.2g}", worst)
    return worst


def expected(inputs: CaseInputs, rows: slice) -> torch.Tensor:
    """The reference (rows, group, dv) of the last sequence and KV head, merged from pieces of its keys."""
    case, x = inputs.case, inputs.arguments()
    q = reference.queries_of(x, case.batch - 1)[rows, -case.group :].double()
    k, v = (t[:, -1:] for t in reference.keys_of(x, case.batch - 1))
    # Queries up to `rows.stop` see a prefix of the keys, in which they come last: bottom-right again.
    end = k.shape[0] - (case.sq - rows.stop) if case.causal else k.shape[0]
    seen = reference.visible(q.shape[0], end, -1, 0 if case.causal else -1, True).to(q.device)
    parts = [
        reference.attend(q, k[i:j].double(), v[i:j].double(), x.scale, seen[:, i:j])
        for i, j in ((i, min(i + KEYS, end)) for i in range(0, end, KEYS))
    ]
    out = torch.stack([o for o, _ in parts])
    lse = torch.stack([s.transpose(0, 1) for _, s in parts])
    return reference.combine(out, lse)[0]
