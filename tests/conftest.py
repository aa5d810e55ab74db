"""Where the tests run: on the CPU backend, and through the GPU's kernels, for real or interpreted.

Without a GPU the very kernels run through Triton's interpreter, which must be asked for before triton is
imported. `target` is one of both ways; a test that takes it runs once for each.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
# What is tested are the built-in tiles, not a table that this machine happens to have; HEADFOLD_TUNED=1 asks for it.
os.environ.setdefault("HEADFOLD_TUNED", "0")
# Inductor's cache of compiled graphs does not know an operator's schema: one left by another version of headfold would call
# its operators with the arguments of then.
_compiled = TemporaryDirectory(prefix="headfold-inductor-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

from headfold import backends, prepared  # noqa: E402
from headfold.planner import DEVICES, Device, make_plan, mixed  # noqa: E402
from tests import interpreter  # noqa: E402

if not HAS_GPU and find_spec("triton"):
    interpreter.quicken()
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

settings.register_profile(
    "headfold",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("headfold")


@dataclass(frozen=True)
class Target:
    """A way to run attention: a backend, the device its tensors live on, and the dtypes it computes right."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    plan_for: Device | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls of headfold inside go this way."""
        with ExitStack() as stack:
            if self.plan_for:
                stack.enter_context(backends.force(self.plan_for))
                stack.enter_context(interpreter.few_merging_programs())
            yield


CPU = Target("cpu", "cpu", (torch.float32, torch.bfloat16, torch.float16))
# The interpreter's bf16 tl.dot is wrong (numpy has no bf16), so bf16 kernels run on GPUs alone.
# An interpreted program takes milliseconds: a device of few multiprocessors asks for fewer.
INTERPRETED = Target("interpreted", "cpu", (torch.float32, torch.float16), replace(DEVICES["h200"], sms=12))
GPU = Target("gpu", "cuda", (torch.bfloat16, torch.float16, torch.float32))
TARGETS = (CPU, GPU) if HAS_GPU else (CPU, INTERPRETED)
KERNELS = GPU if HAS_GPU else INTERPRETED


@pytest.fixture(params=TARGETS, ids=lambda t: t.name)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each way in turn, in force for the test."""
    with request.param.running():
        yield request.param


@pytest.fixture
def kernels() -> Iterator[Target]:
    """The GPU's kernels, for real where there is a GPU, else interpreted; in force for the test."""
    with KERNELS.running():
        yield KERNELS


def pytest_collection_finish() -> None:
    """What has been imported and collected, half a million objects, stays to the end: a search for garbage need not go
    through all of it, which takes 0.2 s each time, and the tuner's tests ask for hundreds."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is none."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """A test that starts with no call kept, and leaves none."""
    prepared._kept.clear()
    yield
    prepared._kept.clear()


@pytest.fixture
def small_mixed_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Batches of any size are worth the launches that part them."""
    monkeypatch.setattr(mixed, "WORTH_BYTES", 0)
    make_plan.cache_clear()
    yield
    make_plan.cache_clear()
