"""What a Gluon program computes with: numbers, tensors with a layout, pointers into global memory.

Plain Python numbers are compile-time constants. A `Scalar` is a number known at run time only: its integers divide
as C's do, and leaving their range raises.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

TORCH = {
    gl.int1: torch.bool,
    gl.int8: torch.int8,
    gl.uint8: torch.uint8,
    gl.int16: torch.int16,
    gl.int32: torch.int32,
    gl.int64: torch.int64,
    gl.float16: torch.float16,
    gl.bfloat16: torch.bfloat16,
    gl.float32: torch.float32,
    gl.float64: torch.float64,
}
GLUON = {of_torch: of_gluon for of_gluon, of_torch in TORCH.items()}
# Name of an integer type -> its first number, and the first behind its last. Types compare and classify themselves by
# name, at some ten times the cost of a look-up, and a block takes a thousand numbers.
LIMITS = {
    f"{sign}int{bits}": (0, 1 << bits) if sign else (-(1 << bits - 1), 1 << bits - 1)
    for bits in (8, 16, 32, 64)
    for sign in ("", "u")
}
# Name of a type -> what torch computes with: integers in 64 bits, so that what leaves 32 can be seen.
WIDE = {dtype.name: torch.int64 if dtype.name in LIMITS else of_torch for dtype, of_torch in TORCH.items()}

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
COMPARISONS = {name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")}


class Value:
    """The operators that numbers and tensors share."""

    dtype: Any

    def __bool__(self) -> bool:
        raise TypeError(f"{self!r} is no scalar: it cannot decide a branch")

    def __neg__(self) -> Any:
        return binary("sub", 0, self)

    def __invert__(self) -> Any:
        return binary("xor", self, True if self.dtype == gl.int1 else -1)

    __hash__ = None  # type: ignore[assignment]


def _operators() -> None:
    for name in (*ARITHMETIC, "truediv", "floordiv", "mod"):
        setattr(Value, f"__{name}__", lambda self, other, name=name: binary(name, self, other))
        setattr(Value, f"__r{name}__", lambda self, other, name=name: binary(name, other, self))
    for name in COMPARISONS:
        setattr(Value, f"__{name}__", lambda self, other, name=name: binary(name, self, other))


_operators()


class Scalar(Value):
    """A number of a program: the same for all its threads, known at run time."""

    def __init__(self, value: Any, dtype: Any) -> None:
        self.value, self.dtype = _rounded(value, dtype), dtype

    @property
    def type(self) -> Any:
        return self.dtype

    @property
    def one(self) -> torch.Tensor:
        """The number as a tensor without dimensions."""
        return torch.tensor(self.value, dtype=TORCH[self.dtype])

    def to(self, dtype: Any) -> Scalar:
        return Scalar(self.value, dtype)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        if not self.dtype.is_int():
            raise TypeError(f"{self!r} is no integer")
        return int(self.value)

    def __repr__(self) -> str:
        return f"{self.value}:{self.dtype}"


NUMBERS = (Scalar, int, bool, float)


def _rounded(value: Any, dtype: Any) -> Any:
    """A Python number as `dtype` holds it; an integer that does not fit raises."""
    limits = LIMITS.get(dtype.name)
    if limits is None:
        if dtype.is_floating():
            return ctypes.c_float(value).value if dtype.name == "fp32" else float(value)
        return bool(value)
    value = int(value)
    if not limits[0] <= value < limits[1]:
        raise OverflowError(f"{value} leaves the range of {dtype}")
    return value


@dataclass(frozen=True)
class Derived:
    """The layout that the compiler infers for a tensor whose elements stay in their threads."""

    how: str
    arguments: tuple[int, ...]
    rank: int
    of: Any


class Tensor(Value):
    """A tensor in the registers of a partition's warps."""

    def __init__(self, data: torch.Tensor, layout: Any) -> None:
        if layout.rank != data.dim():
            raise ValueError(f"a tensor of shape {tuple(data.shape)} cannot have the layout {layout}")
        self.data, self.layout = data, layout
        self.dtype = GLUON[data.dtype]
        self.shape = list(data.shape)

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    def to(self, dtype: Any) -> Tensor:
        return Tensor(cast(self.data, dtype), self.layout)

    def __getitem__(self, index: tuple[slice | None, ...]) -> Tensor:
        """New dimensions, such as `[:, None]`: the layout must be a slice of one with the dimension, one by one."""
        if (
            any(one not in (None, slice(None)) for one in index)
            or index.count(slice(None)) != self.data.dim()
        ):
            raise NotImplementedError(f"index {index}")
        data, layout = self.data, self.layout
        for i in (i for i, one in enumerate(index) if one is None):
            if not isinstance(layout, gl.SliceLayout) or layout.dim != i:
                raise ValueError(f"dimension {i} is inserted into a tensor of layout {layout}")
            data, layout = data.unsqueeze(i), layout.parent
        return Tensor(data, layout)

    def reshape(self, shape: list[int]) -> Tensor:
        return Tensor(self.data.reshape(shape), Derived("reshape", tuple(shape), len(shape), self.layout))

    def permute(self, order: list[int]) -> Tensor:
        return Tensor(self.data.permute(order), Derived("permute", tuple(order), len(order), self.layout))

    def split(self) -> tuple[Tensor, Tensor]:
        """The two halves of the last dimension, whose size is 2."""
        low, high = self.data.unbind(-1)
        layout = gl.SliceLayout(self.data.dim() - 1, self.layout)
        return Tensor(low, layout), Tensor(high, layout)

    def __repr__(self) -> str:
        return f"Tensor({self.dtype}, {self.shape}, {self.layout})"


