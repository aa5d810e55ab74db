"""Invalid tensors and lengths, and the error of each.

(layout, change, exception, the whole message after the caller's name), by input.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from headfold.problem import (
    MAX_GROUP,
    MAX_HEAD_DIM,
    MAX_SEQLEN,
    Inputs,
)
from tests.cases import make
from tests.problem.calls import (
    INT32,
    NO_LAST_STRIDE,
    Change,
    cast,
    dense,
    ints,
    moved,
    paged,
    ragged,
    swapped,
    value,
)

Errors = dict[str, list[tuple[Callable[[], Inputs], Change, type[Exception], str]]]

ERRORS: Errors = {
    "q": [
        (dense, value(q=None), TypeError, "q is a NoneType; it must be a torch.Tensor"),
        (
            dense,
            cast("q", torch.int32),
            ValueError,
            "q has dtype torch.int32; it must be float16, bfloat16 or float32",
        ),
        (
            dense,
            cast("q", torch.float64),
            ValueError,
            "q has dtype torch.float64; it must be float16, bfloat16 or float32",
        ),
        (dense, swapped("q"), ValueError, f"q has last stride 4; {NO_LAST_STRIDE}"),
        (dense, value(q=torch.tensor(1.0)), ValueError, "q has shape (); it must be (b, sq, h, d)"),
        (
            dense,
            lambda x: {"q": x.q.flatten(0, 1)},
            ValueError,
            "q has shape (6, 4, 16); it must be (b, sq, h, d)",
        ),
        (
            ragged,
            lambda x: {"q": x.q[None]},
            ValueError,
            "q has shape (1, 9, 4, 16); it must be (total_q, h, d), since cu_seqlens_q is given",
        ),
        (dense, lambda x: {"q": x.q[:, :, :0]}, ValueError, "q has no heads; at least one head is needed"),
        (
            dense,
            lambda x: {"q": x.q[:, :, :3]},
            ValueError,
            "q has 3 heads; that must be a multiple of the 2 KV heads",
        ),
        (
            ragged,
            lambda x: {"q": x.q[:, :1]},
            ValueError,
            "q has 1 heads; that must be a multiple of the 2 KV heads",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 2 * MAX_GROUP + 2, 16)),
            ValueError,
            f"q has {MAX_GROUP + 1} heads per KV head; at most {MAX_GROUP} are supported",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 4, 0), k=torch.empty(2, 5, 2, 0)),
            ValueError,
            f"q has head dimension 0; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            value(q=torch.empty(2, 3, 4, 257), k=torch.empty(2, 5, 2, 257)),
            ValueError,
            f"q has head dimension 257; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            value(
                q=torch.empty(16).expand(2, MAX_SEQLEN + 1, 4, 16),
            ),
            ValueError,
            f"q has shape (2, {MAX_SEQLEN + 1}, 4, 16); a sequence may have at most {MAX_SEQLEN} queries",
        ),
        (
            ragged,
            value(
                q=torch.empty(16).expand(MAX_SEQLEN + 1, 4, 16),
            ),
            ValueError,
            f"q has shape ({MAX_SEQLEN + 1}, 4, 16); a sequence may have at most {MAX_SEQLEN} queries",
        ),
        (
            dense,
            lambda x: {"q": x.q.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "k": [
        (dense, value(k=[1.0]), TypeError, "k is a list; it must be a torch.Tensor"),
        (
            dense,
            cast("k", torch.float64),
            ValueError,
            "k has dtype torch.float64; it must be float16, bfloat16 or float32",
        ),
        (
            paged,
            cast("k", torch.float16),
            ValueError,
            "k has dtype torch.float16; it must have the queries' dtype torch.float32",
        ),
        (ragged, moved("k"), ValueError, "k is on meta; it must be on the queries' device cpu"),
        (dense, swapped("k"), ValueError, f"k has last stride 2; {NO_LAST_STRIDE}"),
        (
            dense,
            lambda x: {"k": x.k[0]},
            ValueError,
            "k has shape (5, 2, 16); it must be (b, sk, hk, d)",
        ),
        (
            ragged,
            lambda x: {"k": x.k[None]},
            ValueError,
            "k has shape (1, 13, 2, 16); it must be (total_k, hk, d), since cu_seqlens_k is given",
        ),
        (
            paged,
            lambda x: {"k": x.k[0]},
            ValueError,
            "k has shape (4, 2, 16); it must be (pages, page_size, hk, d), since page_table is given",
        ),
        (
            paged,
            lambda x: {"k": x.k[:, :0], "v": x.v[:, :0]},
            ValueError,
            "k has shape (6, 0, 2, 16); page_size must be at least 1",
        ),
        (
            dense,
            lambda x: {"k": x.k[:1], "v": x.v[:1]},
            ValueError,
            "k has batch 1; it must have the queries' batch 2",
        ),
        (
            dense,
            lambda x: {"k": x.k[:, :, :0], "v": x.v[:, :, :0]},
            ValueError,
            "k has no heads; at least one head is needed",
        ),
        (
            dense,
            lambda x: {"k": x.k[..., :8]},
            ValueError,
            "k has head dimension 8; it must equal the queries' head dimension 16",
        ),
        (
            dense,
            value(
                k=torch.empty(16).expand(2, MAX_SEQLEN + 1, 2, 16),
                v=torch.empty(16).expand(2, MAX_SEQLEN + 1, 2, 16),
            ),
            ValueError,
            f"k allows {MAX_SEQLEN + 1} keys; a sequence may have at most {MAX_SEQLEN}",
        ),
        (
            ragged,
            value(
                k=torch.empty(16).expand(MAX_SEQLEN + 1, 2, 16),
                v=torch.empty(16).expand(MAX_SEQLEN + 1, 2, 16),
            ),
            ValueError,
            f"k allows {MAX_SEQLEN + 1} keys; a sequence may have at most {MAX_SEQLEN}",
        ),
        (
            dense,
            lambda x: {"k": x.k.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "v": [
        (dense, value(v=3), TypeError, "v is a int; it must be a torch.Tensor"),
        (
            dense,
            cast("v", torch.bool),
            ValueError,
            "v has dtype torch.bool; it must be float16, bfloat16 or float32",
        ),
        (
            dense,
            cast("v", torch.bfloat16),
            ValueError,
            "v has dtype torch.bfloat16; it must have the queries' dtype torch.float32",
        ),
        (paged, moved("v"), ValueError, "v is on meta; it must be on the queries' device cpu"),
        (ragged, swapped("v"), ValueError, f"v has last stride 2; {NO_LAST_STRIDE}"),
        (
            dense,
            lambda x: {"v": x.v[0, 0]},
            ValueError,
            "v has shape (2, 16); it must be (b, sk, hk, d)",
        ),
        (
            ragged,
            lambda x: {"v": x.v[:5]},
            ValueError,
            "v has shape (5, 2, 16); all but its last size must equal k's (13, 2, 16)",
        ),
        (
            dense,
            lambda x: {"v": x.v[:, :, :1]},
            ValueError,
            "v has shape (2, 5, 1, 16); all but its last size must equal k's (2, 5, 2, 16)",
        ),
        (
            dense,
            value(v=torch.empty(2, 5, 2, 257)),
            ValueError,
            f"v has head dimension 257; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            lambda x: {"v": x.v[..., :0]},
            ValueError,
            f"v has head dimension 0; it must be 1 to {MAX_HEAD_DIM}",
        ),
        (
            dense,
            lambda x: {"v": x.v.clone().requires_grad_()},
            NotImplementedError,
            "an input requires a gradient, and headfold has no backward yet; "
            "call it under torch.no_grad() or detach the inputs",
        ),
    ],
    "cu_seqlens_q": [
        (
            ragged,
            value(cu_seqlens_q=torch.tensor(3, dtype=torch.int32)),
            ValueError,
            "cu_seqlens_q has shape (); it must be (batch + 1) for this batch",
        ),
        (
            ragged,
            value(cu_seqlens_q=ints()),
            ValueError,
            "cu_seqlens_q is empty; it must hold batch + 1 offsets",
        ),
        (
            lambda: make([3, 3], [5, 5], q_layout="ragged", slack=0),
            value(cu_seqlens_q=ints(0, 3)),
            ValueError,
            "k has batch 2; it must have the queries' batch 1",
        ),
    ],
    "cu_seqlens_k": [
        (
            ragged,
            value(cu_seqlens_k=ints(0, 13)),
            ValueError,
            "cu_seqlens_k has shape (2); it must be (3) for this batch",
        ),
        (
            ragged,
            value(cu_seqlens_k=ints()),
            ValueError,
            "cu_seqlens_k has shape (0); it must be (3) for this batch",
        ),
    ],
    "seqused_q": [
        (
            ragged,
            value(seqused_q=ints(1)),
            ValueError,
            "seqused_q has shape (1); it must be (2) for this batch",
        ),
        (
            dense,
            value(seqused_q=ints(1, 2)[None]),
            ValueError,
            "seqused_q has shape (1, 2); it must be (2) for this batch",
        ),
    ],
    "seqused_k": [
        (
            paged,
            value(seqused_k=ints(1, 2, 3)),
            ValueError,
            "seqused_k has shape (3); it must be (2) for this batch",
        ),
        (
            paged,
            value(seqused_k=None),
            ValueError,
            "seqused_k is None; a paged cache needs the length of every sequence",
        ),
    ],
    "page_table": [
        (paged, value(page_table=[[0]]), TypeError, "page_table is a list; it must be an int32 tensor"),
        (
            paged,
            cast("page_table", torch.int64),
            ValueError,
            "page_table has dtype torch.int64; it must be int32",
        ),
        (
            paged,
            moved("page_table"),
            ValueError,
            "page_table is on meta; it must be on the queries' device cpu",
        ),
        (
            paged,
            lambda x: {"page_table": x.page_table[0]},
            ValueError,
            "page_table has shape (3); it must be (2, max_pages) for this batch",
        ),
        (
            paged,
            lambda x: {"page_table": x.page_table[:1]},
            ValueError,
            "page_table has shape (1, 3); it must be (2, max_pages) for this batch",
        ),
        (paged, swapped("page_table"), ValueError, f"page_table has last stride 2; {NO_LAST_STRIDE}"),
    ],
}
for _name in INT32:
    ERRORS[_name] += [
        (ragged, value(**{_name: [0, 3]}), TypeError, f"{_name} is a list; it must be an int32 tensor"),
        (ragged, cast(_name, torch.int64), ValueError, f"{_name} has dtype torch.int64; it must be int32"),
        (ragged, moved(_name), ValueError, f"{_name} is on meta; it must be on the queries' device cpu"),
        (
            ragged,
            lambda x, name=_name: {name: getattr(x, name).repeat_interleave(2)[::2]},
            ValueError,
            f"{_name} has last stride 2; {NO_LAST_STRIDE}",
        ),
    ]
