"""The same of options and of the tensors of features, with what several inputs have in common behind it."""

from __future__ import annotations

import dataclasses

import torch

from headfold.problem import (
    MAX_SEQLEN,
)
from tests.cases import NAN, make
from tests.problem import tensor_errors
from tests.problem.calls import (
    FLOATS,
    NO_LAST_STRIDE,
    cast,
    dense,
    featured,
    grown,
    ints,
    moved,
    paged,
    ragged,
    repeated,
    swapped,
    value,
)

ERRORS: tensor_errors.Errors = tensor_errors.ERRORS | {
    "max_seqlen_q": [
        (
            ragged,
            value(max_seqlen_q=-1),
            ValueError,
            "max_seqlen_q is -1; it must be None or an upper bound >= 0",
        ),
        (
            dense,
            value(max_seqlen_q=2),
            ValueError,
            "max_seqlen_q is 2; every sequence has length 3, and it must bound them all",
        ),
    ],
    "max_seqlen_k": [
        (
            paged,
            value(max_seqlen_k=-7),
            ValueError,
            "max_seqlen_k is -7; it must be None or an upper bound >= 0",
        ),
        (
            dense,
            value(max_seqlen_k=4),
            ValueError,
            "max_seqlen_k is 4; every sequence has length 5, and it must bound them all",
        ),
    ],
    "softmax_scale": [
        (
            dense,
            value(softmax_scale=bad),
            ValueError,
            f"softmax_scale is {bad}; it must be None or a finite number",
        )
        for bad in (NAN, float("inf"), float("-inf"))
    ],
    "window_left": [
        (
            dense,
            value(window_left=-2),
            ValueError,
            "window_size has left side -2; a side is None or -1 (open), or >= 0",
        )
    ],
    "window_right": [
        (
            dense,
            value(window_right=-9),
            ValueError,
            "window_size has right side -9; a side is None or -1 (open), or >= 0",
        )
    ],
    "num_splits": [
        (dense, value(num_splits=n), ValueError, f"num_splits is {n}; it must be 0 (automatic) to 256")
        for n in (-1, 257)
    ],
    "sm_margin": [(dense, value(sm_margin=-1), ValueError, "sm_margin is -1; it must be >= 0")],
    "softcap": [
        (dense, value(softcap=n), ValueError, f"softcap is {n}; it must be 0.0 (off) or a finite cap > 0")
        for n in (-1.0, NAN, float("inf"))
    ],
    "attention_chunk": [
        (
            dense,
            value(attention_chunk=n),
            ValueError,
            f"attention_chunk is {n}; it must be 0 (off) to {MAX_SEQLEN}",
        )
        for n in (-1, MAX_SEQLEN + 1)
    ],
    "tokens_per_split": [
        *(
            (
                dense,
                value(tokens_per_split=n),
                ValueError,
                f"tokens_per_split is {n}; it must be None or 1 to {MAX_SEQLEN}",
            )
            for n in (-1, MAX_SEQLEN + 1)
        ),
        (
            lambda: make([1], [513], slack=0),
            value(tokens_per_split=2),
            ValueError,
            "tokens_per_split is 2 for up to 513 keys; at most 256 splits can be merged, so it must be >= 3",
        ),
    ],
    "alibi_slopes": [
        (
            featured,
            lambda x: {"alibi_slopes": x.alibi_slopes[:1]},
            ValueError,
            "alibi_slopes has shape (1, 4); it must be (4,) or (2, 4)",
        ),
        (
            featured,
            cast("alibi_slopes", torch.bfloat16),
            ValueError,
            "alibi_slopes has dtype torch.bfloat16; it must be float32",
        ),
    ],
    "sink": [
        (
            featured,
            value(sink=torch.ones(2)),
            ValueError,
            "learnable_sink has shape (2,); it must be (4,)",
        ),
        (
            featured,
            cast("sink", torch.float64),
            ValueError,
            f"learnable_sink has dtype torch.float64; {FLOATS}",
        ),
    ],
    "mask": [
        (featured, value(mask=[0.0]), TypeError, "mask is a list; it must be a torch.Tensor"),
        (
            featured,
            cast("mask", torch.int32),
            ValueError,
            "mask has dtype torch.int32; it must be bool, float16, bfloat16 or float32",
        ),
        (featured, moved("mask"), ValueError, "mask is on meta; it must be on the queries' device cpu"),
        (
            featured,
            lambda x: {"mask": x.mask[:, :1]},
            ValueError,
            "mask has shape (2, 1, 3, 5); it must be (b, h, sq, sk) = (2, 4, 3, 5)",
        ),
        *(
            (
                base,
                value(mask=torch.zeros(2, 4, 3, 5)),
                ValueError,
                "mask is given for a ragged or paged call; q, k and v must be dense",
            )
            for base in (ragged, paged)
        ),
    ],
    "tree_mask": [
        (featured, value(tree_mask=True), TypeError, "tree_mask is a bool; it must be a torch.Tensor"),
        (
            featured,
            cast("tree_mask", torch.uint8),
            ValueError,
            "tree_mask has dtype torch.uint8; it must be bool (or packed bits, uint8)",
        ),
        (
            featured,
            moved("tree_mask"),
            ValueError,
            "tree_mask is on meta; it must be on the queries' device cpu",
        ),
        (
            featured,
            lambda x: {"tree_mask": x.tree_mask[:, :2, :2]},
            ValueError,
            "tree_mask has shape (2, 2, 2); it must be (b, sq, sq) = (2, 3, 3)",
        ),
        (featured, swapped("tree_mask"), ValueError, f"tree_mask has last stride 3; {NO_LAST_STRIDE}"),
    ],
    "cache_batch_idx": [
        (
            featured,
            value(cache_batch_idx=ints(1)),
            ValueError,
            "cache_batch_idx has shape (1,); it must be (2,)",
        ),
        (
            ragged,
            value(cache_batch_idx=ints(1, 0)),
            ValueError,
            "cache_batch_idx is given with cu_seqlens_k; it belongs to a dense or paged cache",
        ),
    ],
    "cache_leftpad": [
        (
            featured,
            value(cache_leftpad=ints(1, 1, 1)),
            ValueError,
            "cache_leftpad has shape (3,); it must be (2,)",
        ),
        (
            ragged,
            value(cache_leftpad=ints(1, 0)),
            ValueError,
            "cache_leftpad is given with cu_seqlens_k; it belongs to a dense or paged cache",
        ),
    ],
    "early_lengths": [
        (
            grown,
            value(early_lengths=ints(1, 1, 1)),
            ValueError,
            "early_lengths has shape (3,); it must be (2,)",
        ),
        (
            grown,
            value(seqused_k=None),
            ValueError,
            "early_lengths is given without seqused_k; it tells what that will hold",
        ),
    ],
    "early_new": [
        (grown, value(early_new=-1), ValueError, f"early_new is -1; it must be 0 to {MAX_SEQLEN}"),
        (grown, value(early_lengths=None), ValueError, "early_new is 2; it is added to early_lengths"),
    ],
    "rotary_cos": [],
    "rotary_sin": [
        (
            featured,
            lambda x: {"rotary_sin": x.rotary_sin[1:]},
            ValueError,
            "rotary_sin is (8, 3) torch.float32 with strides (3, 1); it must be laid out as rotary_cos, "
            "(9, 3) torch.float32",
        ),
        (
            lambda: dataclasses.replace(
                featured(), q=dense().q.half(), k=dense().k.half(), v=dense().v.half()
            ),
            cast("rotary_sin", torch.float16),
            ValueError,
            "rotary_sin is (9, 3) torch.float16 with strides (3, 1); it must be laid out as rotary_cos, "
            "(9, 3) torch.float32",
        ),
    ],
    "rotary_positions": [
        (
            featured,
            value(rotary_positions=None),
            ValueError,
            "rotary_positions is None; rotary_cos needs the position of every sequence",
        ),
        (
            featured,
            value(rotary_positions=ints(1)),
            ValueError,
            "rotary_positions has shape (1,); it must be (2,)",
        ),
    ],
}
for _name in ("rotary_cos", "rotary_sin"):
    ERRORS[_name] += [
        (
            featured,
            value(**{_name: None}),
            ValueError,
            f"{_name} is None; rotary_cos and rotary_sin come together",
        ),
        (featured, value(**{_name: 1.0}), TypeError, f"{_name} is a float; it must be a torch.Tensor"),
        (
            featured,
            cast(_name, torch.float16),
            ValueError,
            f"{_name} has dtype torch.float16; it must be torch.float32",
        ),
        (
            lambda: dataclasses.replace(
                featured(), q=dense().q.half(), k=dense().k.half(), v=dense().v.half()
            ),
            cast(_name, torch.bfloat16),
            ValueError,
            f"{_name} has dtype torch.bfloat16; it must be torch.float16 or torch.float32",
        ),
        (featured, moved(_name), ValueError, f"{_name} is on meta; it must be on the queries' device cpu"),
        (
            featured,
            lambda x, name=_name: {name: torch.ones(9, 9)},
            ValueError,
            f"{_name} has shape (9, 9); it must be (max_len, rotary_dim / 2) with rotary_dim <= 16",
        ),
        (featured, swapped(_name), ValueError, f"{_name} has last stride 9; {NO_LAST_STRIDE}"),
    ]
