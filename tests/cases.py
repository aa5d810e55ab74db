"""Random attention inputs in every layout, and the accuracy rule. Shared by all tests.

Whatever a kernel must not read holds NaN: rows past a sequence's end, keys no query sees, pages nobody owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch

from headfold import reference
from headfold.problem import Inputs

NAN = float("nan")
# Elements of q and k below which the reference runs on the CPU: many small kernels and reads of lengths, which 14 test
# processes of one GPU wait for in turn.
SMALL = 2**18


def make(
    q_lens: Sequence[int],
    k_lens: Sequence[int],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    d: int = 16,
    dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    q_layout: str = "dense",
    kv_layout: str = "dense",
    page_size: int = 16,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    bottom_right: bool = True,
    scale: float | None = None,
    slack: int = 3,
    share_pages: bool = False,
    seed: int = 0,
    device: str = "cpu",
    num_splits: int = 0,
    pack_gqa: bool | None = None,
) -> Inputs:
    """Inputs of one call. Lengths that differ, or slack > 0, make padded slots with seqused where the layout has
    them; every key that no query of its sequence sees is NaN."""
    g = torch.Generator().manual_seed(seed)
    dv = d if dv is None else dv
    batch = len(k_lens)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    def offsets(lens: Sequence[int]) -> torch.Tensor:
        return torch.tensor([0, *torch.tensor(list(lens)).cumsum(0).tolist()], dtype=torch.int32)

    x: dict[str, object] = {}
    left, right = window
    right = 0 if causal else right
    keys = []
    for sq, sk in zip(q_lens, k_lens, strict=True):
        k, v = rand(sk, kv_heads, d), rand(sk, kv_heads, dv)
        unseen = ~reference.visible(sq, sk, left, right, bottom_right).any(0)
        k[unseen], v[unseen] = NAN, NAN
        keys.append((k, v))

    if q_layout == "ragged":
        slots = [n + (slack if slack and i % 2 else 0) for i, n in enumerate(q_lens)]
        q = torch.full((sum(slots), heads, d), NAN, dtype=dtype)
        x["cu_seqlens_q"] = offsets(slots)
        for i, n in enumerate(q_lens):
            first = int(x["cu_seqlens_q"][i])  # type: ignore[index]
            q[first : first + n] = rand(n, heads, d)
        if slack:
            x["seqused_q"] = torch.tensor(list(q_lens), dtype=torch.int32)
        x["max_seqlen_q"] = max([*slots, 0])
    else:
        q = torch.full((batch, max([*q_lens, 0]), heads, d), NAN, dtype=dtype)
        for i, n in enumerate(q_lens):
            q[i, :n] = rand(n, heads, d)
        if len(set(q_lens)) > 1:
            x["seqused_q"] = torch.tensor(list(q_lens), dtype=torch.int32)
    x["q"] = q

    if kv_layout == "ragged":
        slots = [n + (slack if slack and i % 2 == 0 else 0) for i, n in enumerate(k_lens)]
        k = torch.full((sum(slots), kv_heads, d), NAN, dtype=dtype)
        v = torch.full((sum(slots), kv_heads, dv), NAN, dtype=dtype)
        x["cu_seqlens_k"] = offsets(slots)
        for i, (ki, vi) in enumerate(keys):
            first = int(x["cu_seqlens_k"][i])  # type: ignore[index]
            k[first : first + len(ki)], v[first : first + len(vi)] = ki, vi
        if slack:
            x["seqused_k"] = torch.tensor(list(k_lens), dtype=torch.int32)
        x["max_seqlen_k"] = max([*slots, 0])
    elif kv_layout == "paged":
        k, v, table = _paged(keys, page_size, kv_heads, d, dv, dtype, g, share_pages)
        x["page_table"], x["seqused_k"] = table, torch.tensor(list(k_lens), dtype=torch.int32)
    else:
        capacity = max([*k_lens, 0]) + slack
        k = torch.full((batch, capacity, kv_heads, d), NAN, dtype=dtype)
        v = torch.full((batch, capacity, kv_heads, dv), NAN, dtype=dtype)
        for i, (ki, vi) in enumerate(keys):
            k[i, : len(ki)], v[i, : len(vi)] = ki, vi
        if slack or len(set(k_lens)) > 1:
            x["seqused_k"] = torch.tensor(list(k_lens), dtype=torch.int32)
    x["k"], x["v"] = k, v
    moved = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in x.items()}
    return Inputs(
        **moved,  # type: ignore[arg-type]
        softmax_scale=scale,
        window_left=left,
        window_right=right,
        bottom_right=bottom_right,
        num_splits=num_splits,
        pack_gqa=pack_gqa,
    )


def _paged(keys, page_size, kv_heads, d, dv, dtype, g, share_pages):  # type: ignore[no-untyped-def]
    """Shuffled pages; table entries past a sequence's end are garbage; with share_pages equal pages coincide."""
    per = [-(-len(k) // page_size) for k, _ in keys]
    pages = sum(per) + 2
    k = torch.full((pages, page_size, kv_heads, d), NAN, dtype=dtype)
    v = torch.full((pages, page_size, kv_heads, dv), NAN, dtype=dtype)
    free = torch.randperm(pages, generator=g).tolist()
    table = torch.full((len(keys), max([*per, 0]) + 1), 2**31 - 1, dtype=torch.int32)
    for i, (ki, vi) in enumerate(keys):
        for j in range(per[i]):
            rows = slice(j * page_size, (j + 1) * page_size)
            full = (j + 1) * page_size <= len(ki)
            first = keys[0][0][rows]
            if share_pages and i > 0 and full and len(first) == page_size and not first.isnan().any():
                table[i, j] = table[0, j]
                continue
            page = free.pop()
            table[i, j] = page
            k[page, : len(ki[rows])], v[page, : len(vi[rows])] = ki[rows], vi[rows]
    return k, v, table


def poisoned(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and LSE tensors full of NaN."""
    out = torch.full(x.out_shape, NAN, dtype=x.q.dtype, device=x.q.device)
    return out, torch.full(x.lse_shape, NAN, dtype=torch.float32, device=x.q.device)


def assert_accurate(x: Inputs, out: torch.Tensor, lse: torch.Tensor, factor: float = 2.0) -> None:
    """The field's accuracy rule, max|out - ref| <= 2 max|plain - ref| + a few ulp, on output and LSE, NaN-proof."""
    if x.q.numel() + x.k.numel() < SMALL:
        x, out, lse = _on_cpu(x), out.cpu(), lse.cpu()
    ref, ref_lse = reference.attention(x)
    plain, plain_lse = reference.attention(x, dtype=x.q.dtype)
    live = _live_rows(x)
    _assert_close("out", out, ref, plain, live, torch.finfo(x.q.dtype).eps, factor)
    rows = live.transpose(0, 1) if x.cu_seqlens_q is not None else live.transpose(1, 2)
    _assert_close("lse", lse, ref_lse, plain_lse, rows, torch.finfo(torch.float32).eps, factor)


def _on_cpu(x: Inputs) -> Inputs:
    """The same call with its tensors on the CPU."""
    values = {f.name: getattr(x, f.name) for f in fields(x)}
    return replace(x, **{name: t.cpu() for name, t in values.items() if isinstance(t, torch.Tensor)})


def _live_rows(x: Inputs) -> torch.Tensor:
    """Rows of the output that count: all but those past seqused_q, (…, h)."""
    live = torch.zeros(x.q.shape[:-1], dtype=torch.bool, device=x.q.device)
    for i in range(x.batch):
        n = reference.queries_of(x, i).shape[0]
        if x.cu_seqlens_q is None:
            live[i, :n] = True
        else:
            live[int(x.cu_seqlens_q[i]) : int(x.cu_seqlens_q[i]) + n] = True
    return live


def _assert_close(
    name: str,
    got: torch.Tensor,
    ref: torch.Tensor,
    plain: torch.Tensor,
    live: torch.Tensor,
    eps: float,
    factor: float,
) -> None:
    got, ref, plain = got[live].double().cpu(), ref[live].double().cpu(), plain[live].double().cpu()
    assert not got.isnan().any(), f"{name} has NaN"
    empty = ref == float("-inf")
    assert torch.equal(got == float("-inf"), empty), f"{name} is -inf elsewhere than the reference"
    if got[~empty].numel() == 0:
        return
    error = (got - ref)[~empty].abs().max().item()
    plain_error = (plain - ref)[~empty].abs().max().item()
    # float32's plain error is a few ulp itself and a matter of luck: blocked matrix products round otherwise.
    ulps = 2 if eps > 1e-6 else 8
    allowed = factor * plain_error + ulps * eps * max(1.0, ref[~empty].abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3e} > {allowed:.3e} (plain {plain_error:.3e})"
