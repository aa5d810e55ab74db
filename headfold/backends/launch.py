"""Launching: the one door through which kernels reach a device, or the compiler alone.

Triton's own `kernel[grid](...)` binds and inspects every argument of every call, about 0.5 us each. Here a launcher is
made once for all calls that look alike; it finds the compiled program by what it was compiled for, and calls that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

from headfold.backends.descriptors import quicken

# torch.cuda.current_device() first asks whether CUDA was initialised, 0.3 us; here tensors lie on a device already.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

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


class Launcher:
    """A compiled program of a kernel and the grid that it is launched with: made once, called again and again."""

    __slots__ = ("_compiled", "_constants", "_device", "_front", "_grid", "_kernel", "_options", "_tail")

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
        self._compiled: Any = None
        # What every launch begins and ends with.
        self._front = (*grid, 1, 1)[:3]
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
        elif self._device.index == _current_device():
            self._launch(arguments)
        else:
            with torch.cuda.device(self._device):  # Triton launches on the current device
                self._launch(arguments)

    def _launch(self, arguments: tuple[int | float, ...]) -> None:
        compiled = self._compiled
        if compiled is None:
            key = (id(self._kernel), self._device.index, *self._constants.values(), *self._options.values())
            compiled = _compiled.get(key)
            if compiled is None:
                compiled = self._kernel[self._grid](*arguments, **self._constants, **self._options)
                quicken(compiled)
                self._compiled = _compiled[key] = compiled
                return
            self._compiled = compiled
        hooks = knobs.runtime
        if hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:  # a profiler listens
            compiled[self._front](*arguments, *self._tail)
            return
        # What `compiled[grid](...)` comes to when nobody listens, in Triton 3.6 to 3.9: half its time was spent on
        # telling nobody.
        stream = driver.active.get_current_stream(self._device.index)
        compiled.run(
            *self._front,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *arguments,
            *self._tail,
        )
