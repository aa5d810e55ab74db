"""Run a Gluon kernel on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from tests.gluon_emulator.engines import Sent
from tests.gluon_emulator.language import argument
from tests.gluon_emulator.rewrite import Function, emulated
from tests.gluon_emulator.scheduler import Scheduler, current


def launch(
    kernel: Any,
    programs: int,
    *args: Any,
    seed: int = 0,
    num_warps: int = 4,
    once: tuple[torch.Tensor, ...] = (),
    **constants: Any,
) -> None:
    """Run `programs` programs of a gluon.jit function side by side, in the order that `seed` draws.

    Args:
        kernel: the gluon.jit function.
        programs: size of the grid, which has one dimension.
        args: tensors, tensor descriptors, numbers and None, in the order of the kernel's parameters.
        seed: draws who goes on at every step, when copies are written and when products read their operands.
        num_warps: warps of the first partition.
        once: tensors of which no element may be stored twice: that would be work done twice.
        constants: constexpr arguments by name; compiler options among them are left out.

    Raises:
        DeadlockError: every thread waits; the message tells for what.
        RaceError: nothing orders two accesses to shared memory.
        Exception: whatever the kernel's own code raises, such as layouts that differ.
    """
    function: Function = emulated(kernel)
    parameters = function.parameters
    constants = {name: value for name, value in constants.items() if name in parameters}
    missing = [name for name in list(parameters)[len(args) :] if name not in constants]
    if missing:
        raise TypeError(f"{function.__name__}: no argument {', '.join(missing)}")
    scheduler = Scheduler(seed)
    stored = {
        t.untyped_storage().data_ptr(): torch.zeros(t.untyped_storage().nbytes(), dtype=torch.bool)
        for t in once
    }
    for i in range(programs):
        program = SimpleNamespace(
            name=f"program {i}", number=i, programs=programs, barriers={}, allocations=0, stored=stored
        )
        scheduler.spawn(
            f"{function.__name__} ({program.name}, partition 0)",
            program,
            num_warps,
            lambda: _run(function, args, parameters, constants),
        )
    scheduler.run()
    if any(thread.sent for thread in scheduler.threads):
        raise RuntimeError("a program ended before the copy engine had read what it sends")
    loads = [event for event in scheduler.events if not isinstance(event, Sent)]
    if loads:
        raise RuntimeError(f"{len(loads)} copies were under way when the last program ended")
    for event in scheduler.events:  # a grid is not over before its results are in memory
        event()


def _run(function: Function, args: Any, parameters: dict[str, Any], constants: dict[str, Any]) -> None:
    seen = [argument(value, annotation) for value, annotation in zip(args, parameters.values(), strict=False)]
    function(*seen, **constants)
    if current().products:
        raise RuntimeError(f"{current().name} ended with products in flight")
