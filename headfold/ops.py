"""The torch.library operators: one schema, one fake and one validator shared by all.

headfold::attention allocates its results, headfold::attention_out writes into given ones; headfold::combine and
headfold::combine_out do the same for the merge of states. Both names of an operator run the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from headfold import backends, prepared
from headfold.backends import Runner
from headfold.features import check_features
from headfold.kept_calls import Step, note
from headfold.merge import check_combine, combine_shapes, run_combine
from headfold.problem import Inputs, check, check_out
from headfold.results import IntoGiven, IntoNew
from headfold.values import check_values, value_checks_enabled

ARGS = (
    "Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? seqused_q=None, Tensor? seqused_k=None, Tensor? page_table=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, float? softmax_scale=None, "
    "SymInt window_left=-1, SymInt window_right=-1, bool bottom_right=True, int num_splits=0, "
    "bool? pack_gqa=None, int sm_margin=0, float softcap=0.0, "
    "int attention_chunk=0, int tokens_per_split=0, Tensor? sink=None, Tensor? alibi_slopes=None, "
    "Tensor? mask=None, Tensor? tree_mask=None, Tensor? cache_batch_idx=None, Tensor? cache_leftpad=None, "
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? rotary_positions=None, "
    "bool rotary_interleaved=True, bool rotary_advances=True, "
    'Tensor? early_lengths=None, SymInt early_new=0, str caller="attention"'
)
_COMBINE_ARGS = "Tensor out_partial, Tensor lse_partial, Tensor? cu_seqlens=None, Tensor? seqused=None"

lib = torch.library.Library("headfold", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
lib.define(f"attention({ARGS}) -> (Tensor, Tensor)", tags=_TAGS)
lib.define(f"attention_out({ARGS}, *, Tensor(a!) out, Tensor(b!) lse) -> ()", tags=_TAGS)
lib.define(f"combine({_COMBINE_ARGS}, ScalarType? out_dtype=None) -> (Tensor, Tensor)", tags=_TAGS)
lib.define(f"combine_out({_COMBINE_ARGS}, *, Tensor(a!) out, Tensor(b!) lse) -> ()", tags=_TAGS)


def check_inputs(x: Inputs) -> None:
    """Raise on the first argument that does not fit. Reads no device memory."""
    check(x)
    check_features(x)


def empty_results(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """New output and LSE of checked inputs."""
    return x.q.new_empty(x.out_shape), x.q.new_empty(x.lse_shape, dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Way:
    """How a kind of attention call is checked, and prepared for given results."""

    check: Callable[[Any], None]
    check_values: Callable[[Any], None]
    prepare: Callable[[Any, torch.Tensor, torch.Tensor], Runner]


# By name: what stands under it when it is called, which tests replace.
PLAIN = Way(check_inputs, lambda x: check_values(x), lambda x, out, lse: backends.prepare(x, out, lse))


def _attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return compute(Inputs(*args, **kwargs), PLAIN)


def compute(x: Inputs, way: Way) -> tuple[torch.Tensor, torch.Tensor]:
    """Check inputs unless a call that looks the same was checked before, and compute attention into new results."""
    facts = prepared.facts_of(x)
    run = prepared.find(facts)
    if run is None:
        way.check(x)
    if value_checks_enabled():
        way.check_values(x)
    if run is None:
        run = prepared.keep(facts, IntoNew(x, way.prepare(x, *empty_results(x))))
    results: tuple[torch.Tensor, torch.Tensor] = run(x)
    note(Step(x, results, run, lse=True))
    return results


def _attention_fake(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    x = Inputs(*args, **kwargs)
    check_inputs(x)
    return empty_results(x)


def check_results(x: Inputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Raise unless the results of checked inputs fit into `out` and `lse`."""
    check_out(x, "out", out, x.out_shape, x.q.dtype)
    check_out(x, "lse", lse, x.lse_shape, torch.float32)


def attend(x: Inputs, out: torch.Tensor, lse: torch.Tensor, way: Way = PLAIN) -> Runner:
    """Check inputs and results unless a call that looks the same was checked before, and compute attention into them.

    Returns what did it.
    """
    facts = prepared.facts_of(x, out, lse)
    run = prepared.find(facts)
    if run is None:
        way.check(x)
        check_results(x, out, lse)
    if value_checks_enabled():
        way.check_values(x)
    if run is None:
        run = prepared.keep(facts, way.prepare(x, out, lse))
    run(x, out, lse)
    return run


def _attention_out(*args: Any, out: torch.Tensor, lse: torch.Tensor, **kwargs: Any) -> None:
    compute_into(Inputs(*args, **kwargs), out, lse, PLAIN)


def compute_into(x: Inputs, out: torch.Tensor, lse: torch.Tensor, way: Way) -> None:
    """`attend` as an operator does it."""
    launch = attend(x, out, lse, way)
    note(Step(x, (out, lse), IntoGiven(launch, lse.shape), into=out, lse=True))


def _attention_out_fake(*args: Any, out: torch.Tensor, lse: torch.Tensor, **kwargs: Any) -> None:
    x = Inputs(*args, **kwargs)
    check_inputs(x)
    check_results(x, out, lse)


def _combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _combine_fake(out_partial, lse_partial, cu_seqlens, seqused, out_dtype)
    run_combine(out_partial, lse_partial, cu_seqlens, seqused, out, lse)
    return out, lse


def _combine_fake(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_combine(out_partial, lse_partial, cu_seqlens, seqused, None, None, out_dtype)
    out_shape, lse_shape = combine_shapes(out_partial)
    out = out_partial.new_empty(out_shape, dtype=out_dtype or out_partial.dtype)
    return out, out_partial.new_empty(lse_shape, dtype=torch.float32)


def _combine_out(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    check_combine(out_partial, lse_partial, cu_seqlens, seqused, out, lse, None)
    run_combine(out_partial, lse_partial, cu_seqlens, seqused, out, lse)


def _combine_out_fake(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    seqused: torch.Tensor | None = None,
    *,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    check_combine(out_partial, lse_partial, cu_seqlens, seqused, out, lse, None)


def register(
    lib: torch.library.Library, name: str, impl: Callable[..., Any], fake: Callable[..., Any]
) -> None:
    """Give an operator of `lib` its implementation for every device, and its fake."""
    for key in ("CPU", "CUDA"):
        lib.impl(name, impl, key)
    torch.library.register_fake(f"headfold::{name}", fake, lib=lib)


for _name, _impl, _fake in (
    ("attention", _attention, _attention_fake),
    ("attention_out", _attention_out, _attention_out_fake),
    ("combine", _combine, _combine_fake),
    ("combine_out", _combine_out, _combine_out_fake),
):
    register(lib, _name, _impl, _fake)

attention = torch.ops.headfold.attention.default
attention_out = torch.ops.headfold.attention_out.default
combine = torch.ops.headfold.combine.default
combine_out = torch.ops.headfold.combine_out.default
