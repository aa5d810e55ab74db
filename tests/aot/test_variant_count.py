"""Compiled variants are a budget: each costs a user seconds at the first call, and a test here."""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

from headfold.backends.triton import constants
from headfold.kernels.append import APPEND_INTEGERS, append_kernel
from headfold.kernels.decode import decode_kernel
from headfold.kernels.fixup import fixup_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.kernels.specialize import FIXUP_INTEGERS, INTEGERS
from headfold.planner import DEVICES, make_plan
from tests.aot.variants import ALL_DIMS
from tests.planner.problems import DTYPES, RATIOS, problem

LIMIT = 24
# Plain calls and each feature alone together: 310 (float32) to 486 a head dimension, of which a user meets a few.
IN_ALL = 600
# kernel -> the integers it is told not to specialise on
LISTED = {
    decode_kernel: INTEGERS,
    prefill_kernel: INTEGERS,
    fixup_kernel: FIXUP_INTEGERS,
    append_kernel: APPEND_INTEGERS,
}
# What a call adds, as the planner sees it, and the pointers that come with it: each pointer is None or not, and each
# dtype of one is a variant too.
FEATURES: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    "softcap": [({"softcap": True}, ())],
    "sink": [({}, ("Sink",))],
    "chunk": [({"attention_chunk": n}, ()) for n in (1, 1024)],
    "slopes": [({}, ("Slopes",))],
    "added mask": [({"tensor_mask": True, "mask_align": n}, ("Mask",)) for n in (0, 1, 4, 8)],
    "bool mask": [({"tensor_mask": True, "mask_align": n}, ("bool Mask",)) for n in (0, 1, 16)],
    "tree": [({"tensor_mask": True}, ("Tree",))],
    "rows": [({}, names) for names in (("row",), ("pad",), ("row", "pad"))],
    "rotary": [({"rotary": (64, pairs, n)}, ("Cos",)) for pairs in (True, False) for n in (1, 4, 8)],
    "fixed splits": [({"tokens_per_split": n}, ()) for n in (256, 4096)],
}


def sweep() -> Iterator[dict[str, Any]]:
    """Problems that differ in everything that could make another variant, but dtype and head dimensions."""
    for group, sq, layout, (aligned, tma), splits in itertools.product(
        RATIOS,
        (1, 2, 5, 16, 64, 300, 4096),
        ("dense", "ragged", "paged"),
        ((True, True), (True, False), (False, False)),
        (0, 1, 7),
    ):
        for batch, sk, window in ((1, 900, None), (9, 40000, None), (64, 3000, 128)):
            ragged = layout == "ragged"
            yield {
                "heads": 2 * group,
                "kv_heads": 2,
                "batch": batch,
                "sq": sq,
                "sk": sk,
                # A ragged batch of one long and many short sequences searches, one of equal ones may not.
                "total_q": sq + 2 * (batch - 1) if ragged and splits != 1 else batch * sq,
                "q_layout": "ragged" if ragged else "dense",
                "kv_layout": layout,
                "page_size": 16 if layout == "paged" else 0,
                "window_left": window,
                "aligned": aligned,
                "tma_strides": tma,
                "num_splits": splits,
            }


def variants_of(
    d: int, dv: int, dtype: Any, device: str, shapes: Iterable[Any], **change: Any
) -> dict[str, set[Any]]:
    """kernel -> the distinct constants, warps and stages that the problems of a sweep are run with."""
    met: dict[str, set[Any]] = defaultdict(set)
    for p in shapes:
        plan = make_plan(problem(d=d, head_dim_v=dv, dtype=dtype, **{**p, **change}), DEVICES[device])
        values = constants(plan, d, dv, dtype.itemsize)
        met[plan.kernel].add((*sorted(values.items()), plan.num_warps, plan.num_stages))
    return met


@pytest.mark.parametrize("device", ["h200", "a100", "rtx5090"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_of_a_dtype_and_head_dimension_are_few(device: str, dtype: Any) -> None:
    """Distinct constants, warps and stages of each kernel over a broad sweep of problems."""
    for d, dv in ALL_DIMS:
        met = variants_of(d, dv, dtype, device, sweep())
        assert set(met) == {"decode", "prefill"}
        assert {kernel: len(variants) for kernel, variants in met.items() if len(variants) >= LIMIT} == {}


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
@pytest.mark.parametrize("d", [64, 80, 128])
def test_variants_of_a_feature_are_few(d: int, dtype: Any) -> None:
    """Each value of a feature's constants, alone, has as few variants as plain calls: features do not multiply tiles.

    In all (plain and each feature alone, told apart by their pointers too) that bounds what a user ever compiles.
    """
    # Features do not meet layouts, lengths or splits in the planner: a coarser sweep will do.
    shapes = [p for p in sweep() if p["heads"] in (2, 8, 24, 96) and p["num_splits"] != 7]
    everything: set[Any] = set()
    for change, pointers in [({}, ()), *(value for values in FEATURES.values() for value in values)]:
        met = variants_of(d, d, dtype, "h200", shapes, **change)
        assert {kernel: len(found) for kernel, found in met.items() if len(found) >= LIMIT} == {}, change
        everything |= {(kernel, pointers, v) for kernel, found in met.items() for v in found}
    assert len(everything) < IN_ALL


@pytest.mark.parametrize("kernel", LISTED, ids=lambda k: k.fn.__name__)
def test_no_integer_is_specialised_on(kernel: Any) -> None:
    """One not in the list would compile a variant for 1, one for multiples of 16 and one for the rest."""
    listed = LISTED[kernel]
    kinds = {n: p.annotation for n, p in inspect.signature(kernel.fn).parameters.items()}
    integers = [n for n, kind in kinds.items() if getattr(kind, "name", "") in ("int32", "int64", "uint32")]
    assert sorted(integers) == sorted(listed)
    # What is left are pointers, None or a tensor, floats, and constants in capitals.
    pointers = [n for n, kind in kinds.items() if kind is inspect.Parameter.empty]
    assert set(pointers) <= {
        *("Q", "K", "V", "Out", "Lse", "PartialOut", "PartialLse"),
        *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "cu_seqlens", "seqused"),
        *("Sink", "Slopes", "Mask", "Tree", "cache_batch_idx", "cache_leftpad"),
        *("rotary_cos", "rotary_sin", "rotary_positions"),
        *("KCache", "VCache", "Lengths", "Cos", "Sin", "cache_seqlens", "cu_seqlens_k_new", "rotary_seqlens"),
    }


@pytest.mark.parametrize("kernel", [decode_kernel, prefill_kernel], ids=lambda k: k.fn.__name__)
def test_the_launchers_constants_are_the_kernels(kernel: Any) -> None:
    """All of them, and no other: a constant with a forgotten value would be a launch error on a GPU only."""
    kind = kernel.fn.__name__.removesuffix("_kernel")
    plan = make_plan(problem(sq=1 if kind == "decode" else 2048, num_splits=1), DEVICES["h200"])
    assert plan.kernel == kind
    wanted = {n for n in inspect.signature(kernel.fn).parameters if n.isupper() and len(n) > 1}
    assert set(constants(plan, 128, 128, 2)) == wanted
