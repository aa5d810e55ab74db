"""The errors of new keys and values and of their angles."""

from __future__ import annotations

from typing import Any

import torch

from tests.interface.bad import (
    APPEND,
    NEW_K,
    NEW_V,
    RAGGED_NEW,
    ROTARY,
    Bad,
    Q,
    contiguous,
    inner_stride,
    needs_gradient,
    no_tensor,
    wrong,
)
from tests.interface.tensors import rand


def with_append(**changes: Any) -> dict[str, Any]:
    return {**APPEND, **changes}


def new_tensor(name: str, t: torch.Tensor, cache: str) -> list[Bad]:
    """The errors of new keys or values."""
    other = "v" if name == "k" else "k"
    return [
        no_tensor(name),
        wrong(f"{name} is None; new k and v come together", **with_append(**{name: None})),
        wrong(f"{name} has dtype torch.int32; it must be float16 or", **with_append(**{name: t.int()})),
        wrong(
            f"{name} has dtype torch.float16; it must have k_cache's dtype torch.float32",
            **with_append(**{name: t.half()}),
        ),
        wrong(
            f"{name} is on meta; it must be on k_cache's device cpu", **with_append(**{name: t.to("meta")})
        ),
        wrong(f"{name} has shape (); it must be (b, s_new, hk, d)", **with_append(**{name: t.sum()})),
        wrong(f"{name} has shape (2, 2, {t.shape[-1]}); it must be (b", **with_append(**{name: t[0]})),
        wrong(
            f"{name} has shape {tuple(t.shape)}; it must be (total_new, hk, d), since cu_seqlens_k_new is given",
            **with_append(**{**RAGGED_NEW, name: t}),
        ),
        wrong("k has batch 1; it must have the queries' batch 2", **with_append(k=NEW_K[:1], v=NEW_V[:1])),
        wrong(
            f"{name} has shape (2, 2, 2, 5); its heads and head dimension must equal {cache}'s",
            **with_append(**{name: t[..., :5]}),
        ),
        wrong(
            "k has shape (2, 2, 1, 8); its heads and head dimension must equal k_cache's",
            **with_append(k=NEW_K[:, :, :1], v=NEW_V[:, :, :1]),
        ),
        wrong(
            "k has 6 tokens a sequence; the cache has room for 5",
            **with_append(k=rand(2, 6, 2, 8), v=rand(2, 6, 2, 6)),
        ),
        Bad(contiguous(name, t).message, ValueError, with_append(**contiguous(name, t).changes)),
        wrong(
            "an input requires a gradient, and an append in place has none",
            NotImplementedError,
            **with_append(**{name: t.clone().requires_grad_()}),
        ),
        # The other one is fine, and everything else about the call is checked too.
        wrong("num_splits is 300; it must be", **APPEND, num_splits=300),
        wrong("q has 3 heads; that must be a multiple", **APPEND, q=Q[:, :, :3], out=None),
        wrong(f"{other} is None; new k and v come together", **with_append(**{other: None})),
    ]


def angles(name: str, t: torch.Tensor) -> list[Bad]:
    """The errors of rotary_cos or rotary_sin, with and without new keys."""
    other = "rotary_sin" if name == "rotary_cos" else "rotary_cos"
    return [
        no_tensor(name),
        *(
            bad
            for base in (ROTARY, {**APPEND, **ROTARY})
            for bad in (
                wrong(f"{name} is None; rotary_cos and rotary_sin come together", **{**base, name: None}),
                wrong(
                    f"{name} has dtype torch.float16; it must be torch.float32", **{**base, name: t.half()}
                ),
                wrong(
                    f"{name} is on meta; it must be on the queries' device cpu",
                    **{**base, name: t.to("meta")},
                ),
                *(
                    wrong(
                        f"{name} has shape {tuple(value.shape)}; it must be (max_len, rotary_dim / 2) "
                        "with rotary_dim <= 8",
                        **{**base, name: value},
                    )
                    for value in (t[0], t[:, :0], rand(16, 5), t[None])
                ),
                wrong(
                    f"{name} has last stride 16; its last dimension must be contiguous",
                    **{**base, name: inner_stride(t)},
                ),
            )
        ),
        needs_gradient(name, t, **ROTARY),
        wrong(f"{other} is None; rotary_cos and rotary_sin come together", **{**ROTARY, other: None}),
    ]
