"""Problems for the planner's tests: one with defaults, and hypothesis strategies for any."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from headfold.planner import DEVICES
from headfold.problem import Problem

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RATIOS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 48)
GPUS = tuple(DEVICES.values())


def problem(
    heads: int = 32,
    kv_heads: int = 8,
    batch: int = 16,
    sq: int = 1,
    sk: int = 8192,
    d: int = 128,
    **other: Any,
) -> Problem:
    """A dense bf16 decode of Llama-3's shape unless told otherwise; totals follow from the bounds."""
    values: dict[str, Any] = {
        "device_type": "cuda",
        "dtype": torch.bfloat16,
        "batch": batch,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": d,
        "head_dim_v": d,
        "max_seqlen_q": sq,
        "max_seqlen_k": sk,
        "total_q": batch * sq,
        "total_k": batch * sk,
    }
    return Problem(**{**values, **other})


@st.composite
def problems(draw: st.DrawFn, max_length: int = 5000) -> Problem:
    """Any problem, empty ones included, but without tokens_per_split, which has its own rules."""
    kv_heads, group = draw(st.integers(1, 16)), draw(st.sampled_from(RATIOS))
    batch = draw(st.integers(0, 40))
    sq = draw(st.one_of(st.integers(0, 8), st.integers(0, max_length)))
    sk = draw(st.integers(0, max_length))
    q_layout = draw(st.sampled_from(("dense", "ragged")))
    kv_layout = draw(st.sampled_from(("dense", "ragged", "paged")))
    side = st.none() | st.integers(0, max_length)
    tensor_mask = draw(st.booleans())
    sizes = (0, 0, 0, 0)
    if tensor_mask and q_layout == kv_layout == "dense" and draw(st.booleans()):
        sizes = (*(draw(st.sampled_from((1, n))) for n in (batch, kv_heads * group, sq)), sk)  # type: ignore[assignment]
    return problem(
        kv_heads * group,
        kv_heads,
        batch,
        sq,
        sk,
        draw(st.integers(1, 256)),
        head_dim_v=draw(st.integers(1, 256)),
        dtype=draw(st.sampled_from(DTYPES)),
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=draw(st.sampled_from((1, 16, 24, 64))) if kv_layout == "paged" else 0,
        total_q=draw(st.integers(min(sq, batch * sq), batch * sq)) if q_layout == "ragged" else batch * sq,
        total_k=draw(st.integers(min(sk, batch * sk), batch * sk)) if kv_layout == "ragged" else batch * sk,
        window_left=draw(side),
        window_right=draw(side),
        bottom_right=draw(st.booleans()),
        lengths_on_device=draw(st.booleans()),
        aligned=draw(st.booleans()),
        tma_strides=draw(st.booleans()),
        softcap=draw(st.booleans()),
        attention_chunk=draw(st.sampled_from((0, 0, 1, 100, 4096))),
        tensor_mask=tensor_mask,
        mask_sizes=sizes,
        featured=draw(st.booleans()),
        rotary=draw(st.booleans()),
        num_splits=draw(st.sampled_from((0, 0, 0, 1, 3, 256))),
        pack_gqa=draw(st.sampled_from((None, True, False))),
        sm_margin=draw(st.sampled_from((0, 0, 8, 1000))),
    )
