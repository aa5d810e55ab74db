"""Peers: every way of PyTorch's gives attention, and what is not there says why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from headfold.bench import peers
from headfold.bench.cases import Case
from headfold.bench.errors import max_error
from headfold.bench.inputs import CaseInputs, make_inputs
from headfold.bench.measure import Call
from headfold.bench.runner import Runner
from tests.bench.tiny import TINY

CPU = torch.device("cpu")
EVERY_WAY = (
    "torch-sdpa",
    "torch-math",
    "torch-mask",
    "torch-expand",
    "torch-gather",
    "torch-pad",
    "torch-loop",
)


class NoCeiling:
    """Ceilings that nothing comes near."""

    def read_us(self, nbytes: int) -> float:
        return 1e-3

    def matmul_tflops(self, dtype: torch.dtype) -> float:
        return 1e6


def runner(*implementations: peers.Implementation) -> Runner:
    return Runner(CPU, implementations, NoCeiling(), rounds=2)  # type: ignore[arg-type]


def pairs() -> list[tuple[str, Case]]:
    """Every implementation that runs on a CPU with every case it says something about."""
    peers.chosen((), "cpu")
    names = [*EVERY_WAY, "sdpa-folded", "headfold"]
    return [(name, case) for name in names for case in TINY if peers.REGISTRY[name].applies(case, "cpu")]


@pytest.mark.parametrize(("name", "case"), pairs(), ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_way_that_applies_is_attention(name: str, case: Case) -> None:
    way = peers.REGISTRY[name]
    x = make_inputs(case, CPU, copies=2)
    call = way.prepare(case, x)
    assert not isinstance(call, peers.Unsupported)
    max_error(x, call(0))
    torch.testing.assert_close(call(1), call(0))


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_pytorch_has_a_way_for_every_case(case: Case) -> None:
    for device in ("cpu", "cuda"):
        ways = [i for i in peers.chosen((), device) if i.is_torch and i.applies(case, device)]
        assert ways


def test_defaults_by_device() -> None:
    cpu, cuda = ({i.name for i in peers.chosen((), d)} for d in ("cpu", "cuda"))
    assert {"headfold", "torch-sdpa", "torch-expand"} <= cpu
    assert {"headfold", "headfold-unpacked", "torch-cudnn", "torch-flash", "torch-efficient"} <= cuda
    assert not {"fa3", "fa4", "flashinfer", "sdpa-folded"} & (cpu | cuda)
    assert {i.name for i in peers.chosen((), "cpu", with_torch=False)} == {"headfold"}


def test_unknown_names_and_missing_files_are_refused() -> None:
    with pytest.raises(ValueError, match="--against is 'fa9'; it must be one of headfold"):
        peers.chosen(["fa9"], "cpu")
    with pytest.raises(ValueError, match=r"--against is '/no/where\.so', which is not a file"):
        peers.chosen(["/no/where.so"], "cpu")
    with pytest.raises(ValueError, match="registered already"):
        peers.register(peers.REGISTRY["headfold"])


def test_pytorchs_ways_go_by_their_short_names_too() -> None:
    names = {i.name for i in peers.chosen(["cudnn", "flash", "math"], "cpu", with_torch=False)}
    assert names == {"headfold", "torch-cudnn", "torch-flash", "torch-math"}


def test_fa3_is_found_by_option_then_environment_then_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def about(option: str | None = None) -> str:
        return next(i for i in peers.chosen(["fa3"], "cuda", fa3_library=option) if i.name == "fa3").about

    here, there = tmp_path / "here.so", tmp_path / "there.so"
    here.touch()
    there.touch()
    monkeypatch.delenv(peers.FA3_LIBRARY, raising=False)
    assert "package" in about()
    monkeypatch.setenv(peers.FA3_LIBRARY, str(there))
    assert about().endswith(str(there))
    assert about(str(here)).endswith(str(here))
    with pytest.raises(ValueError, match=r"--fa3-library is '/no/where\.so', which is not a file"):
        about("/no/where.so")
    monkeypatch.setenv(peers.FA3_LIBRARY, "/no/where.so")
    with pytest.raises(ValueError, match=r"HEADFOLD_FA3_LIBRARY is '/no/where\.so'"):
        about()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the libraries may be there")
def test_libraries_that_are_not_here_have_rows_with_reasons() -> None:
    chosen = [
        i for i in peers.chosen(["fa3", "fa4", "flashinfer"], "cpu") if i.name in ("fa3", "fa4", "flashinfer")
    ]
    rows = runner(*chosen).run_case(TINY[0])
    assert [r.implementation for r in rows] == ["fa3", "fa4", "flashinfer"]
    assert all(r.median_us is None and "needs an NVIDIA GPU" in (r.note or "") for r in rows)


def peer(name: str, prepare: peers.Prepare) -> peers.Implementation:
    return peers.Implementation(name, "a peer for a test", prepare)


def test_one_failure_leaves_the_others_their_rows() -> None:
    def raises(case: Case, x: CaseInputs) -> Call:
        raise RuntimeError("does not build\nand here is the log")

    def unsupported(case: Case, x: CaseInputs) -> peers.Unsupported:
        return peers.Unsupported("heads must be odd")

    def nan(case: Case, x: CaseInputs) -> Call:
        return lambda i: torch.full((case.batch, case.sq, case.heads, case.dv), float("nan"))

    def wrong(case: Case, x: CaseInputs) -> Call:
        return lambda i: torch.ones(case.batch, case.sq, case.heads, case.dv)

    bad = [peer(f.__name__, f) for f in (raises, unsupported, nan, wrong)]  # type: ignore[list-item]
    rows = {r.implementation: r for r in runner(*bad, *peers.chosen((), "cpu")).run_case(TINY[0])}
    assert rows["raises"].note == "RuntimeError: does not build"
    assert "heads must be odd" in (rows["unsupported"].note or "")
    assert "NaN" in (rows["nan"].note or "")
    assert "wrong result" in (rows["wrong"].note or "")
    assert rows["wrong"].max_error is not None
    assert all(rows[name].median_us is None for name in ("raises", "unsupported", "nan", "wrong"))
    good = rows["torch-sdpa"]
    assert good.median_us is not None
    assert good.gbps == pytest.approx(TINY[0].kv_bytes / good.median_us / 1e3)
    assert good.tflops == pytest.approx(TINY[0].flops / good.median_us / 1e6)
    assert good.ceiling_fraction == pytest.approx(1e-3 / good.median_us)


def test_a_case_beyond_memory_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headfold.bench.inputs.free_memory", lambda device: 1000)
    rows = runner(*peers.chosen((), "cpu")).run_case(TINY[0])
    assert rows
    assert all((r.note or "").startswith("skipped: it needs") for r in rows)
