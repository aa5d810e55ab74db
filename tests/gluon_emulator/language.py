"""The functions of Gluon's language, as far as headfold's kernels use them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from triton.experimental.gluon import language as gl

from headfold.backends.besides import KINDS
from tests.gluon_emulator import barriers, shared
from tests.gluon_emulator.engines import Descriptor
from tests.gluon_emulator.scheduler import current
from tests.gluon_emulator.values import (
    GLUON,
    TORCH,
    Derived,
    Pointer,
    Scalar,
    Tensor,
    Value,
    binary,
    cast,
    common_dtype,
    number,
    operands,
)


def program_id(axis: int) -> Scalar:
    return number(current().program.number if axis == 0 else 0)


def num_programs(axis: int) -> Scalar:
    return number(current().program.programs if axis == 0 else 1)


def numbers(*bounds: Any) -> Iterator[Scalar]:
    """`range` over numbers known at run time."""
    return (number(i) for i in range(*(int(number(n)) for n in bounds)))


def static_range(*bounds: int) -> range:
    if any(isinstance(n, Value) for n in bounds):
        raise TypeError(f"static_range{bounds}: its bounds are constants")
    return range(*bounds)


def static_assert(condition: Any, message: str = "") -> None:
    if isinstance(condition, Value):
        raise TypeError("static_assert: the condition is known at run time only")
    assert condition, message


def arange(start: int, end: int, layout: Any) -> Tensor:
    if (end - start) & (end - start - 1):
        raise ValueError(f"arange({start}, {end}): the length must be a power of 2")
    return Tensor(torch.arange(start, end, dtype=torch.int32), layout)


def full(shape: list[int], value: Any, dtype: Any, layout: Any) -> Tensor:
    return Tensor(torch.full(shape, Scalar(number(value).value, dtype).value, dtype=TORCH[dtype]), layout)


def zeros(shape: list[int], dtype: Any, layout: Any) -> Tensor:
    return full(shape, 0, dtype, layout)


def zeros_like(x: Tensor) -> Tensor:
    return full(x.shape, 0, x.dtype, x.layout)


def convert_layout(x: Tensor, layout: Any, assert_trivial: bool = False) -> Tensor:
    """`assert_trivial` is the compiler's to check: it knows where elements lie."""
    return Tensor(x.data, layout)


def join(a: Tensor, b: Tensor) -> Tensor:
    """Both in a new last dimension."""
    if a.layout != b.layout:
        raise ValueError(f"layouts differ: {a.layout} and {b.layout}")
    return Tensor(torch.stack([a.data, b.data], -1), Derived("join", (), a.data.dim() + 1, a.layout))


def _chosen(of_tensors: Callable[..., torch.Tensor], of_numbers: Callable[..., Any]) -> Callable[..., Any]:
    def choose(a: Any, b: Any) -> Any:
        if not isinstance(a, Value) and not isinstance(b, Value):
            return of_numbers(a, b)
        dtype = common_dtype(a, b)
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return Scalar(of_numbers(number(a).value, number(b).value), dtype)
        left, right, wrap = operands(a, b, dtype)
        return wrap(of_tensors(left, right).to(TORCH[dtype]))

    return choose


# Of a number and NaN both take the number, as on the GPU.
maximum = _chosen(torch.fmax, max)
minimum = _chosen(torch.fmin, min)


