"""headfold itself as an implementation: which public function computes a case, with which arguments."""

from __future__ import annotations

from typing import Any

import torch

from headfold.bench.cases import Case
from headfold.bench.features import ALL
from headfold.bench.inputs import CaseInputs
from headfold.bench.measure import Call
from headfold.bench.names import APPENDED, OWN
from headfold.bench.peers import Implementation, Prepare, register


def _headfold(pack_gqa: bool | None = None, shared: bool = True, appends: bool = True) -> Prepare:
    def prepare(case: Case, x: CaseInputs) -> Call:
        import headfold

        f, extra = case.features, x.extra
        options: dict[str, Any] = {
            "causal": case.causal,
            "window_size": (f.window - 1 if f.window else None, None),
            "softcap": f.softcap,
            "learnable_sink": extra.sink,
            "alibi_slopes": extra.slopes,
            "tokens_per_split": f.tokens_per_split or None,
            "pack_gqa": pack_gqa,
        }

        # Queries that are turned already, as an append with angles leaves them.
        turned = x.q if appends else torch.stack([x.turned(one) for one in x.q])

        def appended(i: int) -> Any:
            return headfold.flash_attn_with_kvcache(
                turned, x.k[i], x.v[i], cache_seqlens=x.lengths, **options
            )

        def cached(i: int) -> Any:
            return headfold.flash_attn_with_kvcache(
                x.q,
                x.k[i],
                x.v[i],
                extra.k_new,
                extra.v_new,
                rotary_cos=extra.cos,
                rotary_sin=extra.sin,
                rotary_interleaved=False,
                cache_seqlens=x.lengths if extra.before is None else extra.before,
                page_table=x.page_table,
                tree_mask=extra.tree,
                shared_prefix_len=case.shared if shared else None,
                **options,
            )

        def ragged(i: int) -> Any:
            out: Any = headfold.flash_attn_varlen_func(
                x.q_rows, x.k[i], x.v[i], x.cu_seqlens_q, x.cu_seqlens_k, case.sq, case.sk, **options
            )
            return out.view(case.out_shape)

        def masked(i: int) -> Any:
            q, k, v = (t.transpose(1, 2) for t in (x.q, x.k[i], x.v[i]))
            return headfold.scaled_dot_product_attention(q, k, v, extra.mask, enable_gqa=True).transpose(1, 2)

        def dense(i: int) -> Any:
            return headfold.flash_attn_func(x.q, x.k[i], x.v[i], **options)

        if not appends:
            return appended
        if case.reads_a_cache:
            return cached
        return ragged if case.is_ragged else masked if f.mask else dense

    return prepare


HEADFOLD = register(
    Implementation(
        OWN,
        "this library",
        _headfold(),
        by_default=lambda device_type: True,
        features=ALL,
    )
)
register(
    Implementation(
        "headfold-unpacked",
        "this library with pack_gqa=False: every query head reads K and V for itself",
        _headfold(False),
        applies=lambda case, device_type: device_type == "cuda" and case.is_memory_bound and case.group > 1,
        by_default=lambda device_type: device_type == "cuda",
    )
)
register(
    Implementation(
        "headfold-unshared",
        "this library without shared_prefix_len: every sequence reads the pages that all share",
        _headfold(shared=False),
        applies=lambda case, device_type: case.shared > 0,
        by_default=lambda device_type: device_type == "cuda",
    )
)
register(
    Implementation(
        APPENDED,
        "this library's attention after an append: what the rest of a step that appends takes",
        _headfold(appends=False),
        applies=lambda case, device_type: case.features.append,
        by_default=lambda device_type: device_type == "cuda",
        features=frozenset({"cache", "append", "rotary"}),
        appends=False,
    )
)
