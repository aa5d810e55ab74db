"""Jit functions as Python functions whose names mean emulated things: the very source of a kernel runs."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

from triton import language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import ConstexprFunction, JITFunction

from tests.gluon_emulator import engines, language, pieces, shared
from tests.gluon_emulator.language import MBARRIER, Language, numbers
from tests.gluon_emulator.values import Value, number


class _Modules:
    """A module whose attributes are emulated."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return emulated(getattr(self._module, name))


class _RunTime(ast.NodeTransformer):
    """`x = 0` makes a number known at run time, which C's division applies to; `X: gl.constexpr = 0` does not."""

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:
        node.value = self._wrapped(node.value)
        return node

    def _wrapped(self, value: ast.expr) -> ast.expr:
        if isinstance(value, ast.Tuple):
            value.elts = [self._wrapped(one) for one in value.elts]
        if isinstance(value, ast.Constant) and isinstance(value.value, int | float):
            call = ast.Call(ast.Name("__number__", ast.Load()), [value], [])
            return ast.fix_missing_locations(ast.copy_location(call, value))
        return value


class Function:
    """An emulated jit function."""

    def __init__(self, jit: Any) -> None:
        self._jit = jit
        self.__name__ = jit.fn.__name__
        self._signature = inspect.signature(jit.fn)
        self._constants = [
            (i, name)
            for i, (name, p) in enumerate(self._signature.parameters.items())
            if p.annotation is gl.constexpr
        ]
        self._compiled: Any = None

    @property
    def parameters(self) -> dict[str, Any]:
        """Name -> annotation."""
        return {name: p.annotation for name, p in self._signature.parameters.items()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for i, name in self._constants:
            given = args[i] if i < len(args) else kwargs.get(name)
            if isinstance(given, Value):
                raise TypeError(f"{self.__name__}: {name} is a constexpr, and {given!r} is none")
        if self._compiled is None:
            self._compiled = self._compile()
        return self._compiled(*args, **kwargs)

    def _compile(self) -> Any:
        fn = self._jit.fn
        lines, first = inspect.getsourcelines(fn)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        ast.increment_lineno(tree, first - 1)
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        definition.decorator_list = []
        _RunTime().visit(definition)
        closure = inspect.getclosurevars(fn)
        known = {**fn.__globals__, **closure.nonlocals}
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names = {name: emulated(known[name]) for name in used & known.keys()}
        names |= {"__builtins__": builtins, "__number__": number, "range": numbers}
        exec(compile(tree, inspect.getsourcefile(fn) or "<kernel>", "exec"), names)
        return names[self.__name__]


def _view_as(buffer: shared.Shared, dtype: Any, shape: list[int], layout: Any) -> shared.Shared:
    return buffer.view_as(dtype, shape, layout)


_functions: dict[int, Function] = {}
_constants: dict[int, Callable[..., Any]] = {}


def _remembered(function: ConstexprFunction) -> Callable[..., Any]:
    """The function of constants, such as a layout of a shape, that is computed once for each: a block asks for ten."""
    known = functools.lru_cache(maxsize=None, typed=True)(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return known(*args, **kwargs)
        except TypeError:  # a list, which cannot be looked up; or what the function raises, once more
            return function(*args, **kwargs)

    return call


def _table() -> dict[int, Any]:
    """id of a real thing -> the emulated one."""
    from headfold.kernels.hopper import compat
    from headfold.kernels.parts import address, division

    language_of_both = Language()
    return {
        id(gl): language_of_both,
        id(tl): language_of_both,
        id(division.divide): language.divide,
        id(address.pointer): language.pointer,
        id(address.load_float): language.load_float,
        id(hopper.mbarrier): MBARRIER,
        id(compat.tma_load): engines.tma_load,
        id(compat.tma_store): engines.tma_store,
        id(compat.tma_store_wait): engines.tma_store_wait,
        id(compat.copy_to_shared): pieces.copy_to_shared,
        id(compat.async_copy): pieces,
        id(compat.barrier): shared.barrier,
        id(compat.fence_async_shared): shared.fence,
        id(compat.view_as): _view_as,
        id(compat.warpgroup_mma): engines.warpgroup_mma,
        id(compat.warpgroup_mma_wait): engines.warpgroup_mma_wait,
    }


_TABLE = _table()


def emulated(value: Any) -> Any:
    """What stands for `value` inside an emulated function."""
    if id(value) in _TABLE:
        return _TABLE[id(value)]
    if isinstance(value, JITFunction | InterpretedFunction):
        return _functions.setdefault(id(value), Function(value))
    if isinstance(value, ConstexprFunction):
        return _constants.setdefault(id(value), _remembered(value))
    if isinstance(value, gl.constexpr):
        return value.value
    if isinstance(value, ModuleType):
        if value.__name__.startswith("triton"):
            raise NotImplementedError(f"{value.__name__} is not emulated")
        return _Modules(value)
    return value
