"""The error of an output: against the definition in float64, on a slice that bounds time and memory."""

from __future__ import annotations

import dataclasses

import torch

from headfold import reference
from headfold.bench.cases import Case
from headfold.bench.inputs import CaseInputs
from headfold.bench.measure import Call
from headfold.problem import Inputs

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


def error_of(call: Call, inputs: CaseInputs, appends: bool = True) -> float:
    """Run a call on the first copy, and return its `max_error`.

    With `appends` False the call finds the tokens in the cache that others append.

    Raises:
        WrongOutput: as `max_error` does; what the call leaves unwritten is NaN.
    """
    # The allocator hands this memory to the output next.
    case = inputs.case
    shape = case.out_shape
    poison = torch.full(shape, float("nan"), dtype=case.torch_dtype, device=inputs.device)
    del poison
    if appends:
        inputs.forget_new_tokens()
    else:
        inputs.write_new_tokens()
    return max_error(inputs, call(0))


def max_error(inputs: CaseInputs, out: torch.Tensor) -> float:
    """Largest error over the last sequence and the last KV head's group: its first, middle and last queries.

    Args:
        inputs: the inputs; their first copy is what `out` was computed from.
        out: of the case's out_shape.

    Raises:
        WrongOutput: `out` has another shape, is NaN somewhere, or is too far from the reference.
    """
    case = inputs.case
    shape = case.out_shape
    if tuple(out.shape) != shape:
        raise WrongOutput(f"the output has shape {tuple(out.shape)}, not {shape}")
    if not bool(torch.isfinite(out).all()):
        raise WrongOutput("the output holds NaN or infinity")
    _check_cache(inputs)
    worst = largest = 0.0
    sq = case.all_queries[-1]
    last = out[-1] if case.queries is None else out[-sq:]
    for first in sorted({0, max(0, sq // 2 - ROWS // 2), max(0, sq - ROWS)}):
        rows = slice(first, min(first + ROWS, sq))
        want = expected(inputs, rows)
        got = last[rows, -case.group :].double()
        worst = max(worst, float((got - want).abs().max()))
        largest = max(largest, float(want.abs().max()))
    if worst > TOLERANCE[out.dtype] * largest:
        raise WrongOutput(f"wrong result: max error {worst:.2g} where values reach {largest:.2g}", worst)
    return worst


def _check_cache(inputs: CaseInputs) -> None:
    """Raise WrongOutput unless the first copy holds the tokens that a case appends, for the last sequence.

    The output does not tell: one key among thousands hardly moves it.
    """
    case, extra = inputs.case, inputs.extra
    if extra.k_new is None or extra.v_new is None:
        return
    for name, cache, want in (
        ("k", inputs.k[0], inputs.turned(extra.k_new[-1])),
        ("v", inputs.v[0], extra.v_new[-1]),
    ):
        error = float((cache[-1, -case.sq :].double() - want.double()).abs().max())
        if not error <= TOLERANCE[cache.dtype] * float(want.abs().max()):  # NaN is wrong too
            raise WrongOutput(f"the cache does not hold the new {name}: max error {error:.2g}", error)


def expected(inputs: CaseInputs, rows: slice) -> torch.Tensor:
    """The reference (rows, group, dv) of the last sequence and KV head, merged from pieces of its keys."""
    case, x = inputs.case, inputs.arguments()
    q = reference.queries_of(x, case.batch - 1)[rows, -case.group :].double()
    k, v = (t[:, -1:] for t in reference.keys_of(x, case.batch - 1))
    bias = torch.zeros(1, 1, 1, dtype=torch.float64, device=q.device)
    if case.features.moves_the_mask:
        end = k.shape[0]
        seen, bias = reference.mask_of(_last_group(x, case), 0, case.sq, end)
        seen, bias = (t if t.shape[1] == 1 else t[:, rows] for t in (seen, bias))
    else:
        # Queries up to `rows.stop` see a prefix of the keys, in which they come last: bottom-right again.
        end = k.shape[0] - (case.all_queries[-1] - rows.stop) if case.causal else k.shape[0]
        seen = reference.visible(q.shape[0], end, -1, 0 if case.causal else -1, True).to(q.device)[None]
    sink = None if x.sink is None else x.sink[-case.group :].double()
    parts = [
        reference.attend(
            *(q, k[i:j].double(), v[i:j].double(), x.scale, seen[..., i:j]),
            *(bias if bias.shape[-1] == 1 else bias[..., i:j], x.softcap, None if i else sink),
        )
        for i, j in ((i, min(i + KEYS, end)) for i in range(0, end, KEYS))
    ]
    out = torch.stack([o for o, _ in parts])
    lse = torch.stack([s.transpose(0, 1) for _, s in parts])
    return reference.combine(out, lse)[0]


def _last_group(x: Inputs, case: Case) -> Inputs:
    """The last sequence and the last KV head's group alone, as far as masks go."""
    g = case.group
    return dataclasses.replace(
        x,
        alibi_slopes=None if x.alibi_slopes is None else x.alibi_slopes[-g:],
        mask=None if x.mask is None else x.mask[-1:, -g:],
        tree_mask=None if x.tree_mask is None else x.tree_mask[-1:],
    )
