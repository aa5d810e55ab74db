"""Launching: the one door through which kernels reach a device, or the compiler alone.

Triton's own `kernel[grid](...)` binds and inspects every argument of every call, about 0.5 us each. Here a launcher is
made once for all calls that look alike; it finds the compiled program by what it was compiled for, and calls that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs

from headfold.backends.descriptors import quicken

# torch.cuda.current_device() first asks whether CUDA was initialised, 0.3 us; here tensors lie on a device already.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
# What Triton's driver asks for the stream that it launches on.
current_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)

_compiled: dict[tuple[Any, ...], Any] = {}
_compiled_only: list[tuple[str, Any]] | None = None


@contextmanager
def compile_only() -> Iterator[list[tuple[str, Any]]]:
    """Launches within compile instead, without a GPU. Yields the list of (kernel name, compiled kernel)."""
    global _compiled_only
    before, _compiled_only = _compiled_only, []
    try:
        yield _compiled_only
    finally:
        _compiled_only = before


def compiling() -> bool:
    """True within `compile_only`."""
    return _compiled_only is not None


def compile_instead(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    """Within `compile_only`: compile what would be launched."""
    assert _compiled_only is not None
    compiled = kernel.run(*arguments, grid=grid, warmup=True, **keywords)
    _compiled_only.append((kernel.fn.__name__, compiled))


def undisturbed() -> bool:
    """True where nobody listens to launches, as a profiler does, and nothing is compiled in their place."""
    hooks = knobs.runtime
    return not (hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls or _compiled_only is not None)


class Launcher:
    """A compiled program of a kernel and the grid that it is launched with: made once, called again and again."""

    __slots__ = (
        "_constants",
        "_device",
        "_found",
        "_grid",
        "_kernel",
        "_key",
        "_options",
        "_tail",
        "grid",
    )

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        constants: dict[str, Any],
        options: dict[str, Any],
        device: torch.device,
    ) -> None:
        """
        Args:
            kernel: a jitted function that is told to specialise on no argument.
            grid: one to three numbers of programs.
            constants: the compile-time arguments, in the kernel's order, where they come last.
            options: what Triton takes besides: num_warps, num_stages ...
            device: where the tensors are; the interpreter's are on the CPU.
        """
        self._kernel = kernel
        self._grid = grid
        self._constants = constants
        # A kernel that waits for the one before it itself is launched while that one ends.
        self._options = options | {"launch_pdl": True} if constants.get("EARLY") else options
        self._device = device
        self._key = (id(kernel), device.index, *constants.values(), *self._options.values())
        self._found: Any = None
        # What every launch begins and ends with.
        self.grid: tuple[int, int, int] = (*grid, 1, 1)[:3]  # type: ignore[assignment]
        self._tail = tuple(constants.values())

    def __call__(self, arguments: tuple[int | float, ...]) -> None:
        """Launch on the device's current stream.

        Args:
            arguments: numbers only, tensors as their addresses: nothing of them may change what is compiled.
        """
        if compiling():
            compile_instead(self._kernel, self._grid, arguments, {**self._constants, **self._options})
        elif self._device.type != "cuda":
            self._kernel[self._grid](*arguments, **self._constants, **self._options)
        elif self._device.index == current_device():
            self._launch(arguments)
        else:
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._launch(arguments)

    def _launch(self, arguments: tuple[Any, ...]) -> None:
        if undisturbed():
            self.straight(current_stream(self._device.index), arguments)
        elif self.compiled is None:
            self._compile(arguments)
        else:  # a profiler listens
            self.compiled[self.grid](*self.whole(arguments))

    def straight(self, stream: int, arguments: tuple[Any, ...]) -> None:
        """Launch where nothing disturbs, on the current stream of the current device, which must be the tensors'."""
        compiled = self.compiled
        if compiled is None:
            self._compile(arguments)
            return
        # What `compiled[grid](...)` comes to when nobody listens, in Triton 3.6 to 3.9: half its time goes into telling nobody.
        front = (*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None)
        compiled.run(*front, *arguments, *self._tail)

    def _compile(self, arguments: tuple[Any, ...]) -> None:
        """The first launch of a program."""
        compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
        quicken(compiled)
        _compiled[self._key] = compiled

    @property
    def compiled(self) -> Any:
        """The compiled program, None before it was launched once."""
        if self._found is None:
            self._found = _compiled.get(self._key)
        return self._found

    def whole(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """All arguments of the compiled program: these, and those that it was compiled for."""
        return *arguments, *self._tail
