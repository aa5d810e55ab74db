"""Launches past Triton's launcher: what stays of a kernel's parameters is laid out once, the driver is called with what moves.

Triton's launcher reads all arguments of every launch, some 105 of a decode and 45 of the merge after it, of which 12 move.
With a driver that does nothing both launches take 8.2 us by it, and 2.1 from here, the making of their arguments included;
on the host of an H200 a paged step takes 22.9 us by it and 18.2 from here, one without a merge 16.9 and 13.0. Nothing here is
used for a kernel of which anything is not as expected: the driver is asked for the size of each parameter.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from headfold.backends.descriptors import MAP_BYTES, metas_of

# How a parameter of a kind that Triton's signatures name lies in memory.
_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}
_MAP = "map"  # a tensor map, which lies elsewhere

_COOPERATIVE, _PROGRAMMATIC_STREAM_SERIALIZATION = 2, 6  # of CUlaunchAttributeID
# Above it Triton asks for another mode of shared memory.
_MOST_SHARED = 228 * 1024


class Slot(int):
    """Stands among arguments for what moves: its value says which of it."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class Kernel(NamedTuple):
    """A compiled kernel as the driver launches it."""

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared: int
    attributes: tuple[int, ...]
    parameters: tuple[tuple[str, Any], ...]


@functools.cache
def _driver() -> Any:
    """The CUDA driver, None where it is not there or cannot tell the sizes of parameters, as before CUDA 12.4."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        return cuda if cuda.cuFuncGetParamInfo and cuda.cuLaunchKernelEx else None
    except (OSError, AttributeError):
        return None


def kernel_of(compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any]) -> Kernel | None:
    """A compiled kernel with these arguments, of which some are Slots, or None where Triton's launcher must launch it."""
    run, cuda = compiled.run, _driver()
    if cuda is None or not all(grid) or not isinstance(compiled.function, int):
        return None
    scratch = [getattr(run, f"{name}_scratch_size", 1) for name in ("global", "profile")]
    try:
        warps, ctas, shared = compiled.packed_metadata
        signature = tuple(compiled.src.signature.values())
        flags = (run.launch_pdl, run.launch_cooperative_grid)
    except (AttributeError, TypeError, ValueError):
        return None
    if any(scratch) or getattr(run, "gsan_enabled", False) or ctas != 1 or shared > _MOST_SHARED:
        return None
    parameters = _parameters(signature, arguments, metas_of(compiled))
    if parameters is None or _sizes(parameters) != _sizes_asked(cuda, compiled.function):
        return None
    ids = (_PROGRAMMATIC_STREAM_SERIALIZATION, _COOPERATIVE)
    attributes = tuple(one for one, on in zip(ids, flags, strict=True) if on)
    return Kernel(compiled.function, grid, 32 * warps, shared, attributes, parameters)


def _parameters(
    signature: Sequence[Any], arguments: Sequence[Any], metas: Sequence[Any]
) -> tuple[tuple[str, Any], ...] | None:
    """(format, value) of each parameter, None if any is of another kind. The value of a tensor map is its number."""
    found: list[tuple[str, Any]] = []
    maps = 0
    if len(signature) != len(arguments):
        return None
    for kind, value in zip(signature, arguments, strict=True):
        if kind == "constexpr":
            continue
        if not isinstance(kind, str):
            return None
        if kind.startswith("tensordesc<") and maps < len(metas) and metas[maps] is not None:
            found.append((_MAP, maps))
            found += [("i", n) for n in value.shape]
            found += [("q", n) for n in value.strides]
            maps += 1
        elif kind in _FORMATS and (not isinstance(value, Slot) or kind in ("i64", "u64")):
            found.append((_FORMATS[kind], value))
        else:
            return None
    found += [("Q", 0), ("Q", 0)]  # no scratch memory
    try:
        for form, value in found:
            if form != _MAP:
                struct.pack(form, value)
    except (struct.error, OverflowError):
        return None
    return tuple(found)


