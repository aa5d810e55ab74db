"""The tensors of a case: random normal inputs, with enough copies of K and V that no cache can hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from headfold import reference
from headfold.bench.cases import Case
from headfold.bench.feature_inputs import FeatureInputs, make_features, mask_bytes
from headfold.bench.machine import free_memory, last_level_cache
from headfold.problem import Inputs

# All copies of K and V together are this many times the last-level cache. Server CPUs report caches that they
# share with other tenants, so a CPU stops at the second figure.
CACHE_MULTIPLE = 4
CPU_COPIES_BYTES = 1 << 30


@dataclass(slots=True)
class CaseInputs:
    """The inputs of one case. Entry i of `k` and `v` is copy i, elsewhere in memory.

    q is (b, sq, h, d), or (total_q, h, d) where sequences differ in queries. K and V are (b, sk, hk, .), or
    (total_k, hk, .) where ragged, or (pages, page_size, hk, .) with `page_table`. Index tensors are None where the
    layout needs none.
    """

    case: Case
    q: torch.Tensor
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    lengths: torch.Tensor
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    extra: FeatureInputs = field(default_factory=FeatureInputs)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.q.device

    @property
    def copies(self) -> int:
        """How many copies of K and V there are."""
        return len(self.k)

    @property
    def q_rows(self) -> torch.Tensor:
        """q as (total_q, h, d)."""
        return self.q if self.case.queries else self.q.flatten(0, 1)

    def arguments(self) -> Inputs:
        """The first copy as the reference takes it, with the new tokens of an append in their places."""
        ragged, f, extra = self.cu_seqlens_k is not None, self.case.features, self.extra
        k, v = self.k[0], self.v[0]
        if extra.k_new is not None:
            k, v = k.clone(), v.clone()
            self._write(k, v)
        mask = extra.mask
        if mask is not None:
            mask = mask.expand(self.case.batch, self.case.heads, -1, -1)
        return Inputs(
            self.q_rows if ragged else self.q,
            k,
            v,
            cu_seqlens_q=self.cu_seqlens_q,
            cu_seqlens_k=self.cu_seqlens_k,
            seqused_k=self.lengths if self.page_table is not None else None,
            page_table=self.page_table,
            window_left=f.window - 1,
            window_right=0 if self.case.causal else -1,
            softcap=f.softcap,
            sink=extra.sink,
            alibi_slopes=extra.slopes,
            mask=mask,
            tree_mask=extra.tree,
            rotary_cos=extra.cos,
            rotary_sin=extra.sin,
            rotary_positions=extra.before,
            rotary_interleaved=False,
        )

    def turned(self, tokens: torch.Tensor) -> torch.Tensor:
        """(sq, heads, d) at the positions of a sequence's newest tokens: rotated where the case rotates."""
        if self.extra.cos is None or self.extra.sin is None:
            return tokens
        at = torch.arange(self.case.sk - self.case.sq, self.case.sk, device=self.device)
        return reference.rotate(tokens, self.extra.cos, self.extra.sin, at, interleaved=False)

    def write_new_tokens(self) -> None:
        """Put the tokens that an append of the first copy writes where it writes them."""
        self._write(self.k[0], self.v[0])

    def _write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.extra.k_new is not None and self.extra.v_new is not None:
            k[:, -self.case.sq :] = torch.stack([self.turned(new) for new in self.extra.k_new])
            v[:, -self.case.sq :] = self.extra.v_new

    def forget_new_tokens(self) -> None:
        """Put NaN where an append of the first copy writes: what is not written there is then seen."""
        if self.extra.k_new is not None:
            for t in (self.k[0], self.v[0]):
                t[:, -self.case.sq :] = float("nan")


def copies_needed(case: Case, device: torch.device) -> int:
    """Copies of K and V so that a decode finds none in the cache. Prefill reuses K and V anyway: one."""
    if not case.is_memory_bound:
        return 1
    target = CACHE_MULTIPLE * last_level_cache(device)
    if device.type == "cpu":
        target = min(target, CPU_COPIES_BYTES)
    return 1 if case.kv_bytes > target else -(-target // case.kv_bytes)


def bytes_needed(case: Case, device: torch.device) -> int:
    """Memory for the inputs and one output."""
    q_and_out = sum(case.all_queries) * case.heads * (case.d + case.dv) * case.torch_dtype.itemsize
    return copies_needed(case, device) * case.cache_bytes + mask_bytes(case) + q_and_out


def memory_shortage(case: Case, device: torch.device) -> str | None:
    """Why the case does not fit into the device's free memory, or None if it does."""
    need, free = bytes_needed(case, device), free_memory(device)
    if need <= 0.8 * free:
        return None
    return f"it needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"


def make_inputs(case: Case, device: torch.device, copies: int | None = None, seed: int = 0) -> CaseInputs:
    """Draw the inputs of a case, with as many copies of K and V as the cache demands unless `copies` says."""
    gen = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, device=device, dtype=case.torch_dtype)

    lengths = torch.tensor(case.all_lengths, dtype=torch.int32)
    rows: tuple[int, ...] = (case.batch, case.sk)
    cu_q = cu_k = table = None
    if case.is_paged:
        table = _shuffled_table(case)
        rows = (int(table.max()) + 1, case.page_size)
    elif case.is_ragged:
        rows = (int(lengths.sum()),)
        cu_k = torch.zeros(case.batch + 1, dtype=torch.int32)
        cu_k[1:] = lengths.cumsum(0)
        cu_q = torch.zeros(case.batch + 1, dtype=torch.int32)
        cu_q[1:] = torch.tensor(case.all_queries, dtype=torch.int32).cumsum(0)
    q = randn(*case.out_shape[:-1], case.d)
    k, v = [randn(*rows, case.kv_heads, case.d)], [randn(*rows, case.kv_heads, case.dv)]
    for _ in range((copies or copies_needed(case, device)) - 1):
        k.append(k[0].clone())
        v.append(v[0].clone())
    cu_q, cu_k, table = (None if t is None else t.to(device) for t in (cu_q, cu_k, table))
    extra = make_features(case, device, gen)
    return CaseInputs(case, q, k, v, lengths.to(device), cu_q, cu_k, table, extra)


def _pages(case: Case) -> list[int]:
    return [-(-n // case.page_size) for n in case.all_lengths]


def _shuffled_table(case: Case) -> torch.Tensor:
    """The pages of every sequence, every page there is once, but for those that all begin with."""
    pages, shared = _pages(case), case.shared // case.page_size if case.shared else 0
    own = [n - shared for n in pages]
    order = torch.randperm(shared + sum(own), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    table = torch.zeros(case.batch, max(pages), dtype=torch.int32)
    table[:, :shared] = order[:shared]
    for i, part in enumerate(order[shared:].split(own)):
        table[i, shared : shared + len(part)] = part
    return table
