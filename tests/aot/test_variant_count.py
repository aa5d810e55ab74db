"""Compiled variants are a budget: each costs a user seconds at the first call, and a test here."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from headfold import backends
from headfold.appending import appended, takes_new_tokens
from headfold.backends import triton as launcher
from headfold.backends.triton import constants
from headfold.kernels.append import APPEND_ARGUMENTS, append_kernel
from headfold.kernels.decode import decode_kernel
from headfold.kernels.fixup import fixup_kernel
from headfold.kernels.mask_blocks import mask_blocks_kernel
from headfold.kernels.merge import merge_kernel
from headfold.kernels.prefill import prefill_kernel
from headfold.kernels.specialize import (
    DECODE_ARGUMENTS,
    FIXUP_INTEGERS,
    MASK_BLOCKS_ARGUMENTS,
    MERGE_ARGUMENTS,
    PREFILL_ARGUMENTS,
)
from headfold.planner import DEVICES, Device, Plan, gpu, make_plan
from headfold.planner.tuned import ROWS, Entry
from headfold.problem import Inputs
from tests.aot.variants import ALL_DIMS
from tests.planner.problems import DTYPES, RATIOS, problem

LIMIT = 24
# kernel -> the arguments it is told not to specialise on
LISTED = {
    decode_kernel: DECODE_ARGUMENTS,
    merge_kernel: MERGE_ARGUMENTS,
    prefill_kernel: PREFILL_ARGUMENTS,
    mask_blocks_kernel: MASK_BLOCKS_ARGUMENTS,
    fixup_kernel: FIXUP_INTEGERS,
    append_kernel: APPEND_ARGUMENTS,
}
# All that the planner is told of features, and their combinations: the rest are values of arguments.
FEATURES: list[dict[str, Any]] = [
    {},
    *(
        {"featured": True, "tensor_mask": mask, "rotary": rotary, "softcap": cap}
        for mask, rotary, cap in itertools.product((False, True), repeat=3)
    ),
    *(
        {"featured": True, "tensor_mask": True, "wide_mask": size, "rotary": r}
        for size in (1, 2, 4)
        for r in (False, True)
    ),
]
FEATURES += [
    {**f, **more} for f in FEATURES[:3] for more in ({"tokens_per_split": 4096}, {"attention_chunk": 700})
]


@pytest.fixture(autouse=True)
def remembered_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep asks for some hundred tiles, each thousands of times: a tile is a function of what is asked, and choosing one
    takes half of a plan's time."""
    for name in ("decode_tile", "prefill_tile", "shared_memory", "padded", "split_dim", "choose_splits"):
        monkeypatch.setattr(gpu, name, functools.cache(getattr(gpu, name)))


def sweep() -> Iterator[dict[str, Any]]:
    """Problems that differ in everything that could make another variant, but dtype and head dimensions."""
    for group, sq, layout, (aligned, tma), splits in itertools.product(
        RATIOS,
        (1, 2, 5, 16, 64, 300, 4096),
        ("dense", "ragged", "paged"),
        ((True, True), (True, False), (False, False)),
        (0, 1, 7),
    ):
        # The last: many equal sequences that are short.
        for batch, sk, window in ((1, 900, None), (9, 40000, None), (64, 3000, 128), (128, 2048, None)):
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
                "lengths_on_device": layout != "dense" or (window is None and batch != 128),
            }


