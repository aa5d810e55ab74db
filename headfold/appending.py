"""Appending attention: a decoding step whose new keys and values the decode kernel itself writes into the cache.

An append before the attention is a launch of its own, 7 us of host time. Where every program of the Triton kernel reads its
share of a sequence alone, it can write the new tokens of its share first; the GPU takes as long for it (32:8 b16 s8192: 1.3
us more than the attention alone, with rotation 1.5). On Hopper GPUs the Gluon kernel attends faster to pages, but not by
what the append before it takes: 3.4 us, 4.3 with rotation, for its programs leave no registers beside an append's. The
operators headfold::append_attention and
append_attention_out, which `flash_attn_with_kvcache` calls where `writes_inside` holds, and two operators in turn elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from headfold import append, backends, ops, prepared
from headfold.backends import Runner
from headfold.planner import Device, Plan, plan_to_append
from headfold.planner.hopper_decode import TRITON_ROWS
from headfold.planner.tiles import MOST_NEW
from headfold.problem import Inputs, fail, is_aligned


@dataclass(slots=True)
class AppendingInputs(Inputs):
    """The arguments of an attention call that appends: `seqused_k` are the lengths before it.

    `new_k`, `new_v` (b, s_new, hk, d | dv) become keys seqused_k[i] on of sequence i. With angles they are turned as
    `append.AppendInputs` says, and q with them: there `rotary_positions` are rotary_seqlens or the lengths.
    """

    new_k: torch.Tensor | None = None
    new_v: torch.Tensor | None = None

    def tensors_besides(self) -> tuple[torch.Tensor | None, ...]:
        return self.new_k, self.new_v


_ATTENTION = tuple(field.name for field in fields(Inputs))
_ROTARY = dict.fromkeys(("rotary_cos", "rotary_sin", "rotary_positions"))


def attention_of(x: AppendingInputs) -> Inputs:
    """The call without its append: q is what it is after the rotation."""
    return Inputs(**{name: getattr(x, name) for name in _ATTENTION} | _ROTARY)


def append_of(x: AppendingInputs) -> append.AppendInputs:
    """The append alone, with everything about it to be checked."""
    apart = x.rotary_positions is not x.seqused_k
    return append.AppendInputs(
        x.k,
        x.v,
        x.new_k,  # type: ignore[arg-type]
        x.new_v,  # type: ignore[arg-type]
        x.seqused_k,
        page_table=x.page_table,
        cache_batch_idx=x.cache_batch_idx,
        rotary_cos=x.rotary_cos,
        rotary_sin=x.rotary_sin,
        rotary_seqlens=x.rotary_positions if apart else None,
        rotary_interleaved=x.rotary_interleaved,
        q=x.q if x.rotary_cos is not None else None,
        cu_seqlens_q=x.cu_seqlens_q if x.rotary_cos is not None else None,
        rotary_advances=x.rotary_advances,
        caller=x.caller,
    )


def plan_of(x: AppendingInputs, out: torch.Tensor | None = None) -> Plan | None:
    """The plan of checked inputs whose new tokens the decode kernel writes, None where it does not.

    It must read them all, each by the programs of the same KV head alone, and in one program: those of plain calls and of
    features, of which there is one more each on the GPUs whose calls of more rows have a kernel of their own.
    """
    if x.new_k is None or x.new_v is None or x.seqused_k is None:
        return None
    tokens, queries = x.new_k.shape[1], x.q.shape[1]
    others = (
        x.cu_seqlens_q,
        x.cu_seqlens_k,
        x.seqused_q,
        x.cache_batch_idx,
        x.cache_leftpad,
        x.mask,
        x.tree_mask,
    )
    if any(t is not None for t in others) or not 1 <= tokens <= MOST_NEW or not x.bottom_right:
        return None
    seen = x.window_left < 0 or tokens <= queries + x.window_left  # by some query
    if not seen or queries < 1 or x.attention_chunk or x.tokens_per_split:
        return None
    # Pairs side by side came out with other bits than in a launch of their own (9 of 24 drawn steps on an H200).
    pairs = x.rotary_cos is not None and x.rotary_interleaved
    if pairs or not is_aligned(x.new_k) or not is_aligned(x.new_v):
        return None
    problem, plan = backends.plan_of(attention_of(x), out)
    device = backends.device_of(x.q.device)
    if plan.backend == "hopper" and plan.kernel == "decode":
        plan = plan_to_append(problem, device)
    # The tile's last rows turn the new keys.
    if not takes_new_tokens(plan, device) or queries * plan.fold + tokens > plan.block_m:
        return None
    return appended(plan)


def takes_new_tokens(plan: Plan, device: Device) -> bool:
    """Whether there is a program that appends for calls of a plan."""
    fits = plan.backend == "triton" and plan.kernel == "decode" and plan.stream and plan.short is None
    return fits and plan.block_m <= TRITON_ROWS and device.arch == (9, 0)


def appended(plan: Plan) -> Plan:
    """A decode's plan, with new tokens that its programs write."""
    return replace(
        plan, appends=True, reasons=(*plan.reasons, "every program writes the new keys of its share")
    )


