"""Compile each architecture's variants once a session, in a process without the interpreter."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Report = list[dict[str, Any]]


@pytest.fixture(scope="session")
def report_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Report]:
    """arch -> the records of `compile_variants` for it.

    Reports lie in a folder that pytest-xdist's workers share, a lock each: whoever asks first compiles, on all
    cores, so it does not matter how the tests are spread over workers (no --dist loadgroup is needed).
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def report(arch: int) -> Report:
        path = shared / f"sm_{arch}.json"
        with open(shared / f"sm_{arch}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                path.write_text(_compile(arch))
        return json.loads(path.read_text())

    return report


def _compile(arch: int) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "tests.aot.compile_variants", str(arch)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
