"""Launches past Triton's launcher, of a driver that writes down what it is told."""

from __future__ import annotations

import ctypes
import struct
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

from headfold.backends import raw_launch
from headfold.backends.raw_launch import Launches, Slot, kernel_of

SIZES = {"i32": 4, "u32": 4, "i64": 8, "fp32": 4}
SIGNATURE = {"q": "i64", "n": "i32", "magic": "u32", "scale": "fp32", "states": "i64", "D": "constexpr"}
ARGUMENTS = (Slot(1), -3, 2**32 - 1, 0.1, Slot(0), 64)


class Driver:
    """The CUDA driver: knows the sizes of parameters, and keeps the launches that it does not refuse."""

    def __init__(self) -> None:
        self.sizes = [*(SIZES[kind] for kind in SIGNATURE.values() if kind in SIZES), 8, 8]
        self.seen: list[dict[str, Any]] = []
        self.refused: set[int] = set()
        prototype = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
        self.cuLaunchKernelEx = prototype(self._launch)

    def cuFuncGetParamInfo(self, function: Any, index: Any, offset: Any, size: Any) -> int:
        if index.value >= len(self.sizes):
            return 1
        size._obj.value = self.sizes[index.value]
        return 0

    def _launch(self, config: int, function: int, parameters: int, extra: None) -> int:
        if function in self.refused:
            return 201
        form = raw_launch._Config.from_address(config)
        places = (ctypes.c_void_p * len(self.sizes)).from_address(parameters)
        self.seen.append(
            {
                "function": function,
                "grid": tuple(form.grid),
                "block": tuple(form.block),
                "shared": form.shared,
                "stream": form.stream,
                "attributes": [
                    (form.attributes[i].id, list(form.attributes[i].value)) for i in range(form.count)
                ],
                "values": [ctypes.string_at(at or 0, n) for at, n in zip(places, self.sizes, strict=True)],
            }
        )
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(raw_launch, "_driver", lambda: driver)
    return driver


def compiled(function: int = 77, **change: Any) -> Any:
    """A compiled kernel as Triton has it, changed."""
    run = {
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_pdl": False,
        "launch_cooperative_grid": False,
    }
    values = {
        "function": function,
        "packed_metadata": (4, 1, 1000),
        "src": SimpleNamespace(signature=SIGNATURE),
        "metadata": SimpleNamespace(),
    }
    for name, value in change.items():
        (run if name in run or name == "gsan_enabled" else values)[name] = value
    return SimpleNamespace(run=SimpleNamespace(**run), **values)


def kernel(function: int = 77, **change: Any) -> raw_launch.Kernel:
    found = kernel_of(compiled(function, **change), (5, 2, 1), ARGUMENTS)
    assert found is not None
    return found


def packed(first: int, second: int) -> list[bytes]:
    """What lies in the parameters of a launch with these two that move."""
    numbers = (("q", second), ("i", -3), ("I", 2**32 - 1), ("f", 0.1), ("q", first), ("Q", 0), ("Q", 0))
    return [struct.pack(form, value) for form, value in numbers]


def test_the_driver_is_given_what_tritons_launcher_gives_it(cuda: Driver) -> None:
    launches = Launches(2, [kernel()])
    assert launches((2**40, 2**47 + 5), 0, ()) == 1
    assert launches((7, 8), 2**45, ()) == 1
    first, second = cuda.seen
    assert first == {
        "function": 77,
        "grid": (5, 2, 1),
        "block": (128, 1, 1),
        "shared": 1000,
        "stream": None,
        "attributes": [],
        "values": packed(2**40, 2**47 + 5),
    }
    assert second == first | {"stream": 2**45, "values": packed(7, 8)}
    assert launches((7, 8), 0, ()) == 1
    assert cuda.seen[-1]["stream"] is None


@pytest.mark.parametrize(("pdl", "cooperative"), [(True, False), (False, True), (True, True)])
def test_launch_attributes(cuda: Driver, pdl: bool, cooperative: bool) -> None:
    """CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION and COOPERATIVE, in Triton's order."""
    Launches(2, [kernel(launch_pdl=pdl, launch_cooperative_grid=cooperative)])((1, 2), 0, ())
    ids = [number for number, on in ((6, pdl), (2, cooperative)) if on]
    assert cuda.seen[0]["attributes"] == [(number, [1, *[0] * 7]) for number in ids]


def test_structures_are_laid_out_like_the_drivers() -> None:
    assert ctypes.sizeof(raw_launch._Attribute) == 72
    assert (raw_launch._Attribute.value.offset, ctypes.sizeof(raw_launch._Config)) == (8, 56)
    offsets = [getattr(raw_launch._Config, n).offset for n in ("shared", "stream", "attributes", "count")]
    assert offsets == [24, 32, 40, 48]


def test_kernels_are_launched_in_turn_with_the_same_of_what_moves(cuda: Driver) -> None:
    launches = Launches(2, [kernel(1), kernel(2)])
    assert launches((3, 4), 0, ()) == 2
    assert [(one["function"], one["values"]) for one in cuda.seen] == [(1, packed(3, 4)), (2, packed(3, 4))]