def key_of(plan: Plan, d: int, dv: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """What makes another compiled program: constants, warps, stages and how it is launched."""
    values = constants(plan, d, dv, dtype)
    # The test session interprets, where nothing is launched early.
    values["EARLY"] = plan.early
    return (*values.values(), plan.num_warps, plan.num_stages)


def variants_of(d: int, dv: int, dtype: Any, device: Device) -> dict[str, set[Any]]:
    """kernel -> the distinct programs that every problem of the sweep, under all features, is run with."""
    met: dict[str, set[Any]] = defaultdict(set)
    for p in sweep():
        # Features change the tile's shape, not how ratios, lengths and splits lead to it: a coarser sweep for them. It finds
        # every program that the whole product does, in 55% of the calls.
        few = p["heads"] in (2, 8, 96) and p["sq"] in (1, 16, 64, 300)
        few = few and p["num_splits"] != 7 and p["window_left"] is None
        for change in FEATURES if few else FEATURES[:1]:
            # What the Gluon kernel of a GPU takes, the Triton kernel runs elsewhere, and for calls with an extra.
            x = problem(d=d, head_dim_v=dv, dtype=dtype, extras=("an extra",), **{**p, **change})
            plan = make_plan(x, device)
            met[plan.kernel].add(key_of(plan, d, dv, dtype))
            if takes_new_tokens(plan, device):
                # One more: a model's calls are all rotated alike, or none is.
                met[plan.kernel].add(key_of(appended(plan), d, dv, dtype))
    return met


# Tiles depend on a dtype's size: float16's are bfloat16's, on one device as on another.
@pytest.mark.parametrize(
    ("dtype", "device"),
    [
        (dtype, d)
        for dtype in DTYPES
        for d in ("h200", "a100", "rtx5090")
        if dtype != torch.float16 or d == "h200"
    ],
    ids=str,
)
def test_variants_of_a_dtype_and_head_dimension_are_few(dtype: Any, device: str) -> None:
    """Over layouts, ratios, lengths, alignments and every combination of features."""
    for d, dv in ALL_DIMS:
        met = variants_of(d, dv, dtype, DEVICES[device])
        assert set(met) == {"decode", "prefill"}
        counts = {kernel: len(programs) for kernel, programs in met.items()}
        assert {k: n for k, n in counts.items() if n >= LIMIT} == {}, (d, dv)


@pytest.mark.parametrize("device", ["h200", "a100"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_variants_are_few_in_a_machines_own_tiles_too(device: str, d: int) -> None:
    """Where no two of its tiles have the same keys, warps and stages: still one for each form and rows."""
    shapes = itertools.product((16, 32), (1, 2, 4, 8))
    tiles = {(f, n): next(shapes) for f, rows in ROWS.items() if f != "pages" for n in rows}
    tiles |= {("pages", n): tiles["stream", n] for n in ROWS["pages"]}
    own = tuple(Entry(f, n, 2 * d, keys, warps, 2, 1) for (f, n), (keys, warps) in tiles.items())
    met = variants_of(d, d, torch.bfloat16, replace(DEVICES[device], tiles=own))
    assert {k: len(v) for k, v in met.items() if len(v) >= LIMIT} == {}
    used = {key[-2:] for key in met["decode"]}
    assert {(warps, 2) for _, warps in tiles.values()} & used, "no own tile was met"


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def recorded_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> dict[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """kernel -> arguments of calls that differ in every tensor a call may have: whether, where and of which dtype."""
    kernels = {decode_kernel: Recorder(), prefill_kernel: Recorder(), mask_blocks_kernel: Recorder()}
    for kernel, recorder in kernels.items():
        monkeypatch.setattr(launcher, kernel.fn.__name__, recorder)
    monkeypatch.setattr(launcher, "merge_kernel", Recorder())

    def index(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    def empty(*shape: int, dtype: torch.dtype = torch.float16, skip: int = 0) -> torch.Tensor:
        return torch.empty(math.prod(shape) + skip, dtype=dtype)[skip:].view(shape)

    b, h, sk, d = 2, 8, 512, 64
    for sq, skip in itertools.product((1, 200), (0, 3)):
        q, k = empty(b, sq, h, d), empty(b, sk, 2, d)
        features: list[dict[str, Any]] = [{"softcap": 1.0}, {"attention_chunk": 64}]
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            features.append({"sink": empty(h, dtype=dtype, skip=skip)})
            features.append({"mask": empty(b, h, sq, sk, dtype=dtype, skip=skip)})
        features += [
            {"alibi_slopes": empty(b, h, dtype=torch.float32, skip=skip)},
            {"mask": empty(b, h, sq, sk, dtype=torch.uint8, skip=skip).bool()},
            {"mask": empty(1, 1, 1, sk, dtype=torch.float16).expand(b, h, sq, sk)},
            {"tree_mask": torch.zeros(b, sq, sq, dtype=torch.bool)},
            {"cache_batch_idx": index(b + skip)[skip:]},
            {"cache_leftpad": index(b + skip)[skip:], "seqused_k": index(b + skip)[skip:]},
            {
                "rotary_cos": empty(99, 32, skip=skip),
                "rotary_sin": empty(99, 32, skip=skip),
                "rotary_positions": index(b),
            },
            {"page_table": index(b, 32), "seqused_k": index(b), "k": empty(64, 16, 2, d)},
            {"cu_seqlens_k": index(b + 1), "k": empty(b * sk, 2, d), "softcap": 1.0},
        ]
        for splits, feature in itertools.product((1, 4), [{}, {"seqused_k": index(b)}, *features]):
            call = {"q": q, "k": k, "num_splits": splits, **feature}
            x = Inputs(**{**call, "v": call["k"]})
            for out, lse in (
                (empty(*x.out_shape), empty(*x.lse_shape, dtype=torch.float32)),
                (empty(*x.out_shape, skip=skip), empty(*x.lse_shape, dtype=torch.float32, skip=skip)),
            ):
                with backends.force(DEVICES["h200"]):
                    backends.run(x, out, lse)
    return {kernel: recorder.calls for kernel, recorder in kernels.items()}


def test_triton_tells_calls_apart_by_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own key of a compiled program: none of the tensors' presence, dtype or alignment is in it.

    Were it otherwise, the numbers above would count too few.
    """
    backend = make_backend(GPUTarget("cuda", 90, 32))
    for kernel, calls in recorded_calls(monkeypatch).items():
        jit = JITFunction(kernel.fn, do_not_specialize=LISTED[kernel])
        bind = create_function_from_signature(jit.signature, jit.params, backend)
        constant = [n for n in jit.signature.parameters if n.isupper() and len(n) > 1]
        keys, counted = set(), set()
        for args, kwargs in calls:
            _, specialization, options = bind(*args, **kwargs, debug=False)
            keys.add((str(specialization), str(sorted(options.items()))))
            counted.add(str([(n, kwargs.get(n)) for n in (*constant, "num_warps", "num_stages")]))
        assert len(calls) > (10 if kernel is mask_blocks_kernel else 60)
        assert 4 <= len(keys) == len(counted) < LIMIT


@pytest.mark.parametrize("kernel", LISTED, ids=lambda k: k.fn.__name__)
def test_no_argument_is_specialised_on(kernel: Any) -> None:
    """One not in the list would compile a variant for 1, one for multiples of 16 and one for the rest."""
    listed = LISTED[kernel]
    kinds = {n: p.annotation for n, p in inspect.signature(kernel.fn).parameters.items()}
    integers = [n for n, kind in kinds.items() if getattr(kind, "name", "") in ("int32", "int64", "uint32")]
    assert sorted(integers) == sorted(listed)
    # What is left are floats and constants in capitals; the fixup takes pointers.
    pointers = {n for n, kind in kinds.items() if kind is inspect.Parameter.empty}
    fixups = {"PartialOut", "PartialLse", "Out", "Lse", "cu_seqlens", "seqused"}
    assert pointers == (fixups if kernel is fixup_kernel else set())


@pytest.mark.parametrize("kernel", [decode_kernel, prefill_kernel], ids=lambda k: k.fn.__name__)
def test_the_launchers_constants_are_the_kernels(kernel: Any) -> None:
    """All of them, and no other: a constant with a forgotten value would be a launch error on a GPU only."""
    kind = kernel.fn.__name__.removesuffix("_kernel")
    plan = make_plan(problem(sq=1 if kind == "decode" else 2048, num_splits=1), DEVICES["h200"])
    assert plan.kernel == kind
    wanted = {n for n in inspect.signature(kernel.fn).parameters if n.isupper() and len(n) > 1}
    assert set(constants(plan, 128, 128, torch.float16)) == wanted