def writes_inside(x: AppendingInputs, out: torch.Tensor | None) -> bool:
    """Whether the decode kernel appends, of an eager call whose attention is checked. Checks the append.

    A traced call says no: its tensors lie nowhere, and its graph shows the append as an operator.
    """
    if torch.compiler.is_compiling() or type(x.q) is not torch.Tensor or x.q.is_meta:
        return False
    facts = ("writes inside", *prepared.facts_of(x, *(() if out is None else (out,))))
    found = prepared.find(facts)
    if found is None:
        append.check(append_of(x))
        found = prepared.keep(facts, plan_of(x, out) is not None)
    return bool(found)


def _check(x: AppendingInputs) -> None:
    """Raise on the first argument that does not fit. Reads no device memory."""
    ops.check_inputs(attention_of(x))
    append.check(append_of(x))


def _prepare(x: AppendingInputs, out: torch.Tensor, lse: torch.Tensor) -> Runner:
    plan = plan_of(x, out)
    if plan is None:
        raise fail(x, "new_k", "cannot be written by the attention of this call", "append it before")
    from headfold.backends.triton import prepare

    return prepare(plan, x, out, lse)


WAY = ops.Way(_check, lambda x: append.check_values(append_of(x)), _prepare)


def _append_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return ops.compute(AppendingInputs(*args, **kwargs), WAY)


def _append_attention_out(*args: Any, out: torch.Tensor, lse: torch.Tensor, **kwargs: Any) -> None:
    ops.compute_into(AppendingInputs(*args, **kwargs), out, lse, WAY)


def _append_attention_fake(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = AppendingInputs(*args, **kwargs)
    _check(x)
    return ops.empty_results(x)


def _append_attention_out_fake(*args: Any, out: torch.Tensor, lse: torch.Tensor, **kwargs: Any) -> None:
    x = AppendingInputs(*args, **kwargs)
    _check(x)
    ops.check_results(x, out, lse)


_ARGS = (
    ops.ARGS.replace("Tensor k, Tensor v", "Tensor(a!) k, Tensor(b!) v") + ", *, Tensor new_k, Tensor new_v"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
lib = torch.library.Library("headfold", "FRAGMENT")
lib.define(f"append_attention({_ARGS}) -> (Tensor, Tensor)", tags=_TAGS)
lib.define(f"append_attention_out({_ARGS}, Tensor(c!) out, Tensor(d!) lse) -> ()", tags=_TAGS)
for _name, _impl, _fake in (
    ("append_attention", _append_attention, _append_attention_fake),
    ("append_attention_out", _append_attention_out, _append_attention_out_fake),
):
    ops.register(lib, _name, _impl, _fake)

OPERATORS = (torch.ops.headfold.append_attention.default, torch.ops.headfold.append_attention_out.default)
