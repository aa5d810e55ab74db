"""Kept calls: a public function's call that looks like an earlier one goes straight to what that one came to.

Between a call and its launches lie the arguments' meaning, PyTorch's dispatcher, and the search for what was prepared:
30 us of Python on the host of an H200. What an eager call came to is noted the first time: the operators that ran, in their
order, and from which of the call's tensors, or of each other's results, every input of theirs was taken. A later call with
the same facts runs them again on its own tensors.

What a call came to is found by its facts, or in less time by what PyTorch's C++ compares: see `recent.py`.

Only what a call's facts decide is kept. A call that took anything else than its own tensors to an operator, such as a view
or a tensor made on the way, is not; nor is any within torch.compile, a mode, a transform, a profiler or HEADFOLD_CHECK=1,
for which the dispatcher is there.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch

from headfold import backends, prepared, recent
from headfold.values import value_checks_enabled

P = ParamSpec("P")
R = TypeVar("R")

Tensors = tuple[torch.Tensor, ...]

# Kinds of arguments, tensors apart, that say all by what they are equal to.
VALUES: set[type] = {type(None), bool, int, float, str}


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a call: its inputs, its results, and what makes new results of inputs that look the same.

    With `lse` the second result is an LSE, and `again` takes after the inputs whether it is wanted. `into` is the output
    that the caller gave, which `again` takes last.
    """

    inputs: Any
    results: Tensors
    again: Callable[..., tuple[torch.Tensor | None, ...]]
    lse: bool = False
    into: torch.Tensor | None = None


class _Taped(NamedTuple):
    """A Step without its tensors: the fields of its inputs, and (field, source) of each that is a tensor."""

    kind: type
    fields: list[Any]
    places: list[tuple[int, int]]
    again: Callable[..., tuple[torch.Tensor | None, ...]]
    wants: tuple[bool, ...]
    into: int


@dataclass(frozen=True, slots=True)
class _Tape:
    """The operators of a call, and what it returns. Sources number the call's tensors, and then the operators' results.

    `direct` is what it comes to from its tensors and their addresses alone, where that is known.
    """

    steps: tuple[_Taped, ...]
    result: int | tuple[int, ...]
    direct: Callable[[Sequence[torch.Tensor], Sequence[int]], Any] | None

    def play(self, tensors: list[Any]) -> Any:
        for kind, fields, places, again, wants, into in self.steps:
            values = fields.copy()
            for field, source in places:
                values[field] = tensors[source]
            x = kind(*values)
            tensors += again(x, *wants) if into < 0 else again(x, *wants, tensors[into])
        result = self.result
        return tensors[result] if isinstance(result, int) else tuple([tensors[i] for i in result])


class _Notes(threading.local):
    """The steps of the call that this thread is in, None outside of one; None among them stands for one that cannot be kept."""

    steps: list[Step | None] | None = None


_notes = _Notes()


def note(step: Step | None) -> None:
    """Tell the call in progress, if any, that an operator ran; None for one that must not be run again like this."""
    if _notes.steps is not None:
        _notes.steps.append(step)


def kept(public: Callable[P, R]) -> Callable[P, R]:
    """A public function whose eager calls are kept."""
    name = public.__name__

    @functools.wraps(public)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling() or _notes.steps is not None or not _is_eager():
            return public(*args, **kwargs)
        result = recent.run(name, args, kwargs)
        if result is not None:
            return cast("R", result)
        tensors: list[torch.Tensor] = []
        facts = _facts_of(name, args, kwargs, tensors)
        tape = None if facts is None else prepared.find(facts)
        if tape:
            recent.keep(name, args, kwargs, tape.direct or (lambda tensors, _: tape.play([*tensors])))
            return cast("R", tape.play(tensors))
        if tape is False or facts is None:
            return public(*args, **kwargs)
        steps = _notes.steps = []
        try:
            result = public(*args, **kwargs)
        finally:
            _notes.steps = None
        if len({id(t) for t in tensors}) == len(tensors):  # else one place could stand for another
            prepared.keep(facts, _tape_of(tensors, steps, result) or False)
        return result

    return call


def _is_eager() -> bool:
    """True where nobody looks at operators but PyTorch's dispatcher, and that has nothing to do."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or value_checks_enabled()
    )


def _facts_of(
    name: str, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[torch.Tensor]
) -> tuple[Any, ...] | None:
    """All that decides what a call comes to, None for one with arguments of other kinds; its tensors go to `tensors`."""
    facts: list[Any] = [name, len(args), *kwargs, torch.is_grad_enabled(), backends.forced()]
    for value in (*args, *kwargs.values()):
        kind = type(value)
        if kind is torch.Tensor:
            tensors.append(value)
            facts.append(prepared.tensor_fact(value))
        elif kind in VALUES:  # True is 1 and 1 is 1.0: kinds are facts too
            facts += (kind, value)
        elif kind is tuple and all(type(one) in VALUES for one in value):
            facts += (kind, value, *map(type, value))
        else:
            return None
    return tuple(facts)


def _tape_of(tensors: list[torch.Tensor], steps: Sequence[Step | None], result: Any) -> _Tape | None:
    """What the steps of a call took from where, None if anything came from elsewhere.

    None too where a tensor of the call went to no operator: its values may have been read.
    """
    sources = list(tensors)

    def source_of(t: Any) -> int:
        return next((i for i, one in enumerate(sources) if one is t), -1)

    found: list[_Taped] = []
    used: set[int] = set()
    for step in steps:
        if step is None:
            return None
        fields = [getattr(step.inputs, field.name) for field in dataclasses.fields(step.inputs)]
        places = [(i, source_of(value)) for i, value in enumerate(fields) if isinstance(value, torch.Tensor)]
        for i, _ in places:
            fields[i] = None  # a kept call keeps no tensor alive
        used.update(source for _, source in places)
        into = -1
        if step.into is not None:
            into = source_of(step.into)
            used.add(into)
        sources += step.results
        wants = (isinstance(result, tuple),) if step.lse else ()
        found.append(_Taped(type(step.inputs), fields, places, step.again, wants, into))
    several = result if isinstance(result, tuple) else (result,)
    returned = tuple(source_of(t) for t in several)
    if -1 in used or -1 in returned or not used.issuperset(range(len(tensors))):
        return None
    direct = _direct_of(steps[0], found[0], len(tensors), returned) if len(found) == 1 else None
    return _Tape(tuple(found), returned if isinstance(result, tuple) else returned[0], direct)


def _direct_of(step: Any, taped: _Taped, count: int, returned: tuple[int, ...]) -> Any:
    """What a call of `count` tensors and one operator comes to without inputs, if the operator can be run like that."""
    make = getattr(step.again, "direct", None)
    out = count if taped.into < 0 else taped.into
    if make is None or returned != (out, count + 1)[: 1 + (True in taped.wants)]:
        return None
    names = [field.name for field in dataclasses.fields(step.inputs)]
    sources = {names[i]: source for i, source in taped.places}
    return make(step.inputs, sources, count, *taped.wants, taped.into)