class Pointer(Value):
    """Addresses in a tensor of global memory: a base, and offsets in elements (one, or a tensor of them)."""

    def __init__(self, base: torch.Tensor, offset: Scalar | Tensor) -> None:
        self.base, self.offset = base, offset
        self.dtype = SimpleNamespace(element_ty=GLUON[base.dtype], is_int=lambda: False)

    def locations(self) -> torch.Tensor:
        """Offsets into `memory`, from the tensor's first element on."""
        where = self.offset.data if isinstance(self.offset, Tensor) else self.offset.one
        return where.long() + self.base.storage_offset()

    def memory(self) -> torch.Tensor:
        """All of the storage that the tensor is a view of."""
        size = self.base.untyped_storage().nbytes() // self.base.element_size()
        return self.base.as_strided((size,), (1,), 0)

    def __repr__(self) -> str:
        return f"Pointer({self.dtype.element_ty}, {self.offset!r})"


def cast(data: torch.Tensor, dtype: Any) -> torch.Tensor:
    """`data` as `dtype`. An integer that does not fit raises: a kernel that wraps around is wrong here."""
    target = TORCH[dtype]
    if data.dtype is target:
        return data
    if dtype.name in LIMITS and data.dtype in (torch.int32, torch.int64) and data.numel():
        limits = torch.iinfo(target)
        low, high = (int(end) for end in data.aminmax())
        if low < limits.min or high > limits.max:
            raise OverflowError(f"{low}..{high} leaves the range of {dtype}")
    return data.to(target)


def number(value: Any) -> Scalar:
    """A Python number as one known at run time."""
    if isinstance(value, Scalar):
        return value
    if isinstance(value, bool):
        return Scalar(value, gl.int1)
    if isinstance(value, float):
        return Scalar(value, gl.float32)
    return Scalar(value, gl.int32 if -(2**31) <= value < 2**31 else gl.int64)