@pytest.mark.parametrize("refused", [1, 2])
def test_a_launch_that_is_refused_ends_them(cuda: Driver, refused: int) -> None:
    launches = Launches(2, [kernel(1), kernel(2)])
    cuda.refused = {refused}
    assert launches((3, 4), 0, ()) == refused - 1
    assert len(cuda.seen) == refused - 1
    cuda.refused = set()
    assert launches((3, 4), 0, ()) == 2


def test_tensor_maps_are_parameters_with_sizes_and_strides(cuda: Driver) -> None:
    """Where each lies is told at every launch; the sizes and strides of the first call's stay."""
    maps = [ctypes.create_string_buffer(bytes([i] * 128), 128) for i in (1, 2, 3)]
    described = SimpleNamespace(shape=[4, 64], strides=[2**33, 1])
    signature = {"k": "tensordesc<bf16[64,64]>", "q": "i64", "v": "tensordesc<bf16[64,64]>"}
    taker = compiled(
        src=SimpleNamespace(signature=signature),
        metadata=SimpleNamespace(tensordesc_meta=[{"swizzle": 1}, {"swizzle": 2}]),
    )
    cuda.sizes = [128, 4, 4, 8, 8, 8, 128, 4, 4, 8, 8, 8, 8]
    found = kernel_of(taker, (1, 1, 1), (described, Slot(0), described))
    assert found is not None
    launches = Launches(1, [found])
    shape = [struct.pack("i", 4), struct.pack("i", 64), struct.pack("q", 2**33), struct.pack("q", 1)]
    for first, second in ((0, 1), (2, 0)):
        launches((5,), 0, [(ctypes.addressof(maps[i]), maps[i]) for i in (first, second)])
        assert cuda.seen[-1]["values"] == [
            *(maps[first].raw, *shape, struct.pack("q", 5)),
            *(maps[second].raw, *shape, *[struct.pack("Q", 0)] * 2),
        ]
    bare = compiled(src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(tensordesc_meta=None))
    assert kernel_of(bare, (1, 1, 1), (described, Slot(0), described)) is None


UNUSUAL: dict[str, dict[str, Any]] = {
    "scratch memory": {"global_scratch_size": 8},
    "profiled": {"profile_scratch_size": 8},
    "sanitised": {"gsan_enabled": True},
    "clusters": {"packed_metadata": (4, 2, 1000)},
    "much shared memory": {"packed_metadata": (4, 1, 229 * 1024)},
    "other metadata": {"packed_metadata": (4, 1, 1000, 1)},
    "not loaded": {"function": None},
    "a pointer": {"src": SimpleNamespace(signature=SIGNATURE | {"q": "*bf16"})},
    "a tuple": {"src": SimpleNamespace(signature=SIGNATURE | {"q": ("i64",)})},
    "another argument": {"src": SimpleNamespace(signature=SIGNATURE | {"more": "i32"})},
    "a narrow address": {"src": SimpleNamespace(signature=SIGNATURE | {"q": "i32"})},
    "a number too large": {"src": SimpleNamespace(signature=SIGNATURE | {"magic": "i32"})},
}


@pytest.mark.parametrize("change", UNUSUAL)
def test_anything_unusual_is_left_to_triton(cuda: Driver, change: str) -> None:
    assert kernel_of(compiled(**UNUSUAL[change]), (1, 1, 1), ARGUMENTS) is None
    assert kernel_of(compiled(), (1, 1, 1), ARGUMENTS) is not None
    assert kernel_of(compiled(), (0, 1, 1), ARGUMENTS) is None  # Triton launches nothing


@pytest.mark.parametrize("sizes", [[8, 4, 4, 4, 8, 8], [8, 4, 4, 4, 8, 8, 8, 8], [8, 4, 4, 8, 8, 8, 8], []])
def test_other_parameters_than_the_driver_knows_are_left_to_triton(cuda: Driver, sizes: list[int]) -> None:
    cuda.sizes = sizes
    assert kernel_of(compiled(), (1, 1, 1), ARGUMENTS) is None


def test_without_a_driver_triton_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_launch, "_driver", lambda: None)
    assert kernel_of(compiled(), (1, 1, 1), ARGUMENTS) is None


def test_calls_within_a_call_and_of_several_threads_have_memory_of_their_own(cuda: Driver) -> None:
    """Every launch sees its own numbers, whatever comes between writing them and launching."""
    launches = Launches(2, [kernel(1), kernel(2)])
    before = cuda.cuLaunchKernelEx
    depth = [0]

    def within(*args: Any) -> int:
        if depth[0] < 2:
            depth[0] += 1
            launches((100 * depth[0], 1), 0, ())
        return int(before(*args))

    cuda.cuLaunchKernelEx = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)(within)
    launches((7, 8), 0, ())
    expected = [(f, packed(*n)) for n in ((200, 1), (100, 1), (7, 8)) for f in (1, 2)]
    assert sorted((one["function"], one["values"]) for one in cuda.seen) == sorted(expected)

    cuda.cuLaunchKernelEx = before
    cuda.seen.clear()
    launches = Launches(2, [kernel(1), kernel(2)])
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda n: launches((n, n + 1), n, ()), range(400))) == {2}
    expected = [(f, packed(n, n + 1), n or None) for n in range(400) for f in (1, 2)]  # type: ignore[misc]
    found = [(one["function"], one["values"], one["stream"]) for one in cuda.seen]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert len(launches._blocks) <= 8
