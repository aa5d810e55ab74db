"""The catalogue holds what it promises, and its cases count their work right."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import headfold
from headfold.bench import peers
from headfold.bench.cases import Case, select
from headfold.bench.catalogue import RAGGED_64, SUITES, catalogue
from headfold.bench.inputs import make_inputs
from tests.bench.tiny import TINY, TINY_FEATURES

DEVICES = ("cpu", "cuda")


@pytest.mark.parametrize("device", DEVICES)
def test_names_are_unique_and_shell_safe(device: str) -> None:
    names = [c.name for c in catalogue(device)]
    assert len(set(names)) == len(names)
    assert all(set(n) <= set("abcdefghijklmnopqrstuvwxyz0123456789.-") for n in names)


@pytest.mark.parametrize("device", DEVICES)
def test_a_name_means_one_shape_on_every_device(device: str) -> None:
    here, there = ({c.name: c for c in catalogue(d)} for d in DEVICES)
    assert all(here[name] == there[name] for name in here.keys() & there.keys())


@pytest.mark.parametrize("device", DEVICES)
def test_every_ratio_and_kind_is_there(device: str) -> None:
    cases = catalogue(device)
    decode = {(c.heads, c.kv_heads, c.d) for c in cases if c.kind == "decode"}
    assert decode >= {
        (96, 8, 128),
        (32, 8, 128),
        (64, 8, 128),
        (32, 4, 128),
        (16, 2, 256),
        (64, 8, 64),
        (32, 1, 128),
        (32, 32, 128),
        (40, 8, 128),
        (28, 4, 128),
    }
    assert {c.kind for c in cases} == {
        "decode",
        "paged decode",
        "ragged decode",
        "speculative",
        "prefill",
        "ragged prefill",
    }
    assert {c.page_size for c in cases if c.kind == "paged decode"} == {1, 16, 64}
    assert {c.causal for c in cases if c.kind == "prefill"} == {True, False}


@pytest.mark.parametrize(
    "shape",
    [
        (32, 8, 128, 1, 8192, "bf16"),
        (32, 8, 128, 8, 4096, "bf16"),
        (96, 8, 128, 1, 16384, "bf16"),
        (16, 2, 256, 1, 16384, "bf16"),
        (32, 8, 128, 1, 8192, "fp32"),
    ],
)
def test_cpu_sizes(shape: tuple[int, int, int, int, int, str]) -> None:
    cases = [c for c in catalogue("cpu") if c.kind == "decode"]
    assert shape in [(c.heads, c.kv_heads, c.d, c.batch, c.sk, c.dtype) for c in cases]


def test_prefill_on_the_gpu_covers_dims_masks_and_lengths() -> None:
    prefill = {(c.d, c.causal, c.sq) for c in catalogue("cuda") if c.kind == "prefill"}
    assert {(d, m, s) for d in (64, 128, 256) for m in (True, False) for s in (1024, 4096, 16384)} <= prefill


def test_ragged_lengths_are_the_log_uniform_draw_they_claim() -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = torch.exp(u * (math.log(32768) - math.log(128)) + math.log(128)).long()
    assert tuple(drawn.tolist()) == RAGGED_64
    assert sum(RAGGED_64) == 367907


def test_bytes_and_flops_of_known_cases() -> None:
    cases = {c.name: c for c in catalogue("cuda")}
    assert cases["glm4.7-decode-b4-s65536"].kv_bytes == 2 * 4 * 65536 * 8 * 128 * 2
    ragged = cases["llama3-8b-ragged-b64-paged16"]
    assert ragged.kv_bytes == 2 * 367907 * 8 * 128 * 2
    assert ragged.flops == 4 * 128 * 32 * 367907
    full = cases["d128-h16-prefill-b4-s4096-full"]
    assert full.flops == 4 * 4 * 16 * 128 * 4096**2
    prefix = cases["llama3-8b-prefix8192-paged16-b64-s8704"]
    assert prefix.kv_bytes == prefix.cache_bytes == 2 * (8192 + 64 * 512) * 8 * 128 * 2, (
        "distinct keys, each once"
    )
    assert prefix.flops == 4 * 128 * 32 * 64 * 8704, "every query sees all of its own"
    mixed = cases["llama3-8b-prefill-mixed-8x512-120x1-s8192"]
    chunk = sum(range(8192 - 511, 8193))
    assert mixed.flops == 4 * 128 * 32 * (8 * chunk + 120 * 8192)
    assert mixed.kv_bytes == 128 * 2 * 8192 * 8 * 128 * 2
    assert mixed.out_shape == (8 * 512 + 120, 32, 128)
    causal = cases["d128-h16-prefill-b4-s4096-causal"]
    assert causal.flops == 4 * 4 * 16 * 128 * 4096 * 4097 // 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_parts_of_the_whole(device: str, suite: str) -> None:
    part = catalogue(device, suite)
    assert part
    assert set(part) <= set(catalogue(device))


@pytest.mark.parametrize("device", DEVICES)
def test_suites_hold_what_they_are_called(device: str) -> None:
    assert all("prefill" not in c.kind and not c.features.names for c in catalogue(device, "decode"))
    assert {c.kind for c in catalogue(device, "prefill")} == {"prefill", "ragged prefill"}
    assert all(c.is_paged for c in catalogue(device, "paged"))
    assert all(c.is_ragged for c in catalogue(device, "ragged"))
    whole = {*catalogue(device, "decode"), *catalogue(device, "prefill"), *catalogue(device, "features")}
    assert set(catalogue(device)) == whole


def test_prefills_have_features_of_models_that_use_them() -> None:
    """Sinks alone and within a window, and a softcap: the Gluon kernel's on a Hopper GPU."""
    cases = {c.name: c for c in catalogue("cuda", "features") if c.kind == "prefill" and c.base}
    sink = cases["gpt-oss-prefill-b1-s8192-causal-sink"]
    window = cases["gpt-oss-prefill-b1-s8192-causal-window128-sink"]
    assert (sink.heads, sink.kv_heads, sink.d, sink.flops) == (64, 8, 64, 4 * 64 * 64 * 8192 * 8193 // 2)
    assert window.flops == 4 * 64 * 64 * (8192 * 128 - 128 * 127 // 2)
    assert cases["llama3-8b-prefill-b1-s4096-causal-softcap"].features.softcap == 50.0
    assert len(cases) == 5, "with both kinds of masks"


def test_select_takes_globs_in_catalogue_order() -> None:
    cases = catalogue("cpu")
    found = select(cases, ["llama3-8b-prefill-*", "glm*"])
    assert [c.name for c in found] == [
        c.name for c in cases if "prefill" in c.name or c.name.startswith("glm")
    ]
    with pytest.raises(ValueError, match="--case is 'nothing'"):
        select(cases, ["glm*", "nothing"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 9}, "heads is 9; it must be a multiple of the 2 KV heads"),
        ({"sk": 0}, "sk is 0; it must be at least 1"),
        ({"queries": (2,)}, "it must hold a number a sequence, the largest sq"),
        ({"queries": (1, 1)}, "it must hold a number a sequence, the largest sq"),
        ({"queries": (1,)}, "they differ in ragged cases alone"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"kind": "training"}, "kind is 'training'"),
        ({"lengths": (4, 5)}, "lengths is"),
        ({"sq": 65, "causal": True}, "sq is 65"),
        ({"shared": 16}, "shared is 16; it must be a number of keys in whole pages"),
        ({"shared": 24, "page_size": 16}, "shared is 24; it must be a number of keys in whole pages"),
        ({"shared": 80, "page_size": 16}, "shared is 80; every sequence must have so many keys"),
        ({"shared": -16, "page_size": 16}, "shared is -16; every sequence must have so many keys"),
    ],
)
def test_a_case_that_makes_no_sense_is_refused(change: dict[str, object], message: str) -> None:
    good = Case("x", "decode", 8, 2, 64, 64, 1, 1, 64)
    with pytest.raises(ValueError, match="case 'x'") as e:
        dataclasses.replace(good, **change)
    assert message in str(e.value)