for _name in ("sink", "alibi_slopes", "cache_batch_idx", "cache_leftpad", "rotary_positions"):
    _called = "learnable_sink" if _name == "sink" else _name
    ERRORS[_name] += [
        (featured, value(**{_name: 7}), TypeError, f"{_called} is a int; it must be a torch.Tensor"),
        (featured, moved(_name), ValueError, f"{_called} is on meta; it must be on the queries' device cpu"),
        (featured, repeated(_name), ValueError, f"{_called} has last stride 2; {NO_LAST_STRIDE}"),
    ]
for _name in ("cache_batch_idx", "cache_leftpad", "rotary_positions"):
    ERRORS[_name].append(
        (featured, cast(_name, torch.int64), ValueError, f"{_name} has dtype torch.int64; it must be int32")
    )
ERRORS["early_lengths"] += [
    (grown, value(early_lengths=7), TypeError, "early_lengths is a int; it must be a torch.Tensor"),
    (
        grown,
        moved("early_lengths"),
        ValueError,
        "early_lengths is on meta; it must be on the queries' device cpu",
    ),
    (grown, repeated("early_lengths"), ValueError, f"early_lengths has last stride 2; {NO_LAST_STRIDE}"),
    (
        grown,
        cast("early_lengths", torch.int64),
        ValueError,
        "early_lengths has dtype torch.int64; it must be int32",
    ),
]
for _name in ("sink", "alibi_slopes", "mask", "rotary_cos", "rotary_sin"):
    ERRORS[_name].append(
        (
            featured,
            lambda x, name=_name: {name: getattr(x, name).clone().requires_grad_()},
            NotImplementedError,
            f"{'learnable_sink' if _name == 'sink' else _name} requires a gradient, and headfold has no backward "
            "yet; call it under torch.no_grad() or detach the inputs",
        )
    )
