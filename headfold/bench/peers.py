"""Implementations that the benchmark can run, by name: what each is, where it applies, how it is prepared.

An implementation is prepared once per case, outside the timing, into a function that computes on one copy of
the inputs. Libraries other than PyTorch are imported only when they were asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
    ways.
    """

    name: str
    about: str
    prepare: Prepare
    applies: Callable[[Case, str], bool] = lambda case, device_type: True
    available: Callable[[], str | None] = lambda: None
    by_default: Callable[[str], bool] = lambda device_type: False

    @property
    def is_torch(self) -> bool:
        """True for PyTorch's own ways, whose fastest is PyTorch's best."""
        return self.name.startswith(TORCH_PREFIX)


REGISTRY: dict[str, Implementation] = {}


def register(implementation: Implementation) -> Implementation:
    """Add an implementation under its name, which must be new."""
    if implementation.name in REGISTRY:
        raise ValueError(
            f"implementation {implementation.name!r} is registered already; names must be unique"
        )
    REGISTRY[implementation.name] = implementation
    return implementation


def chosen(against: Iterable[str], device_type: str, with_torch: bool = True) -> list[Implementation]:
    """headfold, PyTorch's own ways and the named peers, in the order in which they are shown.

    A name that ends in ".so" is a library with FlashAttention-3's operators.

    Raises:
        ValueError: an unknown name.
    """
    from headfold.bench import libraries, torch_ways  # noqa: F401 - importing them registers what they hold

    found = [i for i in REGISTRY.values() if i.by_default(device_type) and (with_torch or not i.is_torch)]
    for name in against:
        if name.endswith(".so"):
            peer = libraries.fa3_operators(name)
        elif name in REGISTRY:
            peer = REGISTRY[name]
        else:
            raise ValueError(
                f"--against is {name!r}; it must be one of {', '.join(REGISTRY)} or a path to a .so file"
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


def _headfold(pack_gqa: bool | None) -> Prepare:
    def prepare(case: Case, x: CaseInputs) -> Call:
        import headfold

        def paged(i: int) -> Any:
            return headfold.flash_attn_with_kvcache(
                x.q,
                x.k[i],
                x.v[i],
                cache_seqlens=x.lengths,
                page_table=x.page_table,
                causal=case.causal,
                pack_gqa=pack_gqa,
            )

        def ragged(i: int) -> Any:
            out: Any = headfold.flash_attn_varlen_func(
                x.q_rows,
                x.k[i],
                x.v[i],
                x.cu_seqlens_q,
                x.cu_seqlens_k,
                case.sq,
                case.sk,
                causal=case.causal,
                pack_gqa=pack_gqa,
            )
            return out.view(case.batch, case.sq, case.heads, case.dv)

        def dense(i: int) -> Any:
            return headfold.flash_attn_func(x.q, x.k[i], x.v[i], causal=case.causal, pack_gqa=pack_gqa)

        return paged if case.is_paged else ragged if case.is_ragged else dense

    return prepare


register(
    Implementation(
        OWN,
        "this library",
        _headfold(None),
        by_default=lambda device_type: True,
    )
)
register(
    Implementation(
        "headfold-unpacked",
        "this library with pack_gqa=False: every query head reads K and V for itself",
        _headfold(False),
        applies=lambda case, device_type: device_type == "cuda" and case.is_memory_bound and case.group > 1,
        by_default=lambda device_type: device_type == "cuda",
    )
)
