"""The errors of the arguments that all attention functions share."""

from __future__ import annotations

from typing import Any

import torch

from headfold.problem import MAX_SEQLEN
from tests.cases import NAN
from tests.interface.bad import (
    FLOATS,
    GRAD,
    SIDES,
    Bad,
    contiguous,
    feature_tensor,
    flag,
    needs_gradient,
    no_tensor,
    not_int,
    not_yet,
    wrong,
)
from tests.interface.tensors import ints, rand

LONG_K, LONG_V = rand(2, 300, 2, 8), rand(2, 300, 2, 6)


def attention_errors(base: dict[str, Any], long: dict[str, Any]) -> dict[str, list[Bad]]:
    """The errors of the arguments that all attention functions share.

    Args:
        base: the function's valid call.
        long: what makes it one over 300 keys a sequence.
    """
    q, k, v = (base[name] for name in list(base)[:3])
    key, val = list(base)[1:3]
    out = torch.full((*q.shape[:-1], v.shape[-1]), NAN)
    return {
        "q": [
            no_tensor("q", None, optional=False),
            wrong(f"q has dtype torch.float64; it must be {FLOATS}", q=q.double()),
            wrong(f"q has dtype torch.int32; it must be {FLOATS}", q=q.int()),
            wrong("q has shape (); it must be (", q=q.sum()),
            wrong("q has shape (8); it must be (", q=q.flatten()[:8]),
            wrong("q has shape (1, 8); it must be (", q=q.flatten()[None, :8]),
            wrong("q has 3 heads; that must be a multiple of the 2 KV heads", q=q[..., :3, :]),
            wrong(
                "q has head dimension 257; it must be 1 to 256",
                **{"q": q[..., :1].repeat_interleave(257, -1), key: k[..., :1].repeat_interleave(257, -1)},
            ),
            contiguous("q", q),
            wrong(GRAD, NotImplementedError, q=q.clone().requires_grad_()),
        ],
        key: [
            no_tensor(key, 0, optional=False),
            wrong(f"{key} has dtype torch.float8_e4m3fn; it must be", **{key: k.to(torch.float8_e4m3fn)}),
            wrong(f"{key} has dtype torch.float16; it must have the queries' dtype", **{key: k.half()}),
            wrong(f"{key} is on meta; it must be on the queries' device cpu", **{key: k.to("meta")}),
            wrong(f"{key} has shape (); it must be (", **{key: k.sum()}),
            wrong(
                f"{key} has head dimension 4; it must equal the queries' head dimension 8",
                **{key: k[..., :4]},
            ),
            contiguous(key, k),
            wrong(GRAD, NotImplementedError, **{key: k.clone().requires_grad_()}),
        ],
        val: [
            no_tensor(val, (1, 2), optional=False),
            wrong(f"{val} has dtype torch.bfloat16; it must have the queries' dtype", **{val: v.bfloat16()}),
            wrong(f"{val} is on meta; it must be on the queries' device cpu", **{val: v.to("meta")}),
            wrong(f"{val} has shape (2, 6); it must be (", **{val: v.flatten()[:12].view(2, 6)}),
            wrong(f"all but its last size must equal {key}'s {tuple(k.shape)}", **{val: v[..., :1, :]}),
            wrong(
                f"{val} has head dimension 257; it must be 1 to 256",
                **{val: v[..., :1].repeat_interleave(257, -1)},
            ),
            contiguous(val, v),
            wrong(GRAD, NotImplementedError, **{val: v.clone().requires_grad_()}),
        ],
        "softmax_scale": [
            *(
                wrong(
                    f"softmax_scale is {value!r}; it must be None or a number", TypeError, softmax_scale=value
                )
                for value in ("1.0", True, torch.tensor(1.0))
            ),
            *(
                wrong(f"softmax_scale is {value}; it must be None or a finite number", softmax_scale=value)
                for value in (NAN, float("inf"), -float("inf"))
            ),
        ],
        "causal": flag("causal"),
        "window_size": [
            wrong(f"window_size is 5; {SIDES}", TypeError, window_size=5),
            wrong(f"window_size is None; {SIDES}", TypeError, window_size=None),
            wrong(f"window_size is '12'; {SIDES}", TypeError, window_size="12"),
            wrong("window_size has 3 entries; it must have two", window_size=(1, 2, 3)),
            wrong("window_size has 0 entries; it must have two", window_size=[]),
            wrong("window_size is 1.0; it must be an int", TypeError, window_size=(1.0, 2)),
            wrong("window_size is True; it must be an int", TypeError, window_size=(2, True)),
            wrong("window_size has left side -2; a side is None or -1 (open), or >= 0", window_size=(-2, 0)),
            wrong("window_size has right side -3; a side is None or -1 (open), or >= 0", window_size=(0, -3)),
            *(
                wrong("it must hold two integers on the CPU", window_size=value)
                for value in (torch.ones(2), ints(1), ints(1, 2, 3), ints(1, 2).to("meta"))
            ),
        ],
        "num_splits": [
            *not_int("num_splits"),
            wrong("num_splits is None; it must be an int", TypeError, num_splits=None),
            wrong("num_splits is -1; it must be 0 (automatic) to 256", num_splits=-1),
            wrong("num_splits is 257; it must be 0 (automatic) to 256", num_splits=257),
        ],
        "pack_gqa": [
            wrong(f"pack_gqa is {value!r}; it must be None, True or False", TypeError, pack_gqa=value)
            for value in (1, "auto")
        ],
        "sm_margin": [
            *not_int("sm_margin"),
            wrong("sm_margin is -1; it must be >= 0", sm_margin=-1),
        ],
        "out": [
            no_tensor("out"),
            wrong(f"out has shape {tuple(out[:1].shape)}; it must be {tuple(out.shape)}", out=out[:1]),
            wrong("out has dtype torch.float16; it must be torch.float32", out=out.half()),
            wrong("out is on meta; it must be on the queries' device cpu", out=out.to("meta")),
            contiguous("out", out),
            wrong(
                "out is expanded (a stride is 0); every element needs its own place",
                out=out[:1].expand_as(out),
            ),
        ],
        **not_yet("qv", "q_descale", "k_descale", "v_descale"),
        "learnable_sink": [
            *feature_tensor("learnable_sink", rand(4), "float16 or bfloat16 or float32", "(4,)"),
            needs_gradient("learnable_sink", rand(4)),
        ],
        "alibi_slopes": [
            *feature_tensor("alibi_slopes", rand(4), "float32", "(4,) or (2, 4)"),
            wrong("alibi_slopes has dtype torch.float16; it must be float32", alibi_slopes=rand(4).half()),
            wrong("alibi_slopes has shape (1, 4); it must be (4,) or (2, 4)", alibi_slopes=rand(1, 4)),
            needs_gradient("alibi_slopes", rand(2, 4)),
        ],
        "tokens_per_split": [
            *not_int("tokens_per_split"),
            *(
                wrong(f"tokens_per_split is {n}; it must be None or >= 1", tokens_per_split=n)
                for n in (0, -1)
            ),
            wrong(
                f"tokens_per_split is {MAX_SEQLEN + 1}; it must be None or 1 to {MAX_SEQLEN}",
                tokens_per_split=MAX_SEQLEN + 1,
            ),
            wrong(
                "tokens_per_split is 1 for up to 300 keys; at most 256 splits can be merged, so it must be >= 2",
                tokens_per_split=1,
                **long,
            ),
        ],
        "attention_chunk": [
            *not_int("attention_chunk"),
            *(
                wrong(
                    f"attention_chunk is {n}; it must be 0 (off) to {MAX_SEQLEN}",
                    attention_chunk=n,
                )
                for n in (-1, MAX_SEQLEN + 1)
            ),
        ],
        "softcap": [
            *(
                wrong(
                    f"softcap is {value!r}; it must be a number, 0.0 for none",
                    TypeError,
                    softcap=value,
                )
                for value in (None, "30", True, torch.tensor(30.0))
            ),
            *(
                wrong(f"softcap is {value}; it must be 0.0 (off) or a finite cap > 0", softcap=value)
                for value in (-1.0, NAN, float("inf"))
            ),
        ],
    }


def bound(name: str) -> list[Bad]:
    return [
        *not_int(name),
        wrong(f"{name} is -1; it must be None or an upper bound >= 0", **{name: -1}),
    ]
