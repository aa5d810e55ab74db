"""What Triton needs to compile for a GPU that is not there: a driver that knows its target, and host helpers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


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
def target(arch: int) -> Iterator[None]:
    """Compile for compute capability `arch` (90 for 9.0) within, whatever GPU is here."""
    from triton.runtime.driver import driver

    before = driver._active  # reset_active would look for a GPU, and raise where there is none
    driver.set_active(TargetOnly(arch))
    try:
        yield
    finally:
        driver.set_active(before)


def build_host_helpers(kernels: Iterable[Any]) -> None:
    """Put the C modules that launch `kernels` into Triton's cache; a first launch would compile them else.

    Triton 3.6 has one per signature of a kernel, later versions one in all. They are linked against the GPU
    driver's library, which a machine without a GPU does not have: an empty library of its name stands in, for
    nothing is called.

    Raises:
        RuntimeError: no C compiler.
    """
    from triton.backends.nvidia import driver as nvidia

    if shutil.which(os.environ.get("CC", "gcc")) is None and shutil.which("clang") is None:
        raise RuntimeError(
            "no C compiler found; Triton's launchers need one (gcc, clang, or the variable CC)"
        )
    with _driver_library():
        _load(nvidia.CudaUtils)
        if hasattr(nvidia, "make_launcher"):
            for kernel in kernels:
                _load(nvidia.CudaLauncher, kernel.src, kernel.metadata)


def _load(build: Any, *args: Any) -> None:
    """Build a C module; that it cannot be loaded here does not matter, it is in the cache by then."""
    with suppress(ImportError, AttributeError):
        build(*args)


@contextmanager
def _driver_library() -> Iterator[None]:
    from triton import knobs

    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "libcuda.so.1"
            compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
            subprocess.run(
                [compiler, "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull, "-o", str(library)],
                check=True,
            )
            with knobs.nvidia.scope():
                knobs.nvidia.libcuda_path = folder
                yield
    else:
        yield
