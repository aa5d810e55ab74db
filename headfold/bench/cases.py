"""Case: one shape that the benchmark measures, and the work it holds. Choosing by name needs no torch."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    from headfold.problem import Problem

Kind = Literal["decode", "paged decode", "ragged decode", "speculative", "prefill"]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Case:
    """One shape. `sk` is the longest sequence; `lengths` gives every sequence's keys where they differ.

    `page_size` 0 means that K and V are not paged; pages are always in shuffled order. `causal` aligns
    bottom-right. `dtype` is "bf16", "fp16" or "fp32".
    """

    name: str
    kind: Kind
    heads: int
    kv_heads: int
    d: int
    dv: int
    batch: int
    sq: int
    sk: int
    lengths: tuple[int, ...] | None = None
    page_size: int = 0
    causal: bool = False
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise self._bad("kind", self.kind, f"it must be one of {', '.join(get_args(Kind))}")
        if self.dtype not in DTYPES:
            raise self._bad("dtype", self.dtype, f"it must be one of {', '.join(DTYPES)}")
        for name in ("heads", "kv_heads", "d", "dv", "batch", "sq", "sk"):
            if getattr(self, name) < 1:
                raise self._bad(name, getattr(self, name), "it must be at least 1")
        if self.heads % self.kv_heads:
            raise self._bad("heads", self.heads, f"it must be a multiple of the {self.kv_heads} KV heads")
        if self.lengths is not None and (len(self.lengths) != self.batch or max(self.lengths) != self.sk):
            raise self._bad("lengths", self.lengths, "it must hold a length a sequence, the longest sk")
        if self.causal and self.sq > min(self.all_lengths):
            raise self._bad("sq", self.sq, "a causal case needs at least as many keys as queries")

    def _bad(self, field: str, got: object, need: str) -> ValueError:
        return ValueError(f"case {self.name!r}: {field} is {got!r}; {need}")

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """Keys of every sequence."""
        return self.lengths or (self.sk,) * self.batch

    @property
    def is_paged(self) -> bool:
        """True when K and V lie in pages."""
        return self.page_size > 0

    @property
    def is_ragged(self) -> bool:
        """True when the sequences differ in length."""
        return self.lengths is not None

    @property
    def is_memory_bound(self) -> bool:
        """True when GB/s, and not TFLOP/s, is the figure to look at."""
        return self.kind != "prefill"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's own."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    def problem(self, device_type: str) -> Problem:
        """The Problem that the planner gets for this case."""
        return self._problem(device_type, self.batch, self.sk, sum(self.all_lengths))

    def _problem(self, device_type: str, batch: int, sk: int, total_k: int) -> Problem:
        from headfold.problem import Problem

        ragged = self.is_ragged and not self.is_paged
        return Problem(
            device_type=device_type,
            dtype=self.torch_dtype,
            batch=batch,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.d,
            head_dim_v=self.dv,
            max_seqlen_q=self.sq,
            max_seqlen_k=sk,
            total_q=batch * self.sq,
            total_k=total_k,
            q_layout="ragged" if ragged else "dense",
            kv_layout="paged" if self.is_paged else "ragged" if ragged else "dense",
            page_size=self.page_size,
            window_right=0 if self.causal else None,
            lengths_on_device=self.is_ragged or self.is_paged,
        )

    @property
    def kv_bytes(self) -> int:
        """Bytes of the visible keys and values, each read once."""
        from headfold.planner.work import visible_tokens

        per_token = self.kv_heads * (self.d + self.dv) * self.torch_dtype.itemsize
        return per_token * sum(visible_tokens(p) * n for p, n in self._by_length())

    @property
    def flops(self) -> int:
        """Floating-point operations of both matrix products, masked pairs left out."""
        from headfold.planner.work import visible_pairs

        pairs = sum(visible_pairs(p) * n for p, n in self._by_length())
        return 2 * (self.d + self.dv) * self.heads * pairs

    def _by_length(self) -> list[tuple[Problem, int]]:
        counts = Counter(self.all_lengths)
        return [(self._problem("cpu", 1, sk, sk), n) for sk, n in counts.items()]

    def record(self) -> dict[str, Any]:
        """The shape as plain data, for a result file."""
        fields = asdict(self)
        del fields["name"]
        fields["lengths"] = list(self.lengths) if self.lengths else None
        return fields


def select(cases: Sequence[Case], names: Iterable[str]) -> list[Case]:
    """The cases whose names match any of the globs, in catalogue order.

    Raises:
        ValueError: a glob that matches nothing.
    """
    chosen = set()
    for glob in names:
        found = fnmatch.filter([c.name for c in cases], glob)
        if not found:
            raise ValueError(f"--case is {glob!r}, which matches no case; `headfold bench --list` lists them")
        chosen.update(found)
    return [c for c in cases if c.name in chosen]
