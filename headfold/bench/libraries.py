"""Attention libraries to compare with: FlashAttention-3 (package or operators) and -4, FlashInfer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from headfold.bench.cases import Case
from headfold.bench.inputs import CaseInputs
from headfold.bench.measure import Call
from headfold.bench.peers import Implementation, Prepare, Unsupported, register

FLASHINFER_WORKSPACE = 512 << 20
FA3_FEATURES = frozenset({"softcap", "window", "cache", "append", "rotary"})
FLASHINFER_PAGE = 16  # pages into which FlashInfer's decode wrapper is shown a dense cache


def _needs(module: str, what: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        if not torch.cuda.is_available():
            return f"{what} needs an NVIDIA GPU"
        try:
            found = find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package is not there either
            found = False
        return None if found else f"{what} is not installed (no module {module})"

    return missing


def _half_only(prepare: Prepare) -> Prepare:
    def checked(case: Case, x: CaseInputs) -> Call | Unsupported:
        if case.dtype == "fp32":
            return Unsupported("it takes fp16 and bf16 only")
        return prepare(case, x)

    return checked


def _first(result: Any) -> torch.Tensor:
    """The output of functions that return (out, lse) in some versions and out in others."""
    out: torch.Tensor = result[0] if isinstance(result, tuple | list) else result
    return out


def _flash_attn_3(case: Case, x: CaseInputs) -> Call:
    import flash_attn_interface as fa3

    f, extra = case.features, x.extra
    options = {"causal": case.causal, "window_size": _window(case), "softcap": f.softcap}
    if x.cu_seqlens_q is not None:
        return lambda i: _first(
            fa3.flash_attn_varlen_func(
                x.q_rows, x.k[i], x.v[i], x.cu_seqlens_q, x.cu_seqlens_k, case.sq, case.sk, **options
            )
        ).view(case.out_shape)
    if case.kind == "prefill" and not case.is_paged:
        return lambda i: _first(fa3.flash_attn_func(x.q, x.k[i], x.v[i], **options))
    before = x.lengths if extra.before is None else extra.before
    metadata = fa3.get_scheduler_metadata(
        case.batch,
        case.sq,
        case.sk,
        case.heads,
        case.kv_heads,
        case.d,
        before,
        qkv_dtype=case.torch_dtype,
        headdim_v=case.dv,
        page_size=case.page_size or None,
        max_seqlen_k_new=case.sq if f.append else 0,
        causal=case.causal,
        window_size=_window(case),
        has_softcap=f.softcap > 0,
    )
    return lambda i: _first(
        fa3.flash_attn_with_kvcache(
            x.q,
            x.k[i],
            x.v[i],
            extra.k_new,
            extra.v_new,
            rotary_cos=extra.cos,
            rotary_sin=extra.sin,
            rotary_interleaved=False,
            cache_seqlens=before,
            page_table=x.page_table,
            scheduler_metadata=metadata,
            **options,
        )
    )


def _window(case: Case) -> tuple[int, int]:
    """FlashAttention's (left, right), -1 for an open side; causal closes the right one."""
    return case.features.window - 1, -1


def fa3_operators(path: str, option: str, name: str = "fa3-ops") -> Implementation:
    """FlashAttention-3's operators as vLLM builds them, from a shared library that `option` names.

    Raises:
        ValueError: no such file.
    """
    if not Path(path).is_file():
        need = (
            "a library or a name" if option == "--against" else "a library with FlashAttention-3's operators"
        )
        raise ValueError(f"{option} is {path!r}, which is not a file; it must be {need}")

    def missing() -> str | None:
        return None if torch.cuda.is_available() else "FlashAttention-3 needs an NVIDIA GPU"

    def prepare(case: Case, x: CaseInputs) -> Call:
        return prepare_fa3_operators(_load_operators(path), case, x)

    return Implementation(
        name,
        f"FlashAttention-3's operators in {path}",
        _half_only(prepare),
        available=missing,
        features=FA3_FEATURES | {"sink"},
    )


@cache
def _load_operators(path: str) -> Any:
    torch.ops.load_library(path)
    return torch.ops._vllm_fa3_C


def prepare_fa3_operators(ops: Any, case: Case, x: CaseInputs) -> Call:
    """This build takes only variable lengths, so they are always given; the schedule is made beforehand."""
    f, extra, ragged = case.features, x.extra, x.cu_seqlens_q is not None
    q = x.q_rows if ragged else x.q
    used = None if ragged else x.lengths if extra.before is None else extra.before
    max_q, max_k = (case.sq, case.sk) if ragged else (None, None)
    left, right = _window(case)
    sink = None if extra.sink is None else extra.sink.to(case.torch_dtype)

    def run(i: int, metadata: torch.Tensor | None) -> torch.Tensor:
        # q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k;
        # max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin,
        # rotary_seqlens, q_descale, k_descale, v_descale, scale, causal; window_left, window_right, softcap,
        # rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, sink, cp_world_size,
        # cp_rank, cp_seqused_k
        result = ops.fwd(
            *(q, x.k[i], x.v[i], extra.k_new, extra.v_new, None, None, x.cu_seqlens_q, x.cu_seqlens_k),
            *(None, None, used, max_q, max_k, x.page_table, None, None, extra.cos, extra.sin, None),
            *(None, None, None, case.d**-0.5, case.causal, left, right, f.softcap, False, metadata, 0, None),
            *(0, sink, 1, 0, None),
        )
        return _first(result).view(case.out_shape)

    if ragged:
        return lambda i: run(i, None)
    # batch, max_seqlen_q, max_seqlen_k, heads, kv_heads, d, dv, dtype, seqused_k, cu_seqlens_q, cu_seqlens_k,
    # cu_seqlens_k_new, seqused_q, leftpad_k, page_size, max_seqlen_k_new, causal, window_left, window_right,
    # has_softcap, num_splits, pack_gqa, sm_margin
    schedule = ops.get_scheduler_metadata(
        *(case.batch, case.sq, case.sk, case.heads, case.kv_heads, case.d, case.dv, case.torch_dtype, used),
        *(None, None, None, None, None, case.page_size or None, case.sq if f.append else 0),
        *(case.causal, left, right, f.softcap > 0, 0, None, 0),
    )
    try:
        run(0, schedule)
    except RuntimeError:  # this build refuses the schedule for this shape: it makes its own in every call
        return lambda i: run(i, None)
    return lambda i: run(i, schedule)


