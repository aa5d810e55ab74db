"""Compile the Gluon kernels' variants without a GPU, with the launcher's own arguments.

    python -m tests.aot.compile_hopper > report.json

A process of its own, as compile_variants is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from multiprocessing import get_context
from typing import Any

import torch

from headfold.backends import hopper_pair
from headfold.backends.hopper import launch_arguments
from headfold.backends.launch import compile_only
from headfold.backends.triton import prepare
from headfold.kernels.hopper.prefill import prefill_kernel
from headfold.planner import DEVICES, Plan, make_plan
from headfold.planner.hopper import plan_hopper
from headfold.planner.pair import plan_pair
from headfold.problem import Inputs, problem_of
from tests.aot.compile_variants import (
    TargetOnly,
    assembler_log,
    code_of,
    dump_of,
    figures,
    innermost,
    local_accesses,
    loops_of,
)

MASKS = (torch.bfloat16, torch.float16, torch.bool)
DIMS = (
    *((64, 64), (128, 128), (256, 256), (192, 128), (64, 128)),
    *((96, 96), (80, 80), (160, 160), (192, 192), (96, 64), (192, 80)),
)
PAGED_DIMS = ((64, 64), (128, 128), (256, 256), (192, 128), (96, 96), (192, 192))


def variants() -> dict[str, Inputs]:
    """name -> a call that compiles to it. Lengths, windows, ratios and strides make no variants."""
    found = {}
    for d, dv in DIMS:
        # Longer than short tiles take, shorter than tall ones.
        found[f"d{d}/{dv} dense"] = call(d, dv, length=1536)
        found[f"d{d}/{dv} ragged"] = ragged = call(d, dv)
        ragged.seqused_k = torch.empty(2, dtype=torch.int32)
    found["d128/128 float16 dense"] = call(128, 128, torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        found[f"d64/64 {dtype} long".replace("torch.", "")] = call(64, 64, dtype, 12288)
    for d in (80, 96):
        found[f"d{d}/{d} long"] = call(d, d, length=12288)
    found["d96/96 float16 long"] = call(96, 96, torch.float16, 12288)
    found["d64/64 lengths of queries, long"] = long = call(64, 64, length=12288)
    long.seqused_q = torch.empty(2, dtype=torch.int32)
    for d in (64, 96):
        found[f"d{d}/{d} ragged, long"] = long = call(d, d, length=12288)
        long.seqused_k = torch.empty(2, dtype=torch.int32)
        for page_size in (16, 64):
            found[f"d{d}/{d} pages of {page_size}, long"] = paged(d, d, page_size, length=12288)
    for d, dv in PAGED_DIMS:
        for page_size in (1, 8, 16, 64) if d in (64, 128, 256) else (8, 64):
            found[f"d{d}/{dv} pages of {page_size}"] = paged(d, dv, page_size)
        found[f"d{d}/{dv} left window"] = left = call(d, dv, length=4096)
        left.window_left = 100
        found[f"d{d}/{dv} pages of 16, left window"] = left = paged(d, dv, 16)
        left.window_left = 100
    for d in (64, 96, 128):
        found[f"d{d}/{d} dense, short"] = few = narrow(call(d, d))
        found[f"d{d}/{d} ragged, short"] = dataclasses.replace(
            few, seqused_k=torch.empty(2, dtype=torch.int32)
        )
        found[f"d{d}/{d} pages of 16, short"] = narrow(paged(d, d, 16))
    found["d64/64 float16 dense, short"] = narrow(call(64, 64, torch.float16))
    found["d128/128 pages of 1, left window"] = left = paged(128, 128, 1)
    left.window_left = 100
    for d, dv in DIMS:
        found[f"d{d}/{dv} dense, softcap"] = capped(call(d, dv))
    for d, dv in PAGED_DIMS:
        for page_size in (1, 64) if d in (64, 128, 256) else (8,):
            found[f"d{d}/{dv} pages of {page_size}, softcap"] = capped(paged(d, dv, page_size))
    for d, mask in [(128, m) for m in MASKS] + [
        (64, torch.bfloat16),
        (256, torch.bfloat16),
        (256, torch.bool),
    ]:
        found[f"d{d}/{d} mask {mask}".replace("torch.", "")] = x = call(d, d)
        x.mask = torch.empty(2, 8, 512, 512, dtype=mask)
    return found


def call(d: int, dv: int, dtype: torch.dtype = torch.bfloat16, length: int = 512) -> Inputs:
    q, k = torch.empty(2, length, 8, d, dtype=dtype), torch.empty(2, length, 2, d, dtype=dtype)
    return Inputs(q, k, torch.empty(2, length, 2, dv, dtype=dtype))


def narrow(x: Inputs) -> Inputs:
    return dataclasses.replace(x, window_left=100, window_right=0)


def capped(x: Inputs) -> Inputs:
    return dataclasses.replace(x, softcap=50.0)


def paged(d: int, dv: int, page_size: int, length: int = 512) -> Inputs:
    x = call(d, dv, length=length)
    x.k, x.v = (torch.empty(64, page_size, 2, n, dtype=x.q.dtype) for n in (d, dv))
    x.page_table = torch.empty(2, -(-max(length, 4096) // page_size), dtype=torch.int32)
    x.seqused_k = torch.empty(2, dtype=torch.int32)
    return x


def compiled(x: Inputs) -> tuple[Plan, Any]:
    """The plan of a call and its compiled kernel."""
    problem = dataclasses.replace(problem_of(x), device_type="cuda")
    plan = plan_hopper(problem, DEVICES["h200"], triton_rows=2**31)
    assert isinstance(plan, Plan), plan
    out, lse = torch.empty(x.out_shape, dtype=x.q.dtype), torch.empty(x.lse_shape)
    lengths = (x.cu_seqlens_q, x.cu_seqlens_k, x.seqused_q, x.seqused_k)
    plain = all(t is None for t in lengths) and not plan.softcap
    tiles = None if plain else torch.empty(2 * x.batch + 1, dtype=torch.int32)
    arguments, variant = launch_arguments(plan, x, out, lse, tiles)
    counter = torch.empty(2, dtype=torch.int32)
    return plan, prefill_kernel.run(*arguments, counter, grid=(plan.workers,), warmup=True, **variant)


def decodes() -> dict[str, Inputs]:
    """name -> a call that compiles to a program of the decode kernel."""
    found = {}
    for d, dv in ((64, 64), (128, 128), (256, 256), (192, 128)):
        for sq, rows in ((8, 32), (16, 64), (64, 128)) if d < 192 else ((8, 32), (16, 64)):
            for page_size in (0, 8, 64) if d != 192 else (0, 16):
                x = paged(d, dv, page_size) if page_size else call(d, dv)
                # Long enough to be split rather than prefilled.
                batch, keys = (2, 4096) if sq <= 16 else (1, 65536)
                if page_size:
                    x.page_table = torch.empty(batch, keys // page_size, dtype=torch.int32)
                else:
                    x.k, x.v = (torch.empty(batch, keys, 2, n, dtype=x.q.dtype) for n in (d, dv))
                x.q, x.seqused_k = x.q[:batch, :sq], torch.empty(batch, dtype=torch.int32)
                pages = f"pages of {page_size}" if page_size else "rows"
                found[f"decode d{d}/{dv} tiles of {rows}, {pages}"] = x
    for d, sizes in ((64, (0, 16, 64)), (128, (0, 1, 64)), (256, (1, 16))):
        for page_size in sizes:
            pages = f"pages of {page_size}" if page_size else "rows"
            found[f"decode d{d}/{d} few rows, {pages}"] = few_rows(d, page_size, 2)
            if d < 256:  # two programs a multiprocessor
                found[f"decode d{d}/{d} few rows of many, {pages}"] = few_rows(d, page_size, 200)
    return found


def few_rows(d: int, page_size: int, batch: int) -> Inputs:
    x = paged(d, d, page_size) if page_size else call(d, d)
    x.q, x.seqused_k = torch.empty(batch, 1, 8, d, dtype=x.q.dtype), torch.empty(batch, dtype=torch.int32)
    if page_size:
        x.page_table = torch.empty(batch, 4096 // page_size, dtype=torch.int32)
    else:
        x.k = x.v = torch.empty(batch, 4096, 2, d, dtype=x.q.dtype)
    return x


def compiled_decode(x: Inputs) -> tuple[Plan, Any]:
    """The plan of a decode and its compiled kernel."""
    problem = dataclasses.replace(problem_of(x), device_type="cuda")
    plan = make_plan(problem, DEVICES["h200"])
    assert (plan.backend, plan.kernel) == ("hopper", "decode"), plan.reasons
    out, lse = torch.empty(x.out_shape, dtype=x.q.dtype), torch.empty(x.lse_shape)
    with compile_only() as done:
        prepare(plan, x, out, lse)(x, out, lse)
    return plan, dict(done)["hopper_decode_kernel"]


def pairs() -> dict[str, Inputs]:
    """name -> a call with a shared prefix that compiles to a program of the pair kernel."""
    found = {}
    for d, page_size in ((64, 16), (96, 16), (128, 8), (128, 64), (256, 16)):
        x = paged(d, d, page_size)
        x.q = x.q[:, :1]
        found[f"pair d{d}/{d} pages of {page_size}"] = x
    return found


def compiled_pair(x: Inputs) -> tuple[Plan, Any]:
    """The plan of a call whose sequences are one group, and its compiled kernel."""
    problem = dataclasses.replace(problem_of(x), device_type="cuda")
    plan = plan_pair(problem, DEVICES["h200"], (x.batch,))
    assert plan is not None
    assert x.page_table is not None
    table, numbers = x.page_table[:1], torch.empty(x.batch + 1, dtype=torch.int32)
    out, lse = torch.empty(x.out_shape, dtype=x.q.dtype), torch.empty(x.lse_shape)
    with compile_only() as done:
        prefixes, pads = numbers[:1], numbers[1:]
        run = hopper_pair.prepare(plan, x, out, lse, prefixes, pads, lambda x: (numbers[:2], table))
        run(x, out, lse)
    return plan.whole, dict(done)["hopper_pair_kernel"]


def block_loop_spills(dumped: str, boxed: bool) -> int:
    """Local loads and stores in the loops over blocks: the innermost ones that hold products, and of those that hold copies
    and no product the innermost too, or where a block's boxes are a loop (`boxed`) the one around that as well."""
    code = code_of(dumped)
    products = [address for address, text in code if "HGMMA" in text]
    copies = [address for address, text in code if re.search("UTMALDG|LDGSTS", text)]
    loops = set(loops_of(code, r"^@\S+ BRA\b.* (0x[0-9a-f]+)"))  # waits jump back too, without a condition
    holding = [(a, b) for a, b in loops if any(a <= p <= b for p in products)]
    copying = [(a, b) for a, b in loops - set(holding) if any(a <= c <= b for c in copies)]
    fetching = innermost(copying)
    if boxed:
        fetching += innermost([one for one in copying if one not in fetching])
    inner = innermost(holding)
    assert inner
    assert fetching
    return local_accesses(code, inner + fetching)


KINDS = {
    "prefill": (variants, compiled),
    "decode": (decodes, compiled_decode),
    "pair": (pairs, compiled_pair),
}


def figures_of(task: tuple[str, str]) -> tuple[str, dict[str, Any]]:
    """(name, figures) of a call that goes to the kernel of a kind."""
    from triton.runtime.driver import driver

    kind, name = task
    calls, compiled_call = KINDS[kind]
    driver.set_active(TargetOnly(90))
    with assembler_log() as log:
        plan, kernel = compiled_call(calls()[name])
    dumped = dump_of(kernel)
    planned = {"planned": plan.shared_memory, "rows": plan.block_m, "resident": plan.resident}
    return name, {
        **figures(kernel, 90, dumped, log.getvalue()),
        **planned,
        "block_loop_spills": block_loop_spills(dumped, plan.page_rows > 1),
    }


def main() -> None:
    """Print one JSON object, name -> figures. Compiles on all cores."""
    tasks = [(kind, name) for kind, (calls, _) in KINDS.items() for name in calls()]
    torch.set_num_threads(1)
    with get_context("fork").Pool(os.cpu_count()) as pool:
        print(json.dumps(dict(pool.imap_unordered(figures_of, tasks))))


if __name__ == "__main__":
    main()
