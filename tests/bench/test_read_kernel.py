"""The kernel behind the GPU's read ceiling: it reads everything once, 16 bytes at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap

import pytest
import torch

pytest.importorskip("triton")

from headfold.bench.read_kernel import CONFIGS, ReadConfig, read
from headfold.planner.device import interpreter_requested

COMPILE = textwrap.dedent("""
    import json
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from headfold.bench.read_kernel import CONFIGS, read_kernel

    aligned = [["tt.divisibility", 16]]
    kinds = {"source": "*bf16", "sums": "*fp32", "blocks": "i32", "BLOCK": "constexpr", "STAGES": "constexpr"}
    found = []
    for c in CONFIGS:
        constants = {(3,): c.block, (4,): c.stages}
        source = ASTSource(read_kernel, signature=kinds, constexprs=constants, attrs={(0,): aligned, (1,): aligned})
        done = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": c.warps})
        found.append((done.asm["ptx"], done.metadata.shared))
    print(json.dumps(found))
""")


def test_compiles_for_hopper_to_wide_loads() -> None:
    """In a process of its own: where kernels are interpreted, they cannot be compiled."""
    env = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for config, (ptx, shared) in zip(CONFIGS, json.loads(done.stdout), strict=True):
        wide = len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.c\S+ .*, 0x10", ptx))
        narrow = len(re.findall(r"ld\.global", ptx)) - len(re.findall(r"ld\.global\S*\.v4\.b32", ptx))
        assert wide > 0, config
        assert narrow == 0, config
        assert shared * config.programs <= 227 * 1024, config


@pytest.mark.skipif(
    not torch.cuda.is_available() and not interpreter_requested(), reason="needs a GPU or the interpreter"
)
@pytest.mark.parametrize("blocks", [1, 7])
def test_reads_every_element_once(blocks: int) -> None:
    config = ReadConfig(block=256, warps=4, stages=2, programs=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randn(blocks * config.block, device=device).to(torch.bfloat16)
    sums = torch.full((3,), float("nan"), device=device)
    read(source, sums, config, programs=3)
    torch.testing.assert_close(sums.sum(), source.float().sum(), atol=1e-3, rtol=1e-5)