def test_unknown_suites_and_devices_are_named() -> None:
    with pytest.raises(ValueError, match="--suite is 'tiny'"):
        catalogue("cpu", "tiny")
    with pytest.raises(ValueError, match="--device is 'tpu'"):
        catalogue("tpu")


def test_a_shared_prefix_lies_in_pages_that_all_begin_with() -> None:
    """As many pages as there are keys apart, and each in one place, the shared ones first in every row."""
    for case in (*TINY, *TINY_FEATURES):
        x = make_inputs(case, torch.device("cpu"), copies=1)
        assert sum(t[0].nbytes for t in (x.k, x.v)) >= case.cache_bytes
        if x.page_table is None:
            continue
        shared = case.shared // case.page_size
        used = [
            row[: -(-n // case.page_size)].tolist()
            for row, n in zip(x.page_table, case.all_lengths, strict=True)
        ]
        assert all(row[:shared] == used[0][:shared] for row in used)
        own = [page for row in used for page in row[shared:]]
        assert sorted(used[0][:shared] + own) == list(range(x.k[0].shape[0]))


def test_headfold_alone_is_told_what_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of headfold makes the promise, headfold-unshared and plain cases do not."""
    told: list[object] = []
    attend = headfold.flash_attn_with_kvcache

    def record(*args: object, **options: object) -> object:
        told.append(options["shared_prefix_len"])
        return attend(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(headfold, "flash_attn_with_kvcache", record)
    cases = {c.name: c for c in TINY}
    peers.chosen((), "cpu")  # registers them
    for name in ("tiny-prefix", "tiny-paged"):
        case = cases[name]
        for way in ("headfold", "headfold-unshared"):
            if peers.REGISTRY[way].runs(case, "cpu"):
                call = peers.REGISTRY[way].prepare(case, make_inputs(case, torch.device("cpu"), copies=1))
                assert callable(call)
                call(0)
    assert told == [32, None, 0]
