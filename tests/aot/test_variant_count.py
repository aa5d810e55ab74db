"""Compiled variants are a budget: each costs a user seconds at the first call, and a test here."""

from __future__ import annotations

import inspect
import itertools
from collections import defaultdict
from typing import Any

import pytest

pytest.importorskip("triton")

from headfold.backends.triton import constants
from headfold.kernels.decode import decode_kernel
from headfold.kernels.fixup import fixup_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.kernels.specialize import FIXUP_INTEGERS, INTEGERS
from headfold.planner import DEVICES, make_plan
from tests.aot.variants import ALL_DIMS
from tests.planner.problems import DTYPES, RATIOS, problem

LIMIT = 24


def sweep() -> Any:
    """Problems that differ in everything that could make another variant, but dtype and head dimensions."""
    for group, sq, layout, aligned, splits in itertools.product(
        RATIOS, (1, 2, 5, 16, 64, 300, 4096), ("dense", "ragged", "paged"), (True, False), (0, 1, 7)
    ):
        for batch, sk, window in ((1, 900, None), (9, 40000, None), (64, 3000, 128)):
            ragged = layout == "ragged"
            yield (
                aligned,
                {
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
                    "num_splits": splits,
                },
            )


@pytest.mark.parametrize("device", ["h200", "a100", "rtx5090"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_variants_of_a_dtype_and_head_dimension_are_few(device: str, dtype: Any) -> None:
    """Distinct constants, warps and stages of each kernel over a broad sweep of problems."""
    for d, dv in ALL_DIMS:
        met: dict[str, set[Any]] = defaultdict(set)
        for aligned, p in sweep():
            plan = make_plan(problem(d=d, head_dim_v=dv, dtype=dtype, **p), DEVICES[device])
            values = constants(plan, d, dv, dtype.itemsize)
            met[plan.kernel].add((*sorted(values.items()), plan.num_warps, plan.num_stages))
        assert set(met) == {"decode", "prefill"}
        assert {kernel: len(variants) for kernel, variants in met.items() if len(variants) >= LIMIT} == {}


@pytest.mark.parametrize("kernel", [decode_kernel, prefill_kernel, fixup_kernel], ids=lambda k: k.fn.__name__)
def test_no_integer_is_specialised_on(kernel: Any) -> None:
    """One not in the list would compile a variant for 1, one for multiples of 16 and one for the rest."""
    listed = FIXUP_INTEGERS if kernel is fixup_kernel else INTEGERS
    kinds = {n: p.annotation for n, p in inspect.signature(kernel.fn).parameters.items()}
    integers = [n for n, kind in kinds.items() if getattr(kind, "name", "") in ("int32", "int64", "uint32")]
    assert sorted(integers) == sorted(listed)
    # What is left are pointers, None or a tensor, floats, and constants in capitals.
    pointers = [n for n, kind in kinds.items() if kind is inspect.Parameter.empty]
    assert set(pointers) <= {
        *("Q", "K", "V", "Out", "Lse", "PartialOut", "PartialLse"),
        *("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "page_table", "cu_seqlens", "seqused"),
    }


@pytest.mark.parametrize("kernel", [decode_kernel, prefill_kernel], ids=lambda k: k.fn.__name__)
def test_the_launchers_constants_are_the_kernels(kernel: Any) -> None:
    """All of them, and no other: a constant with a forgotten value would be a launch error on a GPU only."""
    kind = kernel.fn.__name__.removesuffix("_kernel")
    plan = make_plan(problem(sq=1 if kind == "decode" else 2048, num_splits=1), DEVICES["h200"])
    assert plan.kernel == kind
    wanted = {n for n in inspect.signature(kernel.fn).parameters if n.isupper() and len(n) > 1}
    assert set(constants(plan, 128, 128, 2)) == wanted
