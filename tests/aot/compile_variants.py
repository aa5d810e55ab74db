"""Compile the kernels of an architecture without a GPU, exactly as the library would launch them.

    python -m tests.aot.compile_variants 90 [name ...] > report.json

Every variant calls `headfold.backends.run`, or the launcher of the append. Triton's JIT sees a driver that knows its
target and nothing else, and a launch becomes a compilation: arguments, constants, what the JIT specialises on, warps
and stages are the launcher's own. A process of its own, because TRITON_INTERPRET=1, which the test session sets,
compiles nothing.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from multiprocessing import get_context
from typing import Any

import torch

from headfold import appending, backends, ops
from headfold.planner import DEVICES
from tests.aot.variants import BATCH, DEVICE_OF, DTYPES, Variant, variants

# Kernels that are launched beside another, and the form of the variants that show them.
BESIDE = {"merge_kernel": "fixup", "mask_blocks_kernel": "blocks"}
PRODUCTS = ("HGMMA", "HMMA", "UTCHMMA")
INSTRUCTIONS = (*PRODUCTS, "LDGSTS", "UTMALDG", "UTMASTG", "MUFU", "FFMA", "FMUL", "LDG", "STG", "STL", "LDL")


class TargetOnly:
    """As much of a Triton driver as a compilation asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def assembler_log() -> Iterator[io.StringIO]:
    """What the assembler says while kernels are compiled within: nothing of one that was compiled before."""
    from triton import knobs

    knobs.nvidia.dump_ptxas_log = True
    with redirect_stdout(io.StringIO()) as log:
        yield log


def compile_launches(variant: Variant, arch: int) -> list[tuple[str, Any, Any, str]]:
    """(kernel name, compiled kernel, plan, assembler's log) of what one call launches; an append has no plan."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from headfold.backends.append import prepare as prepare_append

    driver.set_active(TargetOnly(arch))
    launches: list[tuple[str, Any, str]] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            name = kernel.fn.__name__
            if BESIDE.get(name, "") == (variant.form if variant.form in BESIDE.values() else ""):
                with assembler_log() as log:
                    compiled = kernel.run(*args, grid=grid, warmup=True, **kwargs)
                launches.append((name, compiled, log.getvalue()))

        return launch

    before = JITFunction.__getitem__
    JITFunction.__getitem__ = compile_only
    try:
        with backends.force(DEVICES[DEVICE_OF[arch]]):
            if variant.form == "append":
                append = variant.append_inputs()
                results = (
                    torch.empty(BATCH, dtype=torch.int32),
                    torch.empty_like(append.k if append.q is None else append.q),
                )
                prepare_append(append, *results)(append, *results)
                return [(name, kernel, None, log) for name, kernel, log in launches]
            if variant.form == "step":
                step = variant.step_inputs()
                plan = appending.plan_of(step)
                assert plan is not None, variant.name
                ops.attend(step, torch.empty_like(step.q), torch.empty(step.lse_shape), appending.WAY)
                return [(name, kernel, plan, log) for name, kernel, log in launches]
            x = variant.inputs()
            _, plan = backends.plan_of(x)
            out = variant._tensor(x.out_shape[:-2], x.out_shape[-2], x.out_shape[-1], x.q.dtype)
            backends.run(x, out, torch.empty(x.lse_shape))
    finally:
        JITFunction.__getitem__ = before
    return [(name, kernel, plan, log) for name, kernel, log in launches]


def dump_of(kernel: Any) -> str:
    """Resources and instructions of a compiled kernel.

    Instructions as `cuobjdump -sass` has nvdisasm print them (-pb: branches name addresses), but without their encoding and
    without the analysis of data flow, which none of it shows: three quarters of the time, a quarter of the text.
    """
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        resources = _output(knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name)
        return resources + _output(knobs.nvidia.nvdisasm.path, "-pb", "-ndf", cubin.name)


def figures(kernel: Any, arch: int, dumped: str, log: str) -> dict[str, Any]:
    """Registers, stack, shared memory, instruction counts and the assembler's warnings of a compiled kernel."""
    words = Counter(re.findall(r"\w+", dumped))  # once: 13 searches take as long as all the rest here
    counts = {name.lower(): words[name] for name in INSTRUCTIONS}
    warnings: list[str] = []
    if counts["hgmma"]:  # the warnings are about products left in flight
        said = log if kernel.metadata.name in log else _assembled_again(kernel, arch)
        warnings = sorted(set(re.findall(r"C75\d\d", said)))
    return {
        "registers": int(re.search(r"\bREG:(\d+)", dumped)[1]),  # type: ignore[index]
        "stack": int(re.search(r"\bSTACK:(\d+)", dumped)[1]),  # type: ignore[index]
        "sass": len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", dumped, re.M)),
        "loop_spills": spills_in_loops(dumped),
        "smem": kernel.metadata.shared,
        **counts,
        "ldg128": len(re.findall(r"\bLDG\.[.A-Z0-9]*128\b", dumped)),
        "prefetches": len(re.findall(r"\bCCTL\.E\.PF2\b", dumped)),
        "ldgsts128": len(re.findall(r"\bLDGSTS[.A-Z0-9]*\.128\b", dumped)),
        "warnings": warnings,
    }


