"""Case: one shape that the benchmark measures, and the work it holds. Choosing by name needs no torch."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from headfold.bench.features import DOCUMENTS, PLAIN, Features
from headfold.bench.names import PREFILLS

if TYPE_CHECKING:
    import torch

    from headfold.problem import Problem

Kind = Literal["decode", "paged decode", "ragged decode", "speculative", "prefill", "ragged prefill"]
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True)
class Case:
    """One shape. `sk` is the longest sequence; `lengths` gives every sequence's keys where they differ, and `queries` its
    queries, of which `sq` is the most.

    `page_size` 0 means that K and V are not paged; pages are always in shuffled order. The first `shared` keys of all
    sequences lie in the same pages. `causal` aligns bottom-right. `dtype` is "bf16", "fp16" or "fp32". `base` names the
    case that a case with `features` is compared with: the same work without them.
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
    features: Features = PLAIN
    base: str | None = None
    shared: int = 0
    queries: tuple[int, ...] | None = None

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
        if self.queries is not None and (len(self.queries) != self.batch or max(self.queries) != self.sq):
            raise self._bad("queries", self.queries, "it must hold a number a sequence, the largest sq")
        if self.queries is not None and (self.is_paged or not self.is_ragged):
            raise self._bad(
                "queries", self.queries, "they differ in ragged cases alone, which give lengths too"
            )
        if self.causal and any(n > m for n, m in zip(self.all_queries, self.all_lengths, strict=True)):
            raise self._bad("sq", self.sq, "a causal case needs at least as many keys as queries")
        if self.features.names and (self.is_paged or self.is_ragged):
            raise self._bad("features", self.features, "only dense cases of equal lengths have them")
        if self.features.mask == "documents" and (self.sq != self.sk or self.sk % DOCUMENTS):
            raise self._bad("sk", self.sk, f"documents need as many queries, and a multiple of {DOCUMENTS}")
        if self.shared and (not self.is_paged or self.shared % self.page_size):
            raise self._bad("shared", self.shared, "it must be a number of keys in whole pages")
        if not 0 <= self.shared <= min(self.all_lengths):
            raise self._bad("shared", self.shared, "every sequence must have so many keys")
        if self.features.append and self.sq > self.sk:
            raise self._bad("sq", self.sq, "a case that appends needs room for its new tokens")

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
    def all_queries(self) -> tuple[int, ...]:
        """Queries of every sequence."""
        return self.queries or (self.sq,) * self.batch

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Shape of an output: (b, sq, h, dv), or (total_q, h, dv) where sequences differ in queries."""
        rows = (self.batch, self.sq) if self.queries is None else (sum(self.queries),)
        return (*rows, self.heads, self.dv)

    @property
    def is_paged(self) -> bool:
        """True when K and V lie in pages."""
        return self.page_size > 0

    @property
    def reads_a_cache(self) -> bool:
        """True when headfold is called as flash_attn_with_kvcache."""
        f = self.features
        return self.is_paged or f.cache or f.append or f.tree

    @property
    def is_ragged(self) -> bool:
        """True when the sequences differ in length."""
        return self.lengths is not None

    @property
    def is_memory_bound(self) -> bool:
        """True when GB/s, and not TFLOP/s, is the figure to look at."""
        return self.kind not in PREFILLS

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as PyTorch's own."""
        import torch

        dtype: torch.dtype = getattr(torch, DTYPES[self.dtype])
        return dtype

    def problem(self, device_type: str) -> Problem:
        """The Problem that the planner gets for this case."""
        return self._problem(device_type, self.all_queries, self.sk, sum(self.all_lengths))

    def _problem(self, device_type: str, queries: tuple[int, ...], sk: int, total_k: int) -> Problem:
        from headfold.problem import Problem

        ragged, f = self.is_ragged and not self.is_paged, self.features
        return Problem(
            device_type=device_type,
            dtype=self.torch_dtype,
            batch=len(queries),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.d,
            head_dim_v=self.dv,
            max_seqlen_q=max(queries),
            max_seqlen_k=sk,
            total_q=sum(queries),
            total_k=total_k,
            q_layout="ragged" if ragged else "dense",
            kv_layout="paged" if self.is_paged else "ragged" if ragged else "dense",
            page_size=self.page_size,
            window_left=f.window - 1 if f.window else None,
            window_right=0 if self.causal else None,
            lengths_on_device=self.is_ragged or self.is_paged or self.reads_a_cache,
            softcap=f.softcap > 0,
            tokens_per_split=f.tokens_per_split,
            tensor_mask=bool(f.mask) or f.tree,
            featured=bool(f.names & {"softcap", "sink", "alibi", "mask", "tree"})
            or (f.rotary and not f.append),
            rotary=f.rotary and not f.append,  # an append rotates q too
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one key and its value, of all KV heads."""
        return self.kv_heads * (self.d + self.dv) * self.torch_dtype.itemsize

    @property
    def kv_bytes(self) -> int:
        """Bytes of the visible keys and values, each read once, those that sequences share too."""
        from headfold.planner.work import visible_tokens

        visible = sum(visible_tokens(p) * n for p, n in self._by_length())
        return self.token_bytes * (visible - self._held_in_common)

    @property
    def cache_bytes(self) -> int:
        """Bytes that K and V take up, seen or not."""
        return self.token_bytes * (sum(self.all_lengths) - self._held_in_common)

    @property
    def _held_in_common(self) -> int:
        """Keys that sequences have and that lie in pages of another."""
        return self.shared * (self.batch - 1)

    @property
    def flops(self) -> int:
        """Floating-point operations of both matrix products, masked pairs left out."""
        from headfold.planner.work import visible_pairs

        pairs = sum(visible_pairs(p) * n for p, n in self._by_length())
        if self.features.mask == "documents":
            n = self.sk // DOCUMENTS
            pairs = self.batch * DOCUMENTS * n * (n + 1) // 2
        return 2 * (self.d + self.dv) * self.heads * pairs

    def _by_length(self) -> list[tuple[Problem, int]]:
        counts = Counter(zip(self.all_queries, self.all_lengths, strict=True))
        return [(self._problem("cpu", (sq,), sk, sk), n) for (sq, sk), n in counts.items()]

    def record(self) -> dict[str, Any]:
        """The shape as plain data, for a result file; features that are off are left out."""
        fields = asdict(self)
        del fields["name"]
        fields["lengths"] = list(self.lengths) if self.lengths else None
        if self.queries is None:
            del fields["queries"]
        else:
            fields["queries"] = list(self.queries)
        fields["features"] = {name: getattr(self.features, name) for name in sorted(self.features.names)}
        return fields

    @classmethod
    def from_record(cls, name: str, record: dict[str, Any]) -> Case:
        """The case that `record` was made of, also by versions that knew no features."""
        fields = dict(record)
        for counts in ("lengths", "queries"):
            if fields.get(counts) is not None:
                fields[counts] = tuple(fields[counts])
        fields["features"] = Features(**fields.get("features", {}))
        return cls(name, **fields)


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