def _flash_attn_4(case: Case, x: CaseInputs) -> Call:
    from flash_attn.cute import interface as fa4

    if x.page_table is not None:
        return lambda i: _first(
            fa4.flash_attn_varlen_func(
                x.q, x.k[i], x.v[i], seqused_k=x.lengths, page_table=x.page_table, causal=case.causal
            )
        )
    if x.cu_seqlens_q is not None:
        return lambda i: _first(
            fa4.flash_attn_varlen_func(
                x.q_rows,
                x.k[i],
                x.v[i],
                cu_seqlens_q=x.cu_seqlens_q,
                cu_seqlens_k=x.cu_seqlens_k,
                causal=case.causal,
            )
        ).view(case.out_shape)
    window = tuple(None if side < 0 else side for side in _window(case))
    sink = None if x.extra.sink is None else x.extra.sink.to(case.torch_dtype)
    return lambda i: _first(
        fa4.flash_attn_func(
            *(x.q, x.k[i], x.v[i]),
            causal=case.causal,
            window_size=window,
            learnable_sink=sink,
            softcap=case.features.softcap,
        )
    )


def _flashinfer(case: Case, x: CaseInputs) -> Call | Unsupported:
    if not case.is_memory_bound:
        if case.is_ragged:
            return Unsupported("its prefill wrapper here takes sequences of one length")
        if case.is_paged:
            return Unsupported("its prefill wrapper here takes dense keys")
        return _flashinfer_prefill(case, x)
    if case.sq > 1:
        return Unsupported("its decode wrapper takes one query a sequence")
    if case.is_ragged and not case.is_paged:
        return Unsupported("its decode wrapper takes paged caches")
    if not case.is_paged and case.sk % FLASHINFER_PAGE:
        return Unsupported(f"a dense cache needs a length that is a multiple of {FLASHINFER_PAGE}")
    import flashinfer

    size = case.page_size or FLASHINFER_PAGE
    lengths = torch.tensor(case.all_lengths, dtype=torch.int32)
    pages = (lengths + size - 1) // size
    starts = torch.zeros(case.batch + 1, dtype=torch.int32)
    starts[1:] = pages.cumsum(0)
    if x.page_table is None:
        indices = torch.arange(int(starts[-1]), dtype=torch.int32, device=x.device)
    else:
        indices = torch.cat([x.page_table[b, : int(n)] for b, n in enumerate(pages)])
    last = (lengths - 1) % size + 1
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=x.device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=starts.to(x.device),
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last.to(x.device),
    )
    dtype = case.torch_dtype
    wrapper.plan(
        starts, indices, last, case.heads, case.kv_heads, case.d, size, q_data_type=dtype, kv_data_type=dtype
    )
    ks, vs = ([t.view(-1, size, *t.shape[2:]) for t in copies] for copies in (x.k, x.v))
    return lambda i: _first(wrapper.run(x.q_rows, (ks[i], vs[i]))).view(case.out_shape)


def _flashinfer_prefill(case: Case, x: CaseInputs) -> Call:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
        torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=x.device), "NHD"
    )
    batches = torch.arange(case.batch + 1, dtype=torch.int32)
    dtype = case.torch_dtype
    wrapper.plan(
        batches * case.sq,
        batches * case.sk,
        case.heads,
        case.kv_heads,
        case.d,
        causal=case.causal,
        q_data_type=dtype,
        kv_data_type=dtype,
    )
    ks, vs = ([t.flatten(0, 1) for t in copies] for copies in (x.k, x.v))
    return lambda i: _first(wrapper.run(x.q_rows, ks[i], vs[i])).view(case.out_shape)


register(
    Implementation(
        "fa3",
        "FlashAttention-3, the flash_attn_interface package",
        _half_only(_flash_attn_3),
        available=_needs("flash_attn_interface", "FlashAttention-3"),
        features=FA3_FEATURES,
    )
)
register(
    Implementation(
        "fa4",
        "FlashAttention-4, the flash_attn.cute package",
        _half_only(_flash_attn_4),
        available=_needs("flash_attn.cute", "FlashAttention-4"),
        features=frozenset({"softcap", "sink", "window", "cache"}),
    )
)
register(
    Implementation(
        "flashinfer",
        "FlashInfer's batch wrappers, planned outside the timing",
        _half_only(_flashinfer),
        available=_needs("flashinfer", "FlashInfer"),
    )
)