def cdiv(a: Any, b: Any) -> Any:
    return binary("floordiv", binary("add", a, b - 1), b) if isinstance(a, Value) else -(-a // b)


def where(condition: Tensor | Scalar, a: Any, b: Any) -> Any:
    dtype = common_dtype(a, b) if isinstance(a, Value) or isinstance(b, Value) else number(a).dtype
    if isinstance(condition, Scalar):
        tensor = next((one for one in (a, b) if isinstance(one, Tensor)), None)
        chosen = a if condition else b
        if tensor is None or isinstance(chosen, Tensor):
            return (chosen if isinstance(chosen, Tensor) else number(chosen)).to(dtype)
        return full(tensor.shape, chosen, dtype, tensor.layout)
    for one in (a, b):
        if isinstance(one, Tensor) and one.layout != condition.layout:
            raise ValueError(f"layouts differ: {condition.layout} and {one.layout}")
    left, right = (number_or_data(one).to(TORCH[dtype]) for one in (a, b))
    return Tensor(torch.where(condition.data, left, right), condition.layout)


def number_or_data(value: Any) -> torch.Tensor:
    return value.data if isinstance(value, Tensor) else number(value).one


def _elementwise(torch_function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda x: Tensor(torch_function(x.data), x.layout)


exp2 = _elementwise(torch.exp2)
log2 = _elementwise(torch.log2)


def _reduced(x: Tensor, data: torch.Tensor, axis: int | None) -> Any:
    if data.dim() == 0:
        return Scalar(data.item(), GLUON[data.dtype])
    return Tensor(data, gl.SliceLayout(axis, x.layout))


def maximum_of(x: Tensor, axis: int) -> Any:
    """`gl.max`: NaN is left out, as on the GPU, where there is a number."""
    if not x.dtype.is_floating():
        return _reduced(x, x.data.amax(axis), axis)
    kept = x.data.masked_fill(x.data.isnan(), -torch.inf).amax(axis)
    return _reduced(x, torch.where(x.data.isnan().all(axis), torch.nan, kept).to(x.data.dtype), axis)


def minimum_of(x: Tensor, axis: int) -> Any:
    """`gl.min` of integers."""
    if x.dtype.is_floating():
        raise NotImplementedError("the minimum of floating-point numbers")
    return _reduced(x, x.data.amin(axis), axis)


def associative_scan(x: Tensor, axis: int, combine: Callable[[Any, Any], Any]) -> Tensor:
    """Element i of the result is elements 0..i of `x`, of one dimension, through `combine`."""
    found = [number(n) for n in x.data.tolist()]
    for i in range(1, len(found)):
        found[i] = combine(found[i - 1], found[i])
    return Tensor(cast(torch.tensor([int(n) for n in found]), x.dtype), x.layout)


def divide(n: Any, by: tuple[Any, Any]) -> Any:
    """`parts/division.py`, whose unsigned numbers of 64 bits torch has no arithmetic for."""
    magic, shift = (int(one) for one in by)
    if isinstance(n, Tensor):
        return Tensor(cast((2 * n.data.long() * magic >> 32) >> shift, gl.int32), n.layout)
    return Scalar((2 * int(n) * magic >> 32) >> shift, gl.int32)


def pointer(address: Any, dtype: Any, alignment: int) -> Pointer:
    """`parts/address.py`: a tensor's address is a Pointer here, and that of none 0."""
    if not isinstance(address, Pointer):
        assert address == 0
        return Pointer(torch.zeros(1, dtype=TORCH[dtype]), number(0))
    if address.dtype.element_ty != dtype:
        raise TypeError(f"{address!r} taken for the address of {dtype}")
    return address


def load_float(address: Any, kind: Any, offset: Any, mask: Any) -> Any:
    """`parts/address.py`, which looks at the bits of narrow numbers."""
    if not mask:
        return Scalar(0.0, gl.float32)
    if KINDS[address.base.dtype] != int(kind):
        raise TypeError(f"{address!r} taken for numbers of kind {kind}")
    return load(address + offset).to(gl.float32)


def sum_of(x: Tensor, axis: int) -> Any:
    return _reduced(x, x.data.sum(axis, dtype=x.data.dtype), axis)


def reduce(x: Tensor, axis: None, combine: Callable[[Any, Any], Any]) -> Scalar:
    """All elements of `x` through `combine`, in halves."""
    if axis is not None:
        raise NotImplementedError("reduce along one axis")
    data = x.data.flatten()
    layout = gl.BlockedLayout([1], [32], [current().warps], [0])
    while data.numel() > 1:
        left, right = data.chunk(2)
        data = combine(Tensor(left, layout), Tensor(right, layout)).data
    return Scalar(data[0].item(), x.dtype)


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    current().step()
    where_to, memory = pointer.locations(), pointer.memory()
    live = torch.ones_like(where_to, dtype=torch.bool) if mask is None else number_or_data(mask)
    _check_addresses(pointer, where_to, live)
    found = torch.where(live, memory[torch.where(live, where_to, 0)], number(other).one.to(memory.dtype))
    if isinstance(pointer.offset, Tensor):
        return Tensor(found, pointer.offset.layout)
    return Scalar(found.item(), GLUON[memory.dtype])


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    current().step()
    if isinstance(pointer.offset, Tensor):
        for one in (value, mask):
            if isinstance(one, Tensor) and one.layout != pointer.offset.layout:
                raise ValueError(f"layouts differ: {pointer.offset.layout} and {one.layout}")
    where_to, memory = pointer.locations(), pointer.memory()
    live = torch.ones_like(where_to, dtype=torch.bool) if mask is None else number_or_data(mask)
    live = live.expand(where_to.shape)
    _check_addresses(pointer, where_to, live)
    data = number_or_data(value).to(memory.dtype).expand(where_to.shape)
    memory[where_to[live]] = data[live]
    stored = current().program.stored.get(memory.untyped_storage().data_ptr())
    if stored is not None:
        if bool(stored[where_to[live]].any()):
            raise RuntimeError(f"{pointer!r}: an element is stored twice")
        stored[where_to[live]] = True


def _check_addresses(pointer: Pointer, where_to: torch.Tensor, live: torch.Tensor) -> None:
    outside = (where_to < 0) | (where_to >= pointer.memory().numel())
    if bool((outside & live).any()):
        raise IndexError(
            f"element {where_to[outside & live].flatten()[0]} of memory of {pointer.memory().numel()}"
        )


def atomic_add(pointer: Pointer, value: Any, sem: str = "acq_rel", scope: str = "gpu") -> Scalar:
    return _exchange(pointer, lambda old: old + value)


def atomic_xchg(pointer: Pointer, value: Any, sem: str = "acq_rel", scope: str = "gpu") -> Scalar:
    return _exchange(pointer, lambda old: number(value))


def _exchange(pointer: Pointer, change: Callable[[Scalar], Scalar]) -> Scalar:
    current().step()
    where_to, memory = pointer.locations(), pointer.memory()
    _check_addresses(pointer, where_to, torch.ones_like(where_to, dtype=torch.bool))
    old = Scalar(memory[where_to].item(), GLUON[memory.dtype])
    memory[where_to] = change(old).value
    return old


# `softmax.shrunk`, which leaves out products with 1.
PRODUCT_UNLESS_ONES = (
    r"\{ \.reg \.pred p, q; (setp\.neu\.f32 [pq], \$\d+, 0f3F800000; ){2}or\.pred p, p, q; "
    r"vote\.sync\.any\.pred p, p, 0xffffffff; @!p bra\.uni done; (mul\.f32 \$\d+, \$\d+, \$\d+; )+done: \}"
)


def inline_asm_elementwise(
    asm: str, constraints: str, args: list[Tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    """The PTX that headfold's kernels hold, over tensors of one layout."""
    if any(x.layout != args[0].layout for x in args):
        raise ValueError(f"layouts differ: {[x.layout for x in args]}")
    if (convert := re.fullmatch(r"cvt\.rn\.(bf16|f16)x2\.f32 \$0, \$2, \$1;", asm)) and pack == 1:
        _of_types(args, [gl.float32, gl.float32], constraints, "=r,f,f")
        target = torch.bfloat16 if convert[1] == "bf16" else torch.float16
        halves = torch.stack([x.data for x in args], -1).to(target)
        return Tensor(halves.view(torch.int32).squeeze(-1), args[0].layout)
    if asm == "mov.b32 {$0, $1}, $2;" and pack == 1:
        _of_types(args, [gl.int32], constraints, "=h,=h,r")
        halves = args[0].data.contiguous().unsqueeze(-1).view(TORCH[dtype[0]])
        return tuple(Tensor(half, args[0].layout) for half in halves.unbind(-1))
    if asm == "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;" and pack == 2 and dtype == gl.float32:
        _of_types(args, [gl.bfloat16], constraints, "=r,=r,r")
        return Tensor(
            (args[0].data.contiguous().view(torch.int16).int() << 16).view(torch.float32), args[0].layout
        )
    if asm == "rcp.approx.ftz.f32 $0, $1;" and pack == 1:
        _of_types(args, [gl.float32], constraints, "=f,f")
        return Tensor(args[0].data.reciprocal(), args[0].layout)
    if re.fullmatch(PRODUCT_UNLESS_ONES, asm):
        _of_types(
            args,
            [gl.float32, gl.float32],
            constraints,
            ",".join(["=f"] * pack + [*map(str, range(pack))] + ["f"] * pack),
        )
        if re.findall(r"mul\.f32 \$(\d+), \$(\d+), \$(\d+);", asm) != [
            (str(i), str(i), str(2 * pack + i)) for i in range(pack)
        ]:
            raise ValueError(f"assembly {asm!r} with {pack} elements a register")
        return Tensor(args[0].data * args[1].data, args[0].layout)
    raise NotImplementedError(f"assembly {asm!r} of {constraints} with {pack} elements a register")


def _of_types(args: list[Tensor], types: list[Any], constraints: str, want: str) -> None:
    if [x.dtype for x in args] != types or constraints != want:
        raise TypeError(f"assembly of {[x.dtype for x in args]} with {constraints}")


def warp_specialize(partitions: list[Any], warps: list[int], registers: list[int]) -> None:
    """Run the functions side by side: the first on this thread, every other on one of its own."""
    if not len(partitions) - 1 == len(warps) == len(registers):
        raise ValueError(
            f"{len(partitions)} partitions, {len(warps)} numbers of warps, {len(registers)} of registers"
        )
    me = current()
    workers = [
        me.scheduler.spawn(
            f"{function.__name__} ({me.program.name}, partition {i + 1})",
            me.program,
            count,
            lambda function=function, arguments=arguments: function(*arguments),
            parent=me,
        )
        for i, ((function, arguments), count) in enumerate(zip(partitions[1:], warps, strict=True))
    ]
    function, arguments = partitions[0]
    function(*arguments)
    me.wait(lambda: all(worker.finished for worker in workers), "the other partitions")


LANGUAGE: dict[str, Any] = {
    "program_id": program_id,
    "num_programs": num_programs,
    "static_range": static_range,
    "static_assert": static_assert,
    "arange": arange,
    "full": full,
    "zeros": zeros,
    "zeros_like": zeros_like,
    "convert_layout": convert_layout,
    "join": join,
    "maximum": maximum,
    "minimum": minimum,
    "cdiv": cdiv,
    "where": where,
    "exp2": exp2,
    "log2": log2,
    "max": maximum_of,
    "min": minimum_of,
    "sum": sum_of,
    "associative_scan": associative_scan,
    "reduce": reduce,
    "load": load,
    "store": store,
    "atomic_add": atomic_add,
    "atomic_xchg": atomic_xchg,
    "inline_asm_elementwise": inline_asm_elementwise,
    "allocate_shared_memory": shared.allocate,
    "barrier": shared.barrier,
    "thread_barrier": shared.barrier,
    "warp_specialize": warp_specialize,
}
# What needs no emulation: types, layouts, and what marks compile-time values.
AS_IT_IS = (
    *("int1", "int8", "uint8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("constexpr", "SliceLayout", "BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout"),
    *("NVMMASharedLayout", "SwizzledSharedLayout"),
)


class Language:
    """Stands for the modules `triton.experimental.gluon.language` and, in functions that both share, `triton.language`."""

    # Kernels before and after one run when it does not.
    extra = SimpleNamespace(cuda=SimpleNamespace(gdc_wait=lambda: None, gdc_launch_dependents=lambda: None))

    def __getattr__(self, name: str) -> Any:
        if name in LANGUAGE:
            return LANGUAGE[name]
        if name in AS_IT_IS:
            return getattr(gl, name)
        raise NotImplementedError(f"gl.{name} is not emulated")


MBARRIER = SimpleNamespace(
    init=barriers.init,
    expect=barriers.expect,
    arrive=barriers.arrive,
    wait=barriers.wait,
    MBarrierLayout=gl.nvidia.hopper.mbarrier.MBarrierLayout,
)


def argument(value: Any, annotation: Any) -> Any:
    """A launch's argument as the kernel sees it."""
    if annotation is gl.constexpr or value is None:
        return value
    if isinstance(value, torch.Tensor):
        return Pointer(value, number(0))
    if hasattr(value, "block_shape"):
        return Descriptor(value)
    return Scalar(value, annotation) if isinstance(annotation, gl.dtype) else number(value)
