"""`headfold check`: what this machine has, what is missing, how to get it, and a small run per backend."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal

import torch

from headfold.bench.calls import HEADFOLD
from headfold.bench.cases import Case
from headfold.bench.errors import max_error
from headfold.bench.inputs import make_inputs
from headfold.bench.measure import first_line
from headfold.bench.peers import Unsupported
from headfold.planner import tuned_file

State = Literal["ok", "missing", "failed", "note"]
TRITON_RANGE = ((3, 6), (3, 9))
OLDEST_ARCH = (8, 0)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `mend` says how to get what is missing, and what it is for."""

    what: str
    state: State
    found: str
    mend: str = ""

    @property
    def is_bad(self) -> bool:
        """True when something that is needed here does not work."""
        return self.state == "failed"


def findings() -> Iterator[Finding]:
    """Look at everything in turn; the runs come last."""
    yield _python()
    yield _torch()
    has_gpu = torch.cuda.is_available()
    yield from _gpu() if has_gpu else _no_gpu()
    yield _triton(needed=has_gpu)
    yield from _extras()
    yield from _runs("cpu")
    if has_gpu:
        yield from _runs("cuda")


def _python() -> Finding:
    ok = sys.version_info >= (3, 11)
    return Finding(
        "Python", "ok" if ok else "failed", platform.python_version(), "" if ok else "needs 3.11 or newer"
    )


def _torch() -> Finding:
    ok = _numbers(torch.__version__) >= (2, 11)
    mend = "" if ok else "needs 2.11 or newer: pip install 'torch>=2.11'"
    return Finding("PyTorch", "ok" if ok else "failed", torch.__version__, mend)


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def _no_gpu() -> Iterator[Finding]:
    if torch.version.cuda is None:
        yield Finding(
            "CUDA", "note", "this PyTorch is built without it", "only for GPUs: install a CUDA build of torch"
        )
    else:
        yield Finding(
            "CUDA", "note", f"{torch.version.cuda}, but no GPU was found", "only for GPUs: see nvidia-smi"
        )
    yield Finding(
        "GPU kernels",
        "note",
        "cannot run here",
        "their tests still can, through Triton's interpreter: make test runs them so",
    )


def _gpu() -> Iterator[Finding]:
    from headfold.bench.machine import device_facts

    yield Finding("CUDA", "ok", str(torch.version.cuda))
    for i in range(torch.cuda.device_count()):
        facts = device_facts(torch.device("cuda", i))
        arch = torch.cuda.get_device_capability(i)
        ok = arch >= OLDEST_ARCH
        driver = facts.get("driver_version")
        found = f"{facts['name']}, {facts['arch']}" + (f", driver {driver}" if driver else "")
        yield Finding(
            f"GPU {i}", "ok" if ok else "failed", found, "" if ok else "the kernels need sm_80 or newer"
        )
        yield decode_tiles(f"GPU {i} decode tiles", facts["name"], arch)


def decode_tiles(what: str, device: str, arch: tuple[int, int]) -> Finding:
    """Whether a table of a GPU's own tiles is in force, and how many entries it has."""
    if tuned_file.tables_are_off():
        return Finding(what, "note", "built in, as HEADFOLD_TUNED=0 asks")
    machine = tuned_file.machine_of(device, arch)
    try:
        table = tuned_file.table_in_force(machine)
    except (OSError, ValueError) as e:
        return Finding(what, "missing", f"built in: {e}", "measure them anew: headfold tune --again")
    if table is None:
        return Finding(what, "note", "built in", "headfold tune measures this machine's own")
    n = len(table.entries)
    found = f"{n} of this machine's own, of {len(table.rows)} measured, from {tuned_file.path_of(machine)}"
    return Finding(what, "ok", found)


def _triton(needed: bool) -> Finding:
    (low, high) = TRITON_RANGE
    span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
    install = f"pip install 'triton>={low[0]}.{low[1]},<{high[0]}.{high[1] + 1}'"
    found = _installed("triton")
    if found is None:
        return Finding(
            "Triton", "failed" if needed else "missing", "not installed", f"for the GPU kernels: {install}"
        )
    if not low <= _numbers(found) <= high:
        return Finding("Triton", "failed" if needed else "missing", found, f"needs {span}: {install}")
    return Finding("Triton", "ok", found)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extras() -> Iterator[Finding]:
    yield _numpy()
    extras = (
        ("rich", "rich", "for the command line: pip install 'headfold[cli]'"),
        ("matplotlib", "matplotlib", "for `headfold bench --picture`: pip install 'headfold[cli]'"),
        ("pytest", "pytest", "for the tests: pip install 'headfold[test]'"),
        ("hypothesis", "hypothesis", "for the tests: pip install 'headfold[test]'"),
    )
    for package, module, mend in extras:
        if find_spec(module) is None:
            yield Finding(package, "missing", "not installed", mend)
        else:
            yield Finding(package, "ok", _installed(package) or "installed")


def _numpy() -> Finding:
    found, triton = _installed("numpy"), _installed("triton")
    if found is None:
        return Finding(
            "numpy", "missing", "not installed", "for Triton's interpreter: pip install 'numpy>=1.26'"
        )
    if triton is not None and _numbers(triton) == (3, 6) and _numbers(found) >= (2, 4):
        mend = "Triton 3.6's interpreter needs an older one: pip install 'numpy<2.4'"
        return Finding("numpy", "missing", found, mend)
    return Finding("numpy", "ok", found)


_TINY = (
    Case("decode", "decode", 12, 4, 64, 64, 2, 1, 300),
    Case("paged decode", "paged decode", 12, 4, 64, 64, 2, 1, 300, page_size=16),
    Case("ragged decode", "ragged decode", 12, 4, 64, 64, 2, 1, 300, (17, 300)),
    Case("prefill", "prefill", 12, 4, 64, 64, 1, 160, 160, causal=True),
)


def _runs(device_type: str) -> Iterator[Finding]:
    for case in _TINY:
        yield _run(case, torch.device(device_type))


def _run(case: Case, device: torch.device) -> Finding:
    what = f"{case.name} on {'CPU' if device.type == 'cpu' else 'GPU'}"
    try:
        inputs = make_inputs(case, device, copies=1)
        call = HEADFOLD.prepare(case, inputs)
        assert not isinstance(call, Unsupported), "headfold supports every case of this file"
        with torch.no_grad():
            error = max_error(inputs, call(0))
    except Exception as e:
        return Finding(
            what, "failed", first_line(e), "a fault of headfold or of this installation: please report it"
        )
    return Finding(what, "ok", f"max error {error:.1e} against float64")
