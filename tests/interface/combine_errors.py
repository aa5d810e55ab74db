"""The errors of flash_attn_combine."""

from __future__ import annotations

import torch

from tests.interface.bad import BASES, GRAD, Bad, contiguous, flag, index_tensor, no_tensor, wrong
from tests.interface.tensors import ints

COMBINE = BASES["flash_attn_combine"]
PARTIALS, LSES = COMBINE["out_partial"], COMBINE["lse_partial"]
RAGGED_PARTIALS = {"out_partial": PARTIALS.flatten(1, 2), "lse_partial": LSES.flatten(1, 2), "out": None}


COMBINE_ERRORS: dict[str, list[Bad]] = {
    "out_partial": [
        no_tensor("out_partial", [1.0], optional=False),
        wrong("out_partial has dtype torch.int32; it must be", out_partial=PARTIALS.int()),
        wrong("out_partial has dtype torch.float64; it must be", out_partial=PARTIALS.double()),
        wrong("out_partial has shape (5, 4, 8); it must be (splits, b", out_partial=PARTIALS[0, 0]),
        wrong(
            "out_partial has shape (3, 2, 5, 4, 8); it must be (splits, total, h, d)",
            cu_seqlens=ints(0, 2),
        ),
        wrong("out_partial has 0 splits; 1 to 256 can be merged", out_partial=PARTIALS[:0]),
        wrong(
            "out_partial has 257 splits; 1 to 256 can be merged",
            out_partial=PARTIALS[:1].repeat_interleave(257, 0),
        ),
        wrong(
            "out_partial has head dimension 257; it must be 1 to 256",
            out_partial=PARTIALS[..., :1].repeat_interleave(257, -1),
        ),
        wrong("out_partial has head dimension 0; it must be 1 to 256", out_partial=PARTIALS[..., :0]),
        contiguous("out_partial", PARTIALS),
        wrong(GRAD, NotImplementedError, out_partial=PARTIALS.clone().requires_grad_()),
    ],
    "lse_partial": [
        no_tensor("lse_partial", None, optional=False),
        wrong("lse_partial has dtype torch.float16; it must be float32", lse_partial=LSES.half()),
        wrong("lse_partial is on meta; it must be on out_partial's device cpu", lse_partial=LSES.to("meta")),
        wrong(
            "lse_partial has shape (3, 2, 4, 5); it must be out_partial's without its last size, (3, 2, 5, 4)",
            lse_partial=LSES.transpose(2, 3),
        ),
        wrong(GRAD, NotImplementedError, lse_partial=LSES.clone().requires_grad_()),
    ],
    "out": [
        no_tensor("out"),
        wrong("out has shape (2, 5, 4, 7); it must be (2, 5, 4, 8)", out=PARTIALS[0, ..., :7].clone()),
        wrong(
            "out has dtype torch.float64; it must be float16 or bfloat16 or float32",
            out=PARTIALS[0].double(),
        ),
        wrong("out is on meta; it must be on out_partial's device cpu", out=PARTIALS[0].to("meta")),
        contiguous("out", PARTIALS[0]),
        wrong("out is expanded (a stride is 0)", out=PARTIALS[0, :1].clone().expand(2, 5, 4, 8)),
    ],
    "out_dtype": [
        wrong("out_dtype is 'float16'; it must be None or a torch.dtype", TypeError, out_dtype="float16"),
        wrong("out_dtype is torch.int32; it must be None, float16", out_dtype=torch.int32, out=None),
        wrong("out_dtype is torch.float64; it must be None, float16", out_dtype=torch.float64, out=None),
        wrong(
            "out_dtype is torch.float16; with out given it must be None or torch.float32",
            out_dtype=torch.float16,
        ),
    ],
    "cu_seqlens": [
        *index_tensor("cu_seqlens", ints(0, 5, 10), "out_partial's device", **RAGGED_PARTIALS)[:3],
        wrong("cu_seqlens has shape (); it must be (batch + 1,)", **RAGGED_PARTIALS, cu_seqlens=ints(0)[0]),
        wrong("cu_seqlens has shape (0,); it must be (batch + 1,)", **RAGGED_PARTIALS, cu_seqlens=ints()),
        wrong(
            "cu_seqlens has last stride 2; its last dimension must be contiguous",
            **RAGGED_PARTIALS,
            cu_seqlens=ints(0, 0, 5, 5, 10, 10)[::2],
        ),
    ],
    "seqused": [
        no_tensor("seqused", [5, 5]),
        wrong("seqused has dtype torch.int64; it must be int32", seqused=ints(5, 5).long()),
        wrong("seqused is on meta; it must be on out_partial's device cpu", seqused=ints(5, 5).to("meta")),
        wrong("seqused has shape (3,); it must be (2,)", seqused=ints(5, 5, 5)),
        wrong("seqused has last stride 2; its last dimension", seqused=ints(5, 5, 5, 5)[::2]),
        wrong("seqused is given without cu_seqlens", **RAGGED_PARTIALS, seqused=ints(5, 5)),
    ],
    "return_lse": flag("return_lse"),
}
