"""Boxes that the copy engine stores: what comes out, and what goes unnoticed on a GPU until it bites."""

# No `from __future__ import annotations`: gluon.jit tells constants by what an annotation is.

import pytest
import torch

pytest.importorskip("triton")

from headfold.kernels.hopper.compat import (
    TensorDescriptor,
    barrier,
    fence_async_shared,
    gl,
    gluon,
    tma_store,
    tma_store_wait,
)
from headfold.kernels.hopper.layouts import shared_layout, store_layout
from tests.gluon_emulator import RaceError, launch

SEEDS = range(10)


@gluon.jit
def numbered(target, first, step, blocks, FAULT: gl.constexpr):
    """Send boxes first, first + step and so on, box i holding i, through one buffer."""
    buffer = gl.allocate_shared_memory(target.dtype, [64, 64], target.layout)
    for i in range(blocks):
        if FAULT != "no wait for the buffer":
            tma_store_wait(0)
        buffer.store(gl.full([64, 64], i, gl.float32, store_layout(64)).to(target.dtype))
        if FAULT != "no fence":
            fence_async_shared()
        if FAULT != "no barrier":
            barrier()
        tma_store(target, [(first + i * step) * 64, 0], buffer)
    if FAULT != "no wait at the end":
        tma_store_wait(0)


def run(fault: str, seed: int, step: int = 1) -> torch.Tensor:
    """200 rows, of which the last box has 8."""
    out = torch.full((200, 64), torch.nan, dtype=torch.float16)
    target = TensorDescriptor(out, [200, 64], [64, 1], [64, 64], shared_layout(64, 64, 16, 2))
    launch(numbered, 1, target, 0, step, 4, seed=seed, once=(out,), FAULT=fault)
    return out


def test_boxes_are_in_memory_when_the_grid_is_over() -> None:
    want = (torch.arange(200) // 64).half()[:, None].expand(200, 64)
    for seed in SEEDS:
        assert torch.equal(run("", seed), want)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no fence", "send by .* follows the store .* without a fence_async_shared"),
        ("no barrier", "send by .* follows the store .* without a barrier after the fence"),
        ("no wait for the buffer", "store by .* is not ordered after the send"),
    ],
)
def test_races_are_found_in_every_schedule(fault: str, words: str) -> None:
    for seed in SEEDS:
        with pytest.raises(RaceError, match=words):
            run(fault, seed)


def test_a_program_that_does_not_wait_at_its_end_is_found() -> None:
    """Its shared memory is another program's then."""
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match="ended before the copy engine had read"):
            run("no wait at the end", seed)


def test_work_done_twice_is_found() -> None:
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match="an element is stored twice"):
            run("", seed, step=0)