def _sizes(parameters: Sequence[tuple[str, Any]]) -> list[int]:
    return [MAP_BYTES if form == _MAP else struct.calcsize(form) for form, _ in parameters]


def _sizes_asked(cuda: Any, function: int) -> list[int]:
    """What the driver says."""
    found: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    where = ctypes.byref(offset), ctypes.byref(size)
    while cuda.cuFuncGetParamInfo(ctypes.c_void_p(function), ctypes.c_size_t(len(found)), *where) == 0:
        found.append(size.value)
    return found


class Launches:
    """Launches of kernels one after another, with the same of what moves. Several threads may call it at a time."""

    def __init__(self, moving: int, kernels: Sequence[Kernel]) -> None:
        """`moving` is how many numbers move."""
        self._moving = moving
        self._kernels = kernels
        # Those that no call uses: what takes one out takes it from other threads, and from what interrupts this one.
        self._blocks: list[_Block] = []

    def __call__(self, moving: Sequence[int], stream: int, maps: Sequence[tuple[int, Any]]) -> int:
        """Launch on a stream; returns how many kernels were, all of them if the driver refused none.

        Args:
            moving: the numbers that move, of 64 bits.
            stream: a stream of the current device.
            maps: (address, owner) of each of the first kernel's tensor maps.
        """
        try:
            block = self._blocks.pop()
        except IndexError:
            block = _Block(self._moving, self._kernels)
        block.write(*moving)
        if block.stream != stream:
            block.aim(stream)
        if maps:
            for place, (at, _) in zip(block.map_places, maps, strict=True):
                block.parameters[place] = at
        done = 0
        for launch in block.launches:
            if launch() != 0:
                break
            done += 1
        self._blocks.append(block)
        return done


class _Block:
    """Memory that kernels are launched from, by one call at a time: the driver copies a launch's parameters."""

    def __init__(self, moving: int, kernels: Sequence[Kernel]) -> None:
        memory = (ctypes.c_uint64 * moving)()
        self.write: Callable[..., None] = functools.partial(struct.Struct(f"{moving}Q").pack_into, memory, 0)
        self.stream = 0
        self.launches: list[Callable[[], int]] = []
        # Where the first kernel's parameters lie, and which of them are tensor maps.
        self.parameters: Any = None
        self.map_places = [i for i, (form, _) in enumerate(kernels[0].parameters) if form == _MAP]
        self._configs: list[_Config] = []
        self._kept: list[Any] = [memory]
        for kernel in kernels:
            self._add(kernel, ctypes.addressof(memory))

    def _add(self, kernel: Kernel, moving: int) -> None:
        count = len(kernel.parameters)
        constant = (ctypes.c_uint64 * count)()
        parameters = (ctypes.c_uint64 * count)()
        for i, (form, value) in enumerate(kernel.parameters):
            if isinstance(value, Slot):
                parameters[i] = moving + 8 * value
            elif form != _MAP:
                struct.pack_into(form, constant, 8 * i, value)
                parameters[i] = ctypes.addressof(constant) + 8 * i
        attributes = (_Attribute * len(kernel.attributes))()
        for attribute, one in zip(attributes, kernel.attributes, strict=True):
            attribute.id, attribute.value[0] = one, 1
        block, count = (kernel.threads, 1, 1), len(attributes)
        config = _Config(kernel.grid, block, kernel.shared, None, attributes, count)
        self._configs.append(config)
        self._kept += (constant, parameters, attributes)
        if self.parameters is None:
            self.parameters = parameters
        # Not through PyDLL: a launch waits while the queue is full, and what it waits for may need the interpreter.
        function = ctypes.c_void_p(kernel.function)
        launch = _driver().cuLaunchKernelEx
        self.launches.append(functools.partial(launch, ctypes.byref(config), function, parameters, None))

    def aim(self, stream: int) -> None:
        """Launch on a stream from now on."""
        self.stream = stream
        for config in self._configs:
            config.stream = stream
