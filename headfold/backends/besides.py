"""Launch arguments of a call's tensors, and of what it may have besides plain attention: features, and new tokens to append."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from headfold.appending import AppendingInputs
from headfold.problem import Inputs, k_capacity, wide_mask

# What address.py calls the elements of masks, sinks and angles.
KINDS = {torch.bool: 1, torch.float16: 2, torch.bfloat16: 3, torch.float32: 4}
# An open window side, and no chunk: above any position, and a sum with a position still fits 32 bits.
OPEN_SIDE = 2**30
NO_FEATURES = (0,) * 26
NO_NEW_TOKENS = (0,) * 10


def tensor_arguments(x: Inputs, out: torch.Tensor, lse: int, lengths: torch.Tensor | None) -> tuple[int, ...]:
    """`Q` to `page_table` of the kernels, with the LSE at address `lse` and `lengths` as seqused_k."""
    return (
        x.q.data_ptr(),
        x.k.data_ptr(),
        x.v.data_ptr(),
        out.data_ptr(),
        lse,
        address(x.cu_seqlens_q),
        address(x.cu_seqlens_k),
        address(x.seqused_q),
        address(lengths),
        address(x.page_table),
    )


def no_features(x: Inputs) -> tuple[int, ...]:
    """`feature_arguments` of a plain call."""
    return NO_FEATURES


def feature_arguments(x: Inputs) -> tuple[int, ...]:
    """What a plain call has none of, from the kernels' `sink` to `rotary_advances`; 0 for what is not there."""
    sink, slopes, mask, tree, cos, sin = (
        x.sink,
        x.alibi_slopes,
        x.mask,
        x.tree_mask,
        x.rotary_cos,
        x.rotary_sin,
    )
    return (
        address(sink),
        kind(sink),
        address(slopes),
        slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0,
        address(mask),
        kind(mask),
        int(wide_mask(x) > 0),
        *(mask.stride() if mask is not None else (0, 0, 0, 0)),
        address(tree),
        *(tree.stride()[:2] if tree is not None else (0, 0)),
        address(x.cache_batch_idx),
        address(x.cache_leftpad),
        address(cos),
        address(sin),
        kind(cos),
        2 * cos.shape[1] if cos is not None else 0,
        int(x.rotary_interleaved),
        address(x.rotary_positions),
        cos.stride(0) if cos is not None else 0,
        sin.stride(0) if sin is not None else 0,
        cos.shape[0] if cos is not None else 0,
        int(x.rotary_advances),
    )


def rotation_alone(x: Inputs) -> Callable[[Inputs], tuple[int, ...]]:
    """`feature_arguments` of calls that look like x and have angles, but no feature, without asking for each."""
    numbers = feature_arguments(x)
    cos, positions = 16, 21
    head, middle, tail = numbers[:cos], numbers[cos + 2 : positions], numbers[positions + 1 :]

    def run(x: Any) -> tuple[int, ...]:
        angles = x.rotary_cos.data_ptr(), x.rotary_sin.data_ptr()
        return *head, *angles, *middle, x.rotary_positions.data_ptr(), *tail

    return run


def new_tokens(x: AppendingInputs) -> tuple[tuple[int, int], Callable[[Inputs], tuple[int, ...]]]:
    """(`grown` and `room`, what gives `new_k` to `pages`) of a call that appends, and of any that looks like it."""
    assert x.new_k is not None
    assert x.new_v is not None
    tokens = x.new_k.shape[1]
    numbers = (*x.new_k.stride()[:3], *x.new_v.stride()[:3], tokens, x.k.shape[0])

    def run(x: Any) -> tuple[int, ...]:
        return x.new_k.data_ptr(), x.new_v.data_ptr(), *numbers

    return (tokens, k_capacity(x)), run


def no_new_tokens(x: Inputs) -> tuple[int, ...]:
    """`new_k` to `pages` of a call that appends nothing."""
    return NO_NEW_TOKENS


def address(t: torch.Tensor | None) -> int:
    """Where a tensor lies; 0 for none."""
    return 0 if t is None else t.data_ptr()


def kind(t: torch.Tensor | None) -> int:
    """The kind of a tensor's elements as `kernels/parts/address.py` numbers them; 0 for none."""
    return 0 if t is None else KINDS[t.dtype]


def division(d: int) -> tuple[int, int]:
    """(magic, shift) with n // d == ((2 * n * magic) >> 32) >> shift for every 0 <= n < 2**31, magic below 2**32."""
    shift = (d - 1).bit_length()
    return -(-(2 ** (31 + shift)) // d), shift
