"""Implementations that the benchmark can run, by name: what each is, where it applies, how it is prepared.

An implementation is prepared once per case, outside the timing, into a function that computes on one copy of
the inputs. Libraries other than PyTorch are imported only when they were asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headfold.bench.cases import Case
from headfold.bench.inputs import CaseInputs
from headfold.bench.machine import free_memory
from headfold.bench.measure import Call
from headfold.bench.names import OWN, TORCH_PREFIX


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why an implementation cannot run a case."""

    reason: str


Prepare = Callable[[Case, CaseInputs], "Call | Unsupported"]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute a case.

    `applies` tells whether it says anything about a case on a device type; where not, it has no row at all.
    `by_default` implementations run without being asked for. Names that begin with "torch-" are PyTorch's own
    ways. `features` names those that it can compute: a case with any other has no row of it. One that does not append
    is given caches that hold the new tokens already.
    """

    name: str
    about: str
    prepare: Prepare
    applies: Callable[[Case, str], bool] = lambda case, device_type: True
    available: Callable[[], str | None] = lambda: None
    by_default: Callable[[str], bool] = lambda device_type: False
    features: frozenset[str] = frozenset()
    appends: bool = True

    def runs(self, case: Case, device_type: str) -> bool:
        """True when it has something to say about a case on a device type."""
        return case.features.names <= self.features and self.applies(case, device_type)

    @property
    def is_torch(self) -> bool:
        """True for PyTorch's own ways, whose fastest is PyTorch's best."""
        return self.name.startswith(TORCH_PREFIX)


FA3_LIBRARY = "HEADFOLD_FA3_LIBRARY"
"""The environment variable that names a library with FlashAttention-3's operators."""
REGISTRY: dict[str, Implementation] = {}


def register(implementation: Implementation) -> Implementation:
    """Add an implementation under its name, which must be new."""
    if implementation.name in REGISTRY:
        raise ValueError(
            f"implementation {implementation.name!r} is registered already; names must be unique"
        )
    REGISTRY[implementation.name] = implementation
    return implementation


def chosen(
    against: Iterable[str], device_type: str, with_torch: bool = True, fa3_library: str | None = None
) -> list[Implementation]:
    """headfold, PyTorch's own ways and the named peers, in the order in which they are shown.

    A name may leave out its "torch-". One that ends in ".so" is a library with FlashAttention-3's operators; "fa3"
    means `fa3_library` where that is given, else the library that HEADFOLD_FA3_LIBRARY names, else the package.

    Raises:
        ValueError: an unknown name, or a library that is not there.
    """
    from headfold.bench import calls, libraries, torch_ways  # noqa: F401 - importing them registers them

    known = sorted(REGISTRY.values(), key=lambda i: not i.name.startswith(OWN))
    found = [i for i in known if i.by_default(device_type) and (with_torch or not i.is_torch)]
    library = fa3_library or os.environ.get(FA3_LIBRARY)
    for name in against:
        if name == "fa3" and library:
            option = "--fa3-library" if fa3_library else FA3_LIBRARY
            peer = libraries.fa3_operators(library, option, name)
        elif name.endswith(".so"):
            peer = libraries.fa3_operators(name, "--against")
        elif name in REGISTRY:
            peer = REGISTRY[name]
        elif TORCH_PREFIX + name in REGISTRY:
            peer = REGISTRY[TORCH_PREFIX + name]
        else:
            raise ValueError(
                f"--against is {name!r}; it must be one of {', '.join(i.name for i in known)} "
                "or a path to a .so file"
            )
        if all(peer.name != i.name for i in found):
            found.append(peer)
    return found


def no_room(nbytes: int, inputs: CaseInputs) -> Unsupported | None:
    """Unsupported if that many bytes more do not fit into memory."""
    free = free_memory(inputs.device)
    if nbytes <= 0.8 * free:
        return None
    return Unsupported(f"it needs {nbytes / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free")
