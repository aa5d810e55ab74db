"""Compiled variants of the Gluon prefill, a budget too: each costs a user seconds at the first call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from headfold.backends.hopper import launch_arguments
from headfold.kernels.hopper.prefill import prefill_kernel
from headfold.planner import DEVICES, Plan
from headfold.planner.hopper import plan_hopper
from headfold.problem import Inputs, problem_of

LIMIT = 28
MASKS = (torch.bfloat16, torch.float16, torch.bool)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def index(*shape: int) -> torch.Tensor:
    return meta(*shape, dtype=torch.int32)


def layouts(d: int, dv: int, dtype: torch.dtype) -> Iterator[Inputs]:
    """Calls that differ in where keys and lengths are, and in how long they are."""

    def rows(*shape: int) -> list[torch.Tensor]:
        return [meta(*shape, 2, n, dtype=dtype) for n in (d, dv)]

    for length in (300, 8192):
        q = meta(4, length, 8, d, dtype=dtype)
        for used_q in (None, index(4)):
            yield Inputs(q, *rows(4, length), seqused_q=used_q)
            yield Inputs(q, *rows(4, length), seqused_q=used_q, seqused_k=index(4))
            yield Inputs(q, *rows(4 * length), seqused_q=used_q, cu_seqlens_k=index(5))
        ragged = Inputs(q.flatten(0, 1), *rows(4 * length), cu_seqlens_q=index(5), cu_seqlens_k=index(5))
        yield ragged
        for size in (1, 3, 8, 16, 20, 32, 48, 64, 128, 256):
            for pages in (64, 2**30 // size):  # the latter beyond the reach of 32 bits
                table = {"seqused_k": index(4), "page_table": index(4, 8192 // size)}
                yield Inputs(q, *rows(pages, size), **table)
                yield dataclasses.replace(
                    ragged, cu_seqlens_k=None, **table, k=rows(pages, size)[0], v=rows(pages, size)[1]
                )


def calls(d: int, dv: int, dtype: torch.dtype) -> Iterator[Inputs]:
    """Those with windows, features and masks, as far as this kernel takes them."""
    features: list[dict[str, Any]] = [
        {},
        *({"sink": meta(8, dtype=one)} for one in (torch.bfloat16, torch.float16, torch.float32)),
        {"softcap": 50.0},
        {"attention_chunk": 4096},
        {"softcap": 50.0, "attention_chunk": 4096, "sink": meta(8)},
    ]
    for x in layouts(d, dv, dtype):
        for left in (-1, 127):
            for feature in features:
                yield dataclasses.replace(x, window_left=left, window_right=0, **feature)
        if x.q.dim() == x.k.dim() == 4 and x.page_table is None:
            b, sq, sk = x.batch, x.q.shape[1], x.k.shape[1]
            for one in MASKS:
                width = -(-sk // 16) * 16
                yield dataclasses.replace(x, mask=meta(b, 8, sq, width, dtype=one)[..., :sk])


def programs(d: int, dv: int, dtype: torch.dtype) -> set[str]:
    """Triton's own keys of all compiled programs."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(prefill_kernel.signature, prefill_kernel.params, backend)
    found = set()
    for x in calls(d, dv, dtype):
        problem = dataclasses.replace(problem_of(x), device_type="cuda")
        plan = plan_hopper(problem, DEVICES["h200"], triton_rows=2**31)
        if not isinstance(plan, Plan):
            continue
        out, lse = meta(*x.out_shape, dtype=dtype), meta(*x.lse_shape, dtype=torch.float32)
        plain = all(t is None for t in (x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k))
        tiles = None if plain and not plan.softcap else index(2 * x.batch + 1)
        arguments, variant = launch_arguments(plan, x, out, lse, tiles)
        _, specialization, options = bind(*arguments, index(2), **variant, debug=False)
        found.add(f"{specialization} {sorted(options.items())}")
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("d", "dv", "count"),
    [(64, 64, 28), (128, 128, 24), (256, 256, 21), (96, 96, 26), (192, 128, 18), (192, 192, 18)],
)
def test_programs_of_a_dtype_and_head_dimension_are_few(
    d: int, dv: int, count: int, dtype: torch.dtype
) -> None:
    """Over layouts, lengths, pages, windows, masks and features. Sinks and chunks have no program of their own."""
    assert len(programs(d, dv, dtype)) == count <= LIMIT
