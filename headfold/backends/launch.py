"""Launching: the one door through which kernels reach a device, or the compiler alone.

Triton's own `kernel[grid](...)` binds and inspects every argument of every call, about 0.5 us each. Here the compiled
kernel is kept by what it was compiled for, and called directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

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


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[int | float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    """Launch on `device`'s current stream.

    Args:
        kernel: a jitted function that is told to specialise on no argument.
        grid: one to three numbers of programs.
        arguments: numbers only, tensors as their addresses: nothing of them may change what is compiled.
        constants: the compile-time arguments, in the kernel's order, where they come last.
        options: what Triton takes besides: num_warps, num_stages, launch_pdl ...
        device: where the tensors are; the interpreter's are on the CPU.
    """
    if compiling():
        compile_instead(kernel, grid, arguments, {**constants, **options})
    elif device.type != "cuda":
        kernel[grid](*arguments, **constants, **options)
    elif device.index == torch.cuda.current_device():
        _launch(kernel, grid, arguments, constants, options, device)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device
            _launch(kernel, grid, arguments, constants, options, device)


def _launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[int | float, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
    device: torch.device,
) -> None:
    key = (id(kernel), device.index, *constants.values(), *options.values())
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[grid](*arguments, **constants, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*arguments, *constants.values())
