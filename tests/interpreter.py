"""Triton's interpreter, quicker: what it computes and checks stays the same.

Of an interpreted kernel's time most went into the interpreter's own books. The shares below are of Triton 3.7.1, over
tests/kernels/test_attention.py.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock


def quicken() -> None:
    """Change the interpreter of this process. Triton must have been told to interpret."""
    _patch_once_a_launch()
    _leave_out_unread_overflows()
    _remember_types()
    _compare_types_at_once()
    _call_builtins_directly()


def few_merging_programs() -> AbstractContextManager[Any]:
    """Merges by few programs of some rows each, at the least two a tile, where a GPU has one a row: each looks for its
    sequence and its states first, half of a merge's time here."""
    return mock.patch.multiple("headfold.backends.triton", MERGE_PROGRAMS=64, MERGE_STREAM=32, MERGE_LEAST=2)


def _patch_once_a_launch() -> None:
    """The interpreter patches triton.language at a kernel's launch, and again, a third of its time, at every call of a
    device function. Here each module's names are patched at the first such call of a launch."""
    from triton import language
    from triton.runtime import interpreter

    patched: set[frozenset[str]] = set()
    names: dict[object, frozenset[str]] = {}
    launch = interpreter.GridExecutor.__call__

    def new_launch(self: interpreter.GridExecutor, *args: object, **kwargs: object) -> None:
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self: interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
        if self.fn not in names:
            seen = self.fn.__globals__.values()
            names[self.fn] = frozenset(
                m.__name__ for m in (language, language.core) if any(v is m for v in seen)
            )
        if names[self.fn] not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(names[self.fn])
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise interpreter.InterpreterError(repr(e)) from e

    interpreter.GridExecutor.__call__ = new_launch
    interpreter.InterpretedFunction.__call__ = call


def _leave_out_unread_overflows() -> None:
    """Sums and products of integers are computed once more in 64 bits for an assertion that the interpreter drops, as its
    options say nothing of debugging: up to half of the time."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "overflows are asserted"
    builder.options = replace(builder.options, sanitize_overflow=False)


def _remember_types() -> None:
    """numpy's types are looked up in a table that is built for each look-up, and every tensor writes down its shape and its
    type's name anew: a third of the rest. Here each is made once. Nothing writes to any of them."""
    from triton.language import core
    from triton.runtime import interpreter

    numpy_of: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}
    shapes: dict[Any, tuple[Any, Any]] = {}
    np_dtype, new_block = interpreter._get_np_dtype, core.block_type.__init__

    def known_np_dtype(dtype: Any) -> Any:
        if dtype.name not in numpy_of:
            numpy_of[dtype.name] = np_dtype(dtype)
        return numpy_of[dtype.name]

    def known_block(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, core.tuple) else shape
        key = (element_ty.name, *[n.value if isinstance(n, core.constexpr) else n for n in values])
        if key not in blocks:
            new_block(self, element_ty, shape)
            blocks[key] = dict(self.__dict__)
        self.__dict__.update(blocks[key])

    def new_tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape.values if type.is_block() else ()
        key = tuple(shape)
        if key not in shapes:
            shapes[key] = (
                core.tuple([core.constexpr(n) for n in shape]),
                core.constexpr(math.prod(shape)),
            )
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[key]

    interpreter._get_np_dtype = known_np_dtype
    core.block_type.__init__ = known_block
    core.tensor.__init__ = new_tensor


def _compare_types_at_once() -> None:
    """Types are compared eight times an operation, and each time what may be a constant or a tuple of some is unwrapped: a
    fourteenth of the rest. What is plainly neither is taken as it is."""
    from triton.language import core

    plain = {core.tensor, core.dtype, core.block_type, core.pointer_type, bool, int, float, str, type(None)}
    unwrap, equal = core._unwrap_if_constexpr, core.dtype.__eq__

    def unwrapped(value: Any) -> Any:
        return value if type(value) in plain else unwrap(value)

    def same_type(self: Any, other: Any) -> bool:
        return self.name == other.name if type(other) is core.dtype else equal(self, other)

    core._unwrap_if_constexpr = unwrapped
    core.dtype.__eq__ = same_type


def _call_builtins_directly() -> None:
    """A patched function of the language copies its keywords to put in the interpreter's semantics, and then looks whether
    they are there."""
    from triton.runtime import interpreter

    semantic = interpreter.interpreter_semantic

    def patch(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    interpreter._patch_attr = patch
