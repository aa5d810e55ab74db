"""Features through every function: caps, sinks, slopes, chunks and fixed splits."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch

from headfold import shared_prefix
from headfold.problem import Inputs
from tests.cases import NAN, assert_accurate, make
from tests.conftest import Target
from tests.interface.functions import ATTENTION, FUNCTIONS, Run, call, func, kvcache
from tests.interface.tensors import placed, rand

# Fields of Inputs, by the name that the public functions give the argument.
FEATURES: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "attention_chunk": {"attention_chunk": 5},
    "tokens_per_split": {"tokens_per_split": 16},
    "learnable_sink": {"sink": rand(4)},
    "learnable_sink in half precision": {"sink": rand(4).half()},
    "alibi_slopes": {"alibi_slopes": rand(4).abs()},
    "alibi_slopes of each sequence": {"alibi_slopes": rand(2, 4).abs()},
    "all": {
        "softcap": 1.5,
        "attention_chunk": 16,
        "tokens_per_split": 16,
        "sink": rand(4),
        "alibi_slopes": rand(2, 4).abs(),
    },
}

# What three sequences share, which is no field of Inputs: changes where keys are read alone.
SHARED: dict[str, Any] = {"shared_prefix_len": [8, 4], "shared_prefix_groups": [2, 1]}


def given(x: Inputs) -> dict[str, Any]:
    """The feature arguments of x, as the public functions call them."""
    values = {
        "softcap": x.softcap or None,
        "attention_chunk": x.attention_chunk or None,
        "tokens_per_split": x.tokens_per_split or None,
        "learnable_sink": x.sink,
        "alibi_slopes": x.alibi_slopes,
    }
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize(
    ("run", "q_layout", "kv_layout"),
    [
        (func, "dense", "dense"),
        (call, "ragged", "ragged"),
        (call, "dense", "paged"),
        (kvcache, "dense", "paged"),
    ],
    ids=["func", "varlen", "varlen paged", "kvcache"],
)
def test_features(target: Target, run: Run, q_layout: str, kv_layout: str, fields: dict[str, Any]) -> None:
    x = make(
        [2, 2],
        [23, 23] if run is func else [23, 4],
        q_layout=q_layout,
        kv_layout=kv_layout,
        page_size=5,
        causal=True,
        slack=0,
        device=target.device,
    )
    x = dataclasses.replace(x, **placed(fields, target.device))
    factor = 3.0 if x.softcap else 2.0
    out = torch.full(x.out_shape, NAN, device=target.device) if len(fields) > 1 else None
    got, lse = run(x, causal=True, out=out, **given(x))
    assert_accurate(x, got, lse, factor)


def test_a_shared_prefix(target: Target) -> None:
    x = make(
        [2, 2, 2], [23, 14, 9], kv_layout="paged", page_size=4, causal=True, slack=0, device=target.device
    )
    assert x.page_table is not None
    x.page_table[1, :2] = x.page_table[0, :2]
    with shared_prefix.force(True):
        got, lse = kvcache(x, causal=True, **SHARED)
    assert_accurate(x, got, lse)


def test_every_feature_argument_has_a_result_test() -> None:
    x = make([1], [1])
    tested = {name for fields in FEATURES.values() for name in given(dataclasses.replace(x, **fields))}
    tested |= SHARED.keys()
    for function in ATTENTION:
        keyword_only = {
            p.name
            for p in inspect.signature(FUNCTIONS[function]).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        }
        assert keyword_only - {"out", "return_lse", "page_table", "tree_mask"} <= tested


def test_a_sequence_of_fixed_splits_has_the_same_bits_in_any_batch(target: Target) -> None:
    x = make([1, 1, 1], [60, 33, 7], kv_layout="paged", page_size=4, device=target.device)
    out, lse = kvcache(x, tokens_per_split=16)
    assert x.seqused_k is not None
    assert x.page_table is not None
    for i in range(3):
        alone = dataclasses.replace(
            x, q=x.q[i : i + 1], page_table=x.page_table[i : i + 1], seqused_k=x.seqused_k[i : i + 1]
        )
        one, one_lse = kvcache(alone, tokens_per_split=16)
        assert torch.equal(one[0], out[i])
        assert torch.equal(one_lse[0], lse[i])


def test_a_row_without_a_key_gives_zero_and_the_sink(target: Target) -> None:
    x = make([2, 2], [0, 0], slack=0, device=target.device)
    sink = rand(4).to(target.device)
    out, lse = func(x, learnable_sink=sink)
    assert not out.any()
    assert torch.equal(lse, sink.view(1, 4, 1).expand(2, 4, 2))