def common_dtype(a: Any, b: Any) -> Any:
    """The type of `a + b`; a Python number takes the other's unless it is a float beside an integer."""
    weak_a, weak_b = not isinstance(a, Value), not isinstance(b, Value)
    if weak_a or weak_b:
        weak, strong = (a, b.dtype) if weak_a else (b, a.dtype)
        if isinstance(weak, float) and not strong.is_floating():
            return gl.float32
        if strong.name == "int1" and not isinstance(weak, bool):
            return number(weak).dtype
        return strong
    if a.dtype is b.dtype:
        return a.dtype
    ranked = sorted((a.dtype, b.dtype), key=lambda t: (t.is_floating(), t.primitive_bitwidth))
    if {t.name for t in ranked} == {"fp16", "bf16"}:
        return gl.float32
    return ranked[-1]


def binary(name: str, a: Any, b: Any) -> Any:
    """`a` and `b` through the operator `name`, as Gluon does it: layouts that differ raise."""
    if type(a) in NUMBERS and type(b) in NUMBERS:  # four in five
        return _of_scalars(name, a, b)
    if isinstance(a, Pointer) or isinstance(b, Pointer):
        if name in ("eq", "ne") and not isinstance(b, Pointer) and b == 0:  # whether a tensor was given
            return Scalar(name == "ne", gl.int1)
        if name != "add":
            raise NotImplementedError(f"{name} of pointers")
        pointer, step = (a, b) if isinstance(a, Pointer) else (b, a)
        return Pointer(pointer.base, binary("add", pointer.offset, step))
    dtype = common_dtype(a, b)
    if name == "truediv" and not dtype.is_floating():
        dtype = gl.float32
    left, right, wrap = operands(a, b, dtype)
    if name in COMPARISONS:
        return wrap(COMPARISONS[name](left, right))
    if name in ("floordiv", "mod"):
        if dtype.is_floating():
            raise TypeError(f"{name} of {a!r} and {b!r}: Gluon divides integers this way")
        if not bool(right.all()):
            raise ZeroDivisionError(f"{name} of {a!r} and {b!r}")
        divided = torch.div(left, right, rounding_mode="trunc")
        return wrap(cast(divided if name == "floordiv" else left - divided * right, dtype))
    if name == "truediv":
        return wrap(cast(left / right, dtype))
    return wrap(cast(ARITHMETIC[name](left, right), dtype))


def _of_scalars(name: str, a: Any, b: Any) -> Scalar:
    """`a` and `b`, of which one is a Scalar and the other may be a Python number, through the operator `name`."""
    dtype = common_dtype(a, b)
    left = a.value if type(a) is Scalar else a
    right = b.value if type(b) is Scalar else b
    if name in ARITHMETIC:
        return Scalar(ARITHMETIC[name](left, right), dtype)
    if name in COMPARISONS:
        return Scalar(COMPARISONS[name](left, right), gl.int1)
    if name == "truediv":
        return Scalar(left / right, dtype if dtype.is_floating() else gl.float32)
    if dtype.is_floating():
        raise TypeError(f"{name} of {a!r} and {b!r}: Gluon divides integers this way")
    quotient = abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)
    return Scalar(quotient if name == "floordiv" else left - quotient * right, dtype)


def operands(a: Any, b: Any, dtype: Any) -> tuple[torch.Tensor, torch.Tensor, Callable[[Any], Any]]:
    """Both sides, one a tensor, ready for a torch operator with a result of `dtype`, and how to wrap that result."""
    tensors = [t for t in (a, b) if isinstance(t, Tensor)]
    if len(tensors) == 2 and tensors[0].layout != tensors[1].layout:
        raise ValueError(f"layouts differ: {tensors[0].layout} and {tensors[1].layout}")
    wide = WIDE[dtype.name]

    def data(value: Any) -> torch.Tensor:
        if isinstance(value, Tensor):
            return value.data if value.data.dtype is wide else value.data.to(wide)
        return torch.tensor(value.value if isinstance(value, Scalar) else value, dtype=wide)

    def wrap(result: torch.Tensor) -> Any:
        return Tensor(result, tensors[0].layout)

    return data(a), data(b), wrap
