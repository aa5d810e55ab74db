"""Compile what the drawn feature calls of a GPU need, each program once, on all cores: a run of thousands compiles nothing.

    python -m tests.aot.compile_drawn EXAMPLES SEED [SEED ...]

To be followed, on the same machine, by HEADFOLD_EXAMPLES=EXAMPLES HEADFOLD_SEED=SEED pytest tests/kernels/test_features.py
-k "together and gpu" for every seed, side by side, with OMP_NUM_THREADS=1: processes that each compile what they need first
compile most of it many times, and processes that each have a thread for every core wait for one another (370 calls take
15 s, or more than ten minutes). The calls are planned for an H200, on tensors without memory.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from headfold import backends
from headfold.backends import hopper, launch
from headfold.backends.without_gpu import target
from headfold.planner import DEVICES
from headfold.problem import Inputs
from tests.conftest import GPU
from tests.kernels import test_features

LARGEST = 200  # keys of a sequence, as test_features_together draws them
Key = tuple[Any, ...]


def without_memory(x: Inputs) -> Inputs:
    tensors = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(
        x,
        **{
            name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
            for name, t in tensors.items()
            if isinstance(t, torch.Tensor)
        },
    )


def run(x: Inputs) -> None:
    out = torch.empty(x.out_shape, dtype=x.q.dtype, device="meta")
    backends.run(x, out, torch.empty(x.lse_shape, device="meta"))


def programs_of(examples: int, number: int) -> dict[Key, Inputs]:
    """Program -> the first call of a seed that needs it."""
    found: dict[Key, Inputs] = {}
    call: list[Inputs] = []

    def record(
        kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        kinds = [str(getattr(a, "dtype", type(a).__name__)) for a in arguments]
        constants = sorted((name, str(value)) for name, value in keywords.items())
        found.setdefault((kernel.fn.__name__, *constants, *kinds), call[0])

    launch.compile_instead = hopper.compile_instead = record

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(test_features.calls(replace(GPU, device="cpu"), LARGEST))
    def walk(x: Inputs) -> None:
        call[:] = [without_memory(x)]
        run(call[0])

    with backends.force(DEVICES["h200"]), target(90), launch.compile_only():
        walk()
    return found


def compiled(x: Inputs) -> None:
    with backends.force(DEVICES["h200"]), target(90), launch.compile_only():
        run(x)


def main() -> None:
    examples, *seeds = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    programs: dict[Key, Inputs] = {}
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        for found in pool.map(partial(programs_of, examples), seeds):
            programs |= {key: x for key, x in found.items() if key not in programs}
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        list(pool.map(compiled, programs.values()))
    print(f"{len(programs)} programs compiled")


if __name__ == "__main__":
    main()
