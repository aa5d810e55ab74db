"""PyTorch's own ways to compute a case. The fastest of them is "PyTorch's best".

Tensors are transposed views of the (b, s, h, d) inputs, as a model has them: making them contiguous first
would only be slower. Masks, index tensors and padded caches are built outside the timing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from headfold.bench.cases import Case
from headfold.bench.inputs import CaseInputs
from headfold.bench.measure import Call
from headfold.bench.peers import Implementation, Prepare, Unsupported, no_room, register

_CACHE = frozenset({"cache", "append", "rotary", "window"})
_MASKS = frozenset({"alibi", "mask", "tree"})
_DENSE = ("decode", "speculative", "prefill")


def _is_dense(case: Case, device_type: str) -> bool:
    return case.kind in _DENSE and not case.is_paged


def _has_late_queries(case: Case, device_type: str) -> bool:
    """Bottom-right causal with fewer queries than keys, for which is_causal means something else."""
    return _is_dense(case, device_type) and case.causal and case.sq != case.sk


def _bool_mask(case: Case, device: torch.device) -> torch.Tensor:
    i = torch.arange(case.sq, device=device).unsqueeze(1) + (case.sk - case.sq)
    return torch.arange(case.sk, device=device).unsqueeze(0) <= i


def _mask(case: Case, x: CaseInputs, explicit_causal: bool) -> tuple[torch.Tensor | None, bool]:
    """attn_mask and is_causal that say what the case says; a window is a slice of K and V, see `_dense`."""
    extra = x.extra
    if extra.mask is not None:
        return extra.mask, False
    if extra.tree is not None:
        past = torch.ones(case.batch, case.sq, case.sk - case.sq, dtype=torch.bool, device=x.device)
        return torch.cat([past, extra.tree], dim=2).unsqueeze(1), False
    if extra.slopes is not None:
        _, seen = _seen(case)
        distance = torch.arange(seen - 1, -1, -1, device=x.device)  # of one query, the newest token
        bias = -extra.slopes[:, None, None] * distance
        return bias.to(case.torch_dtype).unsqueeze(0), False
    if not _has_late_queries(case, x.device.type):
        return None, case.causal
    return _bool_mask(case, x.device) if explicit_causal else causal_lower_right(case.sq, case.sk), False


def _seen(case: Case) -> tuple[int, int]:
    """(first key, number of keys) that the one query of a window sees."""
    seen = min(case.features.window or case.sk, case.sk)
    return case.sk - seen, seen


def _dense(backend: SDPBackend | None, explicit_mask: bool = False, expand: bool = False) -> Prepare:
    """scaled_dot_product_attention over dense K and V, in one of the forms that it has."""

    def prepare(case: Case, x: CaseInputs) -> Call | Unsupported:
        if expand and (short := no_room(2 * case.group * case.kv_bytes, x)):
            return short
        if case.sq > 1 and case.features.names & {"window", "alibi"}:
            return Unsupported("windows and slopes of many queries are not written out as masks here")
        bias, is_causal = _mask(case, x, explicit_mask)
        first, _ = _seen(case)
        tokens = _Tokens(case, x)
        ks, vs = ([t[:, first:].transpose(1, 2) for t in copies] for copies in (x.k, x.v))

        def only() -> AbstractContextManager[None]:
            return nullcontext() if backend is None else sdpa_kernel([backend])

        def call(i: int) -> torch.Tensor:
            q = tokens.put(i).transpose(1, 2)
            k, v = ks[i], vs[i]
            if expand:
                k, v = (t.repeat_interleave(case.group, dim=1) for t in (k, v))
            with only():
                out = F.scaled_dot_product_attention(
                    q, k, v, attn_mask=bias, is_causal=is_causal, enable_gqa=not expand and case.group > 1
                )
            return out.transpose(1, 2)

        return call

    return prepare


class _Tokens:
    """The newest tokens: their keys and values copied into the cache, rotated first where the case rotates."""

    def __init__(self, case: Case, x: CaseInputs) -> None:
        self.x, self.places = x, slice(case.sk - case.sq, case.sk)
        self.angles: tuple[torch.Tensor, torch.Tensor] | None = None
        if x.extra.cos is not None and x.extra.sin is not None:
            cos, sin = (torch.cat([t, t], dim=-1)[self.places] for t in (x.extra.cos, x.extra.sin))
            self.angles = cos.unsqueeze(1), sin.unsqueeze(1)

    def put(self, i: int) -> torch.Tensor:
        """Append to copy i what the case appends; returns the queries, rotated where it rotates."""
        extra = self.x.extra
        if extra.k_new is not None and extra.v_new is not None:
            self.x.k[i][:, self.places] = self._rotated(extra.k_new)
            self.x.v[i][:, self.places] = extra.v_new
        return self._rotated(self.x.q)

    def _rotated(self, t: torch.Tensor) -> torch.Tensor:
        """As models write it: halves swapped, one negated."""
        if self.angles is None:
            return t
        first, second = t.chunk(2, dim=-1)
        cos, sin = self.angles
        return t * cos + torch.cat([-second, first], dim=-1) * sin


def _folded(case: Case, x: CaseInputs) -> Call | Unsupported:
    """The group's heads laid by hand into the rows of one product per KV head, headfold's idea in PyTorch."""
    g = case.group
    mask = None
    if case.causal:
        mask = _bool_mask(case, x.device).repeat(g, 1)
    q = x.q.unflatten(2, (case.kv_heads, g)).permute(0, 2, 3, 1, 4).flatten(2, 3)

    def call(i: int) -> torch.Tensor:
        k, v = x.k[i].transpose(1, 2), x.v[i].transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.unflatten(2, (g, case.sq)).permute(0, 3, 1, 2, 4).flatten(2, 3)

    return call


def _length_mask(case: Case, x: CaseInputs) -> torch.Tensor | None:
    if not case.is_ragged:
        return None
    keys = torch.arange(case.sk, device=x.device)
    return (keys < x.lengths.unsqueeze(1)).view(case.batch, 1, 1, case.sk)


def _attend_dense(
    case: Case, x: CaseInputs, mask: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    k, v = (t[:, : case.sk].transpose(1, 2) for t in (k, v))
    q, is_causal = x.q.transpose(1, 2), case.causal and case.sq > 1
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=case.group > 1
    )
    return out.transpose(1, 2)


def _gather(case: Case, x: CaseInputs) -> Call | Unsupported:
    """Pages gathered into a dense cache, padded where lengths differ, then attention."""
    assert x.page_table is not None, "applies() lets only paged cases through"
    padded = 2 * case.batch * case.sk * case.token_bytes
    if short := no_room(padded, x):
        return short
    mask, pages = _length_mask(case, x), x.page_table.flatten()

    def dense(pool: torch.Tensor) -> torch.Tensor:
        return pool.index_select(0, pages).view(case.batch, -1, *pool.shape[2:])

    return lambda i: _attend_dense(case, x, mask, dense(x.k[i]), dense(x.v[i]))


def _pad(case: Case, x: CaseInputs) -> Call | Unsupported:
    """A cache kept padded to the longest sequence (padding it is not timed), with a mask."""
    padded = case.batch * case.sk * case.token_bytes
    if short := no_room(2 * x.copies * padded, x):
        return short
    ks, vs = ([_padded(case, t) for t in copies] for copies in (x.k, x.v))
    mask = _length_mask(case, x)
    return lambda i: _attend_dense(case, x, mask, ks[i], vs[i])


def _padded(case: Case, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows.split(case.all_lengths)), batch_first=True)


def _loop(case: Case, x: CaseInputs) -> Call:
    """One attention call per sequence, of its queries over exactly its keys."""
    table, size = x.page_table, case.page_size
    pages = [] if table is None else [table[b, : -(-n // size)] for b, n in enumerate(case.all_lengths)]
    starts = [0]
    for n in case.all_lengths:
        starts.append(starts[-1] + n)

    def keys(t: torch.Tensor, b: int) -> torch.Tensor:
        if table is None:
            return t[starts[b] : starts[b + 1]]
        return t.index_select(0, pages[b]).flatten(0, 1)[: case.all_lengths[b]]

    shapes = zip(case.all_queries, case.all_lengths, strict=True)
    masks = [causal_lower_right(sq, sk) if case.causal and sq > 1 else None for sq, sk in shapes]

    def call(i: int) -> torch.Tensor:
        outs = []
        for b, (rows, mask) in enumerate(zip(x.q_rows.split(case.all_queries), masks, strict=True)):
            q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (rows, keys(x.k[i], b), keys(x.v[i], b)))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=case.group > 1)
            outs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outs).view(case.out_shape)

    return call


def _varlen_missing() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None


def _varlen(case: Case, x: CaseInputs) -> Call | Unsupported:
    """torch.nn.attention.varlen.varlen_attn, with what this version of it can do."""
    from torch.nn.attention.varlen import varlen_attn

    options = inspect.signature(varlen_attn).parameters
    extra: dict[str, object] = {}
    if case.causal:
        if "window_size" not in options:
            return Unsupported(f"varlen_attn of torch {torch.__version__} has no bottom-right diagonal")
        extra["window_size"] = (-1, 0)
    if case.group > 1 and "enable_gqa" in options:
        extra["enable_gqa"] = True
    cu_k = x.cu_seqlens_k
    if x.page_table is not None:
        if "block_table" not in options:
            return Unsupported(f"varlen_attn of torch {torch.__version__} takes no pages")
        extra.update(block_table=x.page_table, seqused_k=x.lengths)
    cu_q = x.cu_seqlens_q
    if cu_q is None:
        cu_q = torch.arange(case.batch + 1, device=x.device, dtype=torch.int32) * case.sq
    attend: Callable[..., Any] = varlen_attn
    return lambda i: attend(x.q_rows, x.k[i], x.v[i], cu_q, cu_k, case.sq, case.sk, **extra).view(
        case.out_shape
    )


def _on(*device_types: str) -> Callable[[str], bool]:
    return lambda device_type: device_type in device_types


for _name, _backend, _where in (
    ("torch-sdpa", None, ("cpu",)),
    ("torch-cudnn", SDPBackend.CUDNN_ATTENTION, ("cuda",)),
    ("torch-flash", SDPBackend.FLASH_ATTENTION, ("cuda",)),
    ("torch-efficient", SDPBackend.EFFICIENT_ATTENTION, ("cuda",)),
    ("torch-math", SDPBackend.MATH, ()),
):
    # FlashAttention takes no mask tensor, cuDNN and the others no CausalBias.
    _with_masks = _CACHE | (_MASKS if _backend != SDPBackend.FLASH_ATTENTION else frozenset())
    _explicit = _backend not in (None, SDPBackend.FLASH_ATTENTION)
    register(
        Implementation(
            _name,
            f"scaled_dot_product_attention(enable_gqa=True), {_name.removeprefix('torch-')} backend",
            _dense(_backend, explicit_mask=_explicit),
            applies=_is_dense,
            by_default=_on(*_where),
            features=_with_masks,
        )
    )
register(
    Implementation(
        "torch-mask",
        "scaled_dot_product_attention(enable_gqa=True) with the bottom-right mask as a tensor",
        _dense(None, explicit_mask=True),
        applies=_has_late_queries,
        by_default=_on("cpu", "cuda"),
        features=_CACHE,
    )
)
register(
    Implementation(
        "torch-expand",
        "repeat_interleave of K and V, then scaled_dot_product_attention",
        _dense(None, expand=True),
        applies=lambda case, device_type: _is_dense(case, device_type) and case.group > 1,
        by_default=_on("cpu", "cuda"),
        features=_CACHE | _MASKS,
    )
)
register(
    Implementation(
        "torch-gather",
        "pages gathered into a dense cache, then scaled_dot_product_attention",
        _gather,
        applies=lambda case, device_type: case.is_paged and (case.sq == 1 or case.sq == case.sk),
        by_default=_on("cpu", "cuda"),
    )
)
register(
    Implementation(
        "torch-pad",
        "a cache kept padded to the longest sequence, scaled_dot_product_attention with a mask",
        _pad,
        applies=lambda case, device_type: case.is_ragged and not case.is_paged and case.sq == 1,
        by_default=_on("cpu", "cuda"),
    )
)
register(
    Implementation(
        "torch-loop",
        "one scaled_dot_product_attention call per sequence",
        _loop,
        applies=lambda case, device_type: case.is_ragged and (case.sq == 1 or case.queries is not None),
        by_default=_on("cpu", "cuda"),
    )
)
register(
    Implementation(
        "torch-varlen",
        "torch.nn.attention.varlen.varlen_attn",
        _varlen,
        applies=lambda case, device_type: (
            case.queries is not None or ((case.is_ragged or case.is_paged) and case.sq == 1)
        ),
        available=_varlen_missing,
        by_default=_on("cuda"),
    )
)
register(
    Implementation(
        "sdpa-folded",
        "the group folded by hand into rows for scaled_dot_product_attention; not PyTorch's own way",
        _folded,
        applies=_is_dense,
    )
)