def _assembled_again(kernel: Any, arch: int) -> str:
    """The assembler's log of a kernel that was found compiled."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as ptx:
        ptx.write(kernel.asm["ptx"])
        ptx.flush()
        return _output(_ptxas(arch), "-v", f"--gpu-name=sm_{arch}a", ptx.name, "-o", os.devnull)


def spills_in_loops(dumped: str) -> int:
    """Local loads and stores in innermost loops, those over blocks: between the target of a backward branch and the branch.

    A loop over the sequences of a program may take a number aside, once for all blocks of one.
    """
    code = code_of(dumped)
    return local_accesses(code, innermost(loops_of(code, r"\bBRA\b.* (0x[0-9a-f]+)")))


def code_of(dumped: str) -> list[tuple[int, str]]:
    """(address, text) of every instruction that cuobjdump shows."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", dumped, re.M)
    assert lines
    return [(int(address, 16), text) for address, text in lines]


def loops_of(code: list[tuple[int, str]], branch: str) -> list[tuple[int, int]]:
    """(first address, last) of every loop; `branch` matches a branch and its target."""
    found = ((re.search(branch, text), address) for address, text in code)
    return [
        (int(target[1], 16), address) for target, address in found if target and int(target[1], 16) < address
    ]


def innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those that hold no other."""
    return [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def local_accesses(code: list[tuple[int, str]], loops: list[tuple[int, int]]) -> int:
    """Local loads and stores that lie in any of the loops."""
    spills = [address for address, text in code if re.search(r"\b(STL|LDL)\b", text)]
    return sum(any(first <= address <= last for first, last in loops) for address in spills)


def _ptxas(arch: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    return get_ptxas(arch).path


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")
    return done.stdout + done.stderr


def report(task: tuple[Variant, int]) -> list[dict[str, Any]]:
    """One record a launch of a variant; a record with "error" where the compiler gave up."""
    variant, arch = task
    base = {"name": variant.name, **dataclasses.asdict(variant), "itemsize": DTYPES[variant.dtype].itemsize}
    start = time.perf_counter()
    try:
        launches = compile_launches(variant, arch)
        return [
            {
                **base,
                "kernel": name,
                "plan": dataclasses.asdict(plan) if plan else None,
                **figures(kernel, arch, dump_of(kernel), log),
                "seconds": round(time.perf_counter() - start, 2),
            }
            for name, kernel, plan, log in launches
        ]
    except Exception as e:
        return [{**base, "error": f"{type(e).__name__}: {e}"[-2000:]}]


def main() -> None:
    """Compile on all cores and print one JSON list."""
    arch, names = int(sys.argv[1]), sys.argv[2:]
    tasks = [(v, arch) for v in variants(arch) if not names or v.name in names]
    # Calls that share a program, 16 of Hopper's 158, differ in their layout or feature. Apart from each other they find it
    # in Triton's cache; side by side, each of two processes would compile it.
    tasks.sort(key=lambda task: (task[0].layout, task[0].feature))
    torch.set_num_threads(1)
    with get_context("fork").Pool(os.cpu_count()) as pool:
        records = [record for one in pool.imap_unordered(report, tasks) for record in one]
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
