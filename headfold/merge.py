"""Merging states: checks, shapes and the CPU form of flash_attn_combine."""

from __future__ import annotations

import torch

from headfold import backends
from headfold.problem import MAX_SPLITS
from headfold.values import check_combine_values, value_checks_enabled

_CALLER = "flash_attn_combine"
_OUT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def combine_shapes(out_partial: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the merged output and of its LSE; heads come last but one, and last."""
    return tuple(out_partial.shape[1:]), tuple(out_partial.shape[1:-1])


def check_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
    out: torch.Tensor | None,
    lse: torch.Tensor | None,
    out_dtype: torch.dtype | None,
) -> None:
    """Raise on the first argument of a merge that does not fit. Reads no device memory.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: a shape, dtype, device or stride that does not fit.
        NotImplementedError: a call that needs the backward.
    """
    for name, t in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{_CALLER}: {name} is a {type(t).__name__}; it must be a torch.Tensor")
    dims, ragged = out_partial.dim(), cu_seqlens is not None
    if dims not in (4, 5) or (ragged and dims == 5):
        need = "(splits, total, h, d)" if ragged else "(splits, b, s, h, d) or (splits, total, h, d)"
        raise ValueError(f"{_CALLER}: out_partial has shape {tuple(out_partial.shape)}; it must be {need}")
    if not 1 <= out_partial.shape[0] <= MAX_SPLITS:
        raise ValueError(
            f"{_CALLER}: out_partial has {out_partial.shape[0]} splits; 1 to {MAX_SPLITS} can be merged"
        )
    if not 1 <= out_partial.shape[-1] <= 256:
        raise ValueError(
            f"{_CALLER}: out_partial has head dimension {out_partial.shape[-1]}; it must be 1 to 256"
        )
    if out_partial.dtype not in _OUT_DTYPES:
        raise ValueError(
            f"{_CALLER}: out_partial has dtype {out_partial.dtype}; it must be float32, float16 or bfloat16"
        )
    if lse_partial.dtype != torch.float32:
        raise ValueError(f"{_CALLER}: lse_partial has dtype {lse_partial.dtype}; it must be float32")
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"{_CALLER}: lse_partial has shape {tuple(lse_partial.shape)}; "
            f"it must be out_partial's without its last size, {tuple(out_partial.shape[:-1])}"
        )
    if out_dtype is not None and out_dtype not in _OUT_DTYPES:
        raise ValueError(
            f"{_CALLER}: out_dtype is {out_dtype}; it must be None, float16, bfloat16 or float32"
        )
    out_shape, lse_shape = combine_shapes(out_partial)
    _check_tensor("out_partial", out_partial, out_partial, tuple(out_partial.shape), _OUT_DTYPES)
    _check_tensor(
        "lse_partial", lse_partial, out_partial, tuple(lse_partial.shape), (torch.float32,), last_stride=False
    )
    if seqused is not None and cu_seqlens is None and dims == 4:
        raise ValueError(
            f"{_CALLER}: seqused is given without cu_seqlens; (splits, total, h, d) partials need both"
        )
    batch = out_partial.shape[1]
    if cu_seqlens is not None:
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(
                f"{_CALLER}: cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (batch + 1,)"
            )
        batch = cu_seqlens.shape[0] - 1
        _check_tensor("cu_seqlens", cu_seqlens, out_partial, (batch + 1,), (torch.int32,))
    if seqused is not None:
        _check_tensor("seqused", seqused, out_partial, (batch,), (torch.int32,))
    if out is not None:
        _check_tensor("out", out, out_partial, out_shape, _OUT_DTYPES)
    if lse is not None:
        _check_tensor("lse", lse, out_partial, lse_shape, (torch.float32,), last_stride=False)
    for name, result in (("out", out), ("lse", lse)):
        if result is None:
            continue
        if any(n > 1 and s == 0 for n, s in zip(result.shape, result.stride(), strict=True)):
            raise ValueError(
                f"{_CALLER}: {name} is expanded (a stride is 0); every element needs its own place"
            )
    if torch.is_grad_enabled() and (out_partial.requires_grad or lse_partial.requires_grad):
        raise NotImplementedError(
            f"{_CALLER}: an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs"
        )


def _check_tensor(
    name: str,
    t: torch.Tensor,
    like: torch.Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    last_stride: bool = True,
) -> None:
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"{_CALLER}: {name} is a {type(t).__name__}; it must be a torch.Tensor")
    if t.device != like.device:
        raise ValueError(
            f"{_CALLER}: {name} is on {t.device}; it must be on out_partial's device {like.device}"
        )
    if t.dtype not in dtypes:
        need = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{_CALLER}: {name} has dtype {t.dtype}; it must be {need}")
    if tuple(t.shape) != shape:
        raise ValueError(f"{_CALLER}: {name} has shape {tuple(t.shape)}; it must be {shape}")
    if last_stride and t.dim() > 0 and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(
            f"{_CALLER}: {name} has last stride {t.stride(-1)}; its last dimension must be contiguous"
        )


def merge_on_cpu(out_partial: torch.Tensor, lse_partial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge states along the first dimension in float32: out (..., d) and LSE (...)."""
    # Relative to the largest LSE, not to the merged one: that is rounded, and its error would scale the output.
    top = lse_partial.amax(0)
    top = torch.where(top == float("-inf"), torch.zeros_like(top), top)
    weight = torch.exp(lse_partial - top)
    total = weight.sum(0)
    weight = weight.unsqueeze(-1)
    # The output of a state that saw no key may be anything, NaN included: it is replaced, not multiplied by 0.
    part = torch.where(weight > 0, out_partial.float(), torch.zeros((), device=out_partial.device))
    out = (part * weight).sum(0) / torch.where(total == 0, torch.ones_like(total), total).unsqueeze(-1)
    return out, top + torch.log(total)


def run_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    seqused: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge checked partials into `out` and `lse`. Rows past `seqused` are not written.

    Raises:
        ValueError: an offset or length that does not fit, under HEADFOLD_CHECK=1, before anything is written.
    """
    if value_checks_enabled():
        batch = out_partial.shape[1] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        check_combine_values(_CALLER, out_partial.shape[-3], batch, cu_seqlens, seqused)
    if lse.numel() == 0 or (seqused is not None and seqused.shape[0] == 0):
        return
    ragged = out_partial.dim() == 4
    if backends.device_of(out.device).is_cpu:
        for rows in _rows_that_count(out_partial, cu_seqlens, seqused):
            merged, merged_lse = merge_on_cpu(
                out_partial[(slice(None), *rows)], lse_partial[(slice(None), *rows)]
            )
            out[rows] = merged.to(out.dtype)
            lse[rows] = merged_lse
        return
    from headfold.backends.fixup import fixup

    def strides(t: torch.Tensor, lead: int) -> tuple[int, ...]:
        s = t.stride()
        return (*s[:lead], *((0,) if ragged else ()), *s[lead : lead + (2 if ragged else 3)])

    fixup(
        out_partial,
        lse_partial,
        out,
        lse,
        shape=(1, *lse.shape) if ragged else lse.shape,
        partial_out_strides=strides(out_partial, 1),
        partial_lse_strides=strides(lse_partial, 1),
        out_strides=strides(out, 0),
        lse_strides=strides(lse, 0),
        cu_seqlens=cu_seqlens,
        seqused=seqused,
    )


def _rows_that_count(
    out_partial: torch.Tensor, cu_seqlens: torch.Tensor | None, seqused: torch.Tensor | None
) -> list[tuple[slice | int, ...]]:
    if seqused is None:
        return [(slice(None),)]
    used = seqused.tolist()
    if cu_seqlens is None:
        return [(i, slice(0, n)) for i, n in enumerate(used)]
    starts = cu_seqlens.tolist()
    return [(slice(starts[i], starts[i] + n),) for i, n in enumerate(used)]
