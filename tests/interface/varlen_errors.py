"""The errors of flash_attn_varlen_func."""

from __future__ import annotations

from tests.interface.attention_errors import LONG_K, LONG_V, attention_errors, bound
from tests.interface.bad import (
    BASES,
    PAGES_K,
    PAGES_V,
    TABLE,
    Bad,
    K,
    Q,
    V,
    flag,
    index_tensor,
    inner_stride,
    no_tensor,
    wrong,
)
from tests.interface.tensors import ints

VARLEN = BASES["flash_attn_varlen_func"]


VARLEN_ERRORS: dict[str, list[Bad]] = {
    **attention_errors(
        VARLEN,
        {
            "k": LONG_K.flatten(0, 1),
            "v": LONG_V.flatten(0, 1),
            "cu_seqlens_k": ints(0, 300, 600),
            "max_seqlen_k": 300,
        },
    ),
    "deterministic": flag("deterministic"),
    "return_attn_probs": flag("return_attn_probs"),
    "return_lse": flag("return_lse"),
    "cu_seqlens_q": [
        *index_tensor("cu_seqlens_q", ints(0, 3, 6)),
        wrong("cu_seqlens_q is empty; it must hold batch + 1 offsets", cu_seqlens_q=ints()),
        wrong("q has shape (6, 4, 8); it must be (b, sq, h, d)", cu_seqlens_q=None),
    ],
    "cu_seqlens_k": [
        *index_tensor("cu_seqlens_k", ints(0, 5, 10)),
        wrong("cu_seqlens_k has shape (2); it must be (3) for this batch", cu_seqlens_k=ints(0, 10)),
        wrong("k has shape (10, 2, 8); it must be (b, sk, hk, d)", cu_seqlens_k=None),
    ],
    "seqused_q": [
        *index_tensor("seqused_q", ints(3, 3)),
        wrong("seqused_q has shape (3); it must be (2) for this batch", seqused_q=ints(1, 2, 3)),
    ],
    "seqused_k": [
        *index_tensor("seqused_k", ints(5, 5)),
        wrong("seqused_k has shape (1); it must be (2) for this batch", seqused_k=ints(1)),
        wrong(
            "seqused_k is None; a paged cache needs the length of every sequence",
            k=PAGES_K,
            v=PAGES_V,
            page_table=TABLE,
            cu_seqlens_k=None,
            seqused_k=None,
        ),
    ],
    "max_seqlen_q": [
        *bound("max_seqlen_q"),
        wrong(
            "max_seqlen_q is 2; every sequence has length 3, and it must bound them all",
            q=Q,
            cu_seqlens_q=None,
            max_seqlen_q=2,
            out=None,
        ),
    ],
    "max_seqlen_k": [
        *bound("max_seqlen_k"),
        wrong(
            "max_seqlen_k is 4; every sequence has length 5, and it must bound them all",
            k=K,
            v=V,
            cu_seqlens_k=None,
            max_seqlen_k=4,
        ),
    ],
    "page_table": [
        no_tensor("page_table", [[0]]),
        wrong("k has shape (10, 2, 8); it must be (pages, page_size, hk, d)", page_table=TABLE),
        *(
            wrong(message, k=PAGES_K, v=PAGES_V, page_table=table)
            for message, table in (
                ("page_table has dtype torch.int64; it must be int32", TABLE.long()),
                ("page_table is on meta; it must be on the queries' device cpu", TABLE.to("meta")),
                ("page_table has shape (2); it must be (2, max_pages) for this batch", TABLE[0]),
                ("page_table has shape (1, 2); it must be (2, max_pages) for this batch", TABLE[:1]),
                (
                    "page_table has last stride 2; its last dimension must be contiguous",
                    inner_stride(TABLE),
                ),
            )
        ),
    ],
}
