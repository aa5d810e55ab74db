"""Tuning from goals to a table: under a clock that the test winds, and once through the interpreted kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headfold import backends
from headfold.bench import tune
from headfold.bench.calls import HEADFOLD
from headfold.bench.cases import Case
from headfold.bench.errors import WrongOutput
from headfold.bench.features import Features
from headfold.bench.measure import Call, Timing, measure_cpu
from headfold.bench.runner import DeviceLost
from headfold.bench.tune import MARGIN, NotMeasured, Tuner, Work, begin, run, table_to_show, work_here
from headfold.bench.tune_goals import Goal, candidates, goals
from headfold.planner import DEVICES, Plan, tuned_file
from headfold.planner.tuned import ALIKE, Entry, Row, Table
from headfold.planner.tuned_file import machine_of, path_of, read, save
from tests.conftest import HAS_GPU, INTERPRETED
from tests.planner.tables import MACHINE, row

A100 = DEVICES["a100"]
CPU = torch.device("cpu")
Speed = Callable[[Case, tuple[Entry, ...]], "float | Exception"]
"""Microseconds of a case in a tile, () for the built-in one, or how it fails."""


@dataclass
class Fake:
    """Stands for headfold and for the clock: what each tile takes is what `speed` says."""

    speed: Speed
    now: float = 0.0
    called: list[tuple[str, tuple[Entry, ...]]] = field(default_factory=list)

    def prepare(self, case: Case, inputs: object) -> Call:
        """A call that takes as long as the tile in force does."""

        def call(copy: int) -> torch.Tensor:
            device = backends.forced()
            assert device is not None, "planned for no device"
            assert replace(device, tiles=()) == A100
            self.called.append((case.name, device.tiles))
            took = self.speed(case, device.tiles)
            if isinstance(took, Exception):
                raise took
            self.now += took * 1e-6
            return torch.empty(0)

        return call

    def measure(
        self, calls: Mapping[str, Call], device: torch.device, copies: int
    ) -> dict[str, Timing | Exception]:
        """The real arithmetic under this clock."""
        assert (device, copies) == (CPU, 7)
        return measure_cpu(calls, copies, rounds=3, clock=lambda: self.now)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Speed], Fake]:
    """Make headfold's calls take what a function says."""

    def install(speed: Speed) -> Fake:
        f = Fake(speed)
        monkeypatch.setattr(tune, "HEADFOLD", replace(HEADFOLD, prepare=f.prepare))
        monkeypatch.setattr(tune, "make_inputs", lambda case, where: SimpleNamespace(copies=7))
        monkeypatch.setattr(tune, "memory_shortage", lambda case, where: None)
        monkeypatch.setattr(tune, "error_of", lambda call, inputs: call(0))
        return f

    return install


def goal(name: str) -> Goal:
    """A goal of an A100 by its name."""
    return next(g for g in goals(A100) if g.name == name)


WAVE, CACHE = goal("wave, 16 rows, d128"), goal("stream+pages, 16 rows, d128")
WAVES = goal("waves, 16 rows, d128")


def is_tile(tiles: tuple[Entry, ...], keys: int, warps: int, stages: int = 3, resident: int = 1) -> bool:
    """True for one tile in force."""
    return bool(tiles) and (tiles[0].keys, tiles[0].warps, tiles[0].stages, tiles[0].resident) == (
        keys,
        warps,
        stages,
        resident,
    )


def tuned(f: Fake, of: Goal) -> list[Row]:
    """The rows of a goal."""
    return Tuner(A100, CPU, f.measure).tune(of)


# ---- one goal


def test_the_fastest_candidate_wins(fake: Callable[[Speed], Fake]) -> None:
    f = fake(lambda case, t: 80.0 if is_tile(t, 64, 8) else 85.0 if is_tile(t, 64, 4) else 100.0)
    (found,) = tuned(f, WAVE)
    assert found.entry == Entry("wave", 16, 256, 64, 8, 3, 1)
    assert (found.us, found.builtin_us) == (pytest.approx(80), pytest.approx(100))
    assert (found.candidates, found.left_out) == (len(candidates(WAVE, A100)), 0)
    # Each was run in its own tile, and the built-in one among them.
    assert {tiles for _, tiles in f.called} == {(), *candidates(WAVE, A100)}


@pytest.mark.parametrize(
    ("us", "chosen"),
    [(100 * (1 - MARGIN) - 0.01, True), (100 * (1 - MARGIN) + 0.01, False), (99.9, False), (101.0, False)],
)
def test_a_tile_within_the_margin_does_not_replace_the_built_in_one(
    fake: Callable[[Speed], Fake], us: float, chosen: bool
) -> None:
    """Then the row says so, and that it was measured."""
    (found,) = tuned(fake(lambda case, t: us if is_tile(t, 32, 4) else 110.0 if t else 100.0), WAVE)
    assert (found.entry is not None) == chosen
    assert found.us == pytest.approx(us if chosen else 100)
    assert found.builtin_us == pytest.approx(100)


def test_rows_and_pages_of_a_cache_get_one_tile_by_the_mean_of_both(fake: Callable[[Speed], Fake]) -> None:
    """The fastest of either alone loses to what is fast for both."""

    def speed(case: Case, t: tuple[Entry, ...]) -> float:
        if is_tile(t, 32, 4, resident=2):
            return 200.0 if case.is_paged else 50.0
        if is_tile(t, 128, 8):
            return 60.0 if case.is_paged else 170.0
        return 90.0 if is_tile(t, 64, 8, 4) and case.is_paged else 80.0 if is_tile(t, 64, 8, 4) else 100.0

    rows, pages = tuned(fake(speed), CACHE)
    assert rows.entry == Entry("stream", 16, 256, 64, 8, 4, 1)
    assert pages.entry == Entry("pages", 16, 256, 64, 8, 6, 1)
    assert (rows.us, pages.us) == (pytest.approx(80), pytest.approx(90))
    assert (rows.builtin_us, pages.builtin_us) == (pytest.approx(100), pytest.approx(100))
    Table(MACHINE, (rows, pages))


def test_rows_and_pages_keep_the_built_in_tile_together(fake: Callable[[Speed], Fake]) -> None:
    """One half as fast and the other twice as fast is no gain."""
    found = tuned(
        fake(lambda case, t: (200.0 if case.is_paged else 50.0) if is_tile(t, 64, 8) else 100.0), CACHE
    )
    assert [r.entry for r in found] == [None, None]
    assert [r.key for r in found] == CACHE.keys


def test_several_cases_of_a_form_count_by_their_geometric_mean(fake: Callable[[Speed], Fake]) -> None:
    (found,) = tuned(
        fake(lambda case, t: (20.0 if case.batch == 26 else 125.0) if is_tile(t, 64, 8) else 100.0), WAVES
    )
    assert found.entry is not None
    assert found.us == pytest.approx(50)


def failing(first: WrongOutput | RuntimeError | None, later: RuntimeError | None = None) -> Speed:
    """The tile of 64 keys and 8 warps is the fastest, and fails: at once, or after so many calls."""
    count = {"calls": 0}

    def speed(case: Case, t: tuple[Entry, ...]) -> float | Exception:
        if not is_tile(t, 64, 8):
            return 90.0 if is_tile(t, 32, 8) else 100.0
        count["calls"] += 1
        if first is not None:
            return first
        return later if later is not None and count["calls"] > 2 else 10.0

    return speed


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"), None),
        (WrongOutput("wrong result: max error 3"), None),
        (None, RuntimeError("out of resource: shared memory")),
    ],
    ids=["does not launch", "computes wrongly", "fails when it is timed"],
)
def test_a_candidate_that_fails_is_left_out_and_counted(
    fake: Callable[[Speed], Fake], first: RuntimeError | WrongOutput | None, later: RuntimeError | None
) -> None:
    """The next fastest wins."""
    (found,) = tuned(fake(failing(first, later)), WAVE)
    assert found.entry == Entry("wave", 16, 256, 32, 8, 3, 1)
    assert found.left_out == 1


def test_a_candidate_that_fails_in_one_case_is_left_out_of_all(fake: Callable[[Speed], Fake]) -> None:
    def speed(case: Case, t: tuple[Entry, ...]) -> float | Exception:
        if is_tile(t, 64, 8):
            return RuntimeError("no") if case.is_paged else 1.0
        return 100.0

    rows, pages = tuned(fake(speed), CACHE)
    assert (rows.entry, pages.entry) == (None, None)
    assert rows.left_out == pages.left_out == 1


def test_a_time_with_the_hosts_part_in_it_is_none(fake: Callable[[Speed], Fake]) -> None:
    """Where a call cannot be captured in a graph, say."""
    f = fake(lambda case, t: 100.0)

    def noted(calls: Mapping[str, Call], device: torch.device, copies: int) -> dict[str, Timing | Exception]:
        notes = [None if i != 1 else "no CUDA graph" for i in range(len(calls))]
        return {n: Timing(1.0 if note else 9.0, 1, 1, 1, note) for n, note in zip(calls, notes, strict=True)}

    (found,) = Tuner(A100, CPU, noted).tune(WAVE)
    assert (found.entry, found.left_out) == (None, 1)
    assert f.called


def test_without_a_time_of_the_built_in_tile_nothing_is_said(fake: Callable[[Speed], Fake]) -> None:
    f = fake(lambda case, t: 10.0 if t else RuntimeError("broken\nand more"))
    with pytest.raises(NotMeasured, match=r"in the built-in tile: RuntimeError: broken$"):
        tuned(f, WAVE)


def test_a_case_that_memory_cannot_hold_is_not_measured(
    fake: Callable[[Speed], Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before, or found out."""
    f = fake(lambda case, t: 1.0)
    monkeypatch.setattr(tune, "memory_shortage", lambda case, where: "it needs 9.0 GB, 1.0 GB are free")
    with pytest.raises(NotMeasured, match=r"s8192: it needs 9.0 GB, 1.0 GB are free"):
        tuned(f, WAVE)

    def none_left(case: Case, where: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "memory_shortage", lambda case, where: None)
    monkeypatch.setattr(tune, "make_inputs", none_left)
    with pytest.raises(NotMeasured, match="out of memory"):
        tuned(f, WAVE)
    assert not f.called


def test_wrong_results_are_found_by_the_benchmarks_own_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """On real inputs: a tile that loses its last key would be the fastest, and is left out."""
    case = Case("tiny", "decode", 8, 2, 64, 64, 2, 1, 96, dtype="fp16")
    right = Entry("few", 16, 128, 64, 8, 3, 1)

    def prepare(case: Case, x: Any) -> Call:
        def call(copy: int) -> torch.Tensor:
            device = backends.forced()
            assert device is not None
            short = 0 if not device.tiles or device.tiles[0] == right else 48
            q, k, v = (t.transpose(1, 2).float() for t in (x.q, x.k[copy], x.v[copy]))
            k, v = (t[:, :, short:] for t in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return out.transpose(1, 2).half()

        return call

    def times(calls: Mapping[str, Call], device: torch.device, copies: int) -> dict[str, Timing | Exception]:
        assert len(calls) == 2
        return {name: Timing(1.0 if "64 keys" in name else 2.0, 1, 1, 1) for name in calls}

    monkeypatch.setattr(tune, "HEADFOLD", replace(HEADFOLD, prepare=prepare))
    monkeypatch.setattr("headfold.bench.inputs.CPU_COPIES_BYTES", 1 << 17)
    (found,) = Tuner(A100, CPU, times).tune(Goal(16, 64, (("few", case),)))
    assert found.entry == right
    assert found.left_out == found.candidates - 1


# ---- a run


@dataclass
class Machine:
    """A place for a table and what measures it."""

    path: Path
    fake: Fake
    names: list[str] = field(default_factory=list)

    def run(self, chosen: list[Goal], again: bool = False) -> tuple[Table, list[str]]:
        """What `headfold tune` does, for these goals."""
        table = begin(self.path, MACHINE, chosen, again)
        left = tuple(g for g in chosen if not table.has(g.keys))
        self.names.clear()
        work = Work(A100, CPU, left, table, self.path)
        return run(work, advance=self.names.append, measure=self.fake.measure)


FEW = [WAVE, CACHE, WAVES]


@pytest.fixture
def machine(fake: Callable[[Speed], Fake], tmp_path: Path) -> Machine:
    """One where the tile of 64 keys and 8 warps is the fastest of all."""
    return Machine(tmp_path / "new" / "t.json", fake(lambda case, t: 50.0 if is_tile(t, 64, 8) else 100.0))


def test_a_run_fills_the_table_and_its_file(machine: Machine) -> None:
    table, problems = machine.run(FEW)
    assert problems == []
    assert machine.names == [g.name for g in FEW]
    assert table == read(machine.path)
    assert {(e.form, e.keys, e.warps) for e in table.entries} == {
        (f, 64, 8) for f in ("wave", "waves", "stream", "pages")
    }
    replace(A100, tiles=table.entries)  # a device takes them


def test_an_interrupted_run_goes_on_where_it_stopped(machine: Machine) -> None:
    """Ctrl-C in the third goal keeps two, and only the third is measured then."""
    plain = machine.fake.speed

    def interrupted(case: Case, t: tuple[Entry, ...]) -> float | Exception:
        if case in [c for _, c in WAVES.cases]:
            raise KeyboardInterrupt
        return plain(case, t)

    machine.fake.speed = interrupted
    with pytest.raises(KeyboardInterrupt):
        machine.run(FEW)
    kept = read(machine.path)
    assert kept is not None
    assert kept.has([*WAVE.keys, *CACHE.keys])
    assert not kept.has(WAVES.keys)
    machine.fake.speed = plain
    machine.fake.called.clear()
    table, _ = machine.run(FEW)
    assert machine.names == [WAVES.name]
    assert {name for name, _ in machine.fake.called} == {c.name for _, c in WAVES.cases}
    assert set(kept.rows) < set(table.rows)
    before = machine.path.read_bytes()
    assert machine.run(FEW)[0] == table
    assert machine.names == []
    assert machine.path.read_bytes() == before


def test_again_measures_anew_what_was_asked_for_alone(machine: Machine) -> None:
    machine.run(FEW)
    machine.fake.speed = lambda case, t: 25.0 if is_tile(t, 32, 4) else 100.0
    table, _ = machine.run([WAVE], again=True)
    assert machine.names == [WAVE.name]
    assert {e.form: e.keys for e in table.entries} == {"wave": 32, "waves": 64, "stream": 64, "pages": 64}
    table, _ = machine.run(FEW, again=True)
    assert {e.keys for e in table.entries} == {32}


def test_what_cannot_be_measured_is_said_and_the_rest_is(machine: Machine) -> None:
    plain = machine.fake.speed
    machine.fake.speed = lambda case, t: RuntimeError("no") if case.is_paged and not t else plain(case, t)
    table, problems = machine.run(FEW)
    assert [p.split(":")[0] for p in problems] == [CACHE.name]
    assert not table.has(CACHE.keys)
    assert table.has([*WAVE.keys, *WAVES.keys])
    machine.fake.speed = plain
    machine.run(FEW)
    assert machine.names == [CACHE.name]


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_is(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(device: torch.device, name: str) -> None:
        if name == WAVES.cases[0][1].name:
            raise DeviceLost(f"{name}: an illegal memory access")

    monkeypatch.setattr(tune, "require_device", lost)
    with pytest.raises(DeviceLost):
        machine.run([WAVE, WAVES])
    kept = read(machine.path)
    assert kept is not None
    assert [r.form for r in kept.rows] == ["wave"]


def test_a_write_that_fails_ends_the_run_and_leaves_the_old_table(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.run([WAVE])
    before = machine.path.read_bytes()

    def refused(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as m:
        m.setattr(os, "replace", refused)
        with pytest.raises(OSError, match="No space left"):
            machine.run(FEW)
    assert machine.path.read_bytes() == before
    assert os.listdir(machine.path.parent) == ["t.json"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "NVIDIA L4"),
        ("arch", (8, 9)),
        ("headfold", "0.0.1"),
        ("torch", "2.11.0"),
        ("triton", "3.6.0"),
    ],
)
def test_a_table_of_other_times_is_not_gone_on_with(tmp_path: Path, name: str, value: Any) -> None:
    """Times of two versions or machines do not stand in one table; `again` starts over."""
    path = tmp_path / "t.json"
    save(Table(replace(MACHINE, **{name: value}), (row(),)), path)
    with pytest.raises(ValueError, match=f"measured with {name} .*; --again starts over"):
        begin(path, MACHINE, FEW, again=False)
    assert begin(path, MACHINE, FEW, again=True) == Table(MACHINE)


def test_a_file_that_is_no_table_is_not_written_over_unasked(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text("my notes")
    with pytest.raises(ValueError, match=r"t.json is not JSON .*; --again starts over"):
        begin(path, MACHINE, FEW, again=False)
    assert begin(path, MACHINE, FEW, again=True) == Table(MACHINE)
    assert path.read_text() == "my notes"


# ---- this machine


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An A100 that is not there, and a cache directory of its own."""
    monkeypatch.setenv("HEADFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("HEADFOLD_TUNED", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: A100.name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: A100.arch)
    old = (Entry("wave", 16, 256, 64, 8, 3, 1),)
    monkeypatch.setattr(tune, "running_device", lambda where: replace(A100, tiles=old))
    return tmp_path


def test_work_here_is_for_the_gpu_at_hand_without_its_old_table(gpu: Path) -> None:
    work = work_here()
    assert work.device == A100
    assert work.where == torch.device("cuda", 0)
    assert list(work.goals) == goals(A100)
    here = machine_of(A100.name, A100.arch)
    assert work.path == path_of(here)
    assert work.table == Table(here)
    save(Table(here, (row(),)), work.path)
    assert len(work_here().goals) == len(goals(A100)) - 1
    assert len(work_here(again=True).goals) == len(goals(A100))
    assert work_here(only=["few"], output=gpu / "x").path == gpu / "x"
    assert {g.forms for g in work_here(only=["few"]).goals} == {("few",)}


def test_a_form_that_no_call_of_the_gpu_runs_in_is_refused(
    gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "running_device", lambda where: DEVICES["h200"])
    with pytest.raises(
        ValueError, match="--only is 'pages'; nothing on NVIDIA H200 runs in tiles of that form"
    ):
        work_here(only=["few", "pages"])
    assert not list(gpu.iterdir())


def test_work_here_without_a_home_asks_for_a_file(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_file, "cache_dir", lambda: None)
    with pytest.raises(ValueError, match="HEADFOLD_CACHE_DIR or give --output"):
        work_here()
    assert work_here(output=gpu / "x").path == gpu / "x"


def test_the_table_to_show_is_the_one_in_force_or_a_files(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert table_to_show() is None
    here = machine_of(A100.name, A100.arch)
    table = Table(here, (row(),))
    path = path_of(here)
    assert path is not None
    save(table, path)
    assert table_to_show() == table
    monkeypatch.setenv("HEADFOLD_TUNED", "0")
    assert table_to_show() is None
    other = Table(MACHINE)
    save(other, gpu / "x.json")
    assert table_to_show(gpu / "x.json") == other
    with pytest.raises(ValueError, match="no such file to show"):
        table_to_show(gpu / "y.json")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    for call in (work_here, table_to_show):
        with pytest.raises(ValueError, match="tune needs an NVIDIA GPU, and PyTorch sees none"):
            call()
    with pytest.raises(
        ValueError, match="--only is 'wav'; it must be one of wave, waves, few, stream, pages"
    ):
        work_here(only=["wav"])


# ---- the kernels


def _small(kind: str, batch: int, sq: int, sk: int, kv_heads: int = 2, **other: Any) -> Case:
    name = f"small-{kind}-b{batch}-s{sk}"
    return Case(name, kind, 4, kv_heads, 64, 64, batch, sq, sk, dtype="fp16", **other)  # type: ignore[arg-type]


SMALL = (
    Goal(16, 64, (("wave", _small("decode", 4, 1, 600)),)),
    Goal(16, 64, (("few", _small("decode", 1, 1, 300)),)),
    Goal(16, 64, (("waves", _small("decode", 7, 1, 300)),)),
    Goal(
        16,
        64,
        (
            ("stream", _small("ragged decode", 3, 1, 150, lengths=(17, 150, 64))),
            ("pages", _small("ragged decode", 3, 1, 150, lengths=(17, 150, 64), page_size=16)),
        ),
    ),
    Goal(
        64,
        64,
        (
            ("stream", _small("speculative", 2, 8, 80, 1, causal=True, features=Features(cache=True))),
            ("pages", _small("speculative", 2, 8, 80, 1, causal=True, page_size=16)),
        ),
    ),
)


@pytest.mark.skipif(HAS_GPU, reason="interpreted kernels are for machines without a GPU")
@pytest.mark.parametrize("of", SMALL, ids=lambda g: g.name)
def test_tiles_of_every_form_compute_right(of: Goal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very kernels, interpreted, in tiles that no built-in table has: checked, and run as the plans say."""
    device = INTERPRETED.plan_for
    assert device is not None
    ran: list[Plan] = []
    plan_of = backends.plan_of

    def seen(*args: Any) -> Any:
        found = plan_of(*args)
        ran.append(found[1])
        return found

    monkeypatch.setattr(backends, "plan_of", seen)
    monkeypatch.setattr("headfold.bench.inputs.CPU_COPIES_BYTES", 1 << 17)
    # One for each number of keys: an interpreted tile takes its time, and knows nothing of warps and stages.
    ampere = replace(device, arch=(8, 0))  # Hopper GPUs have another kernel for more than 16 rows
    offered = list({c[0].keys: c for c in candidates(of, ampere) if c[0].stages == 3}.values())
    monkeypatch.setattr(tune, "candidates", lambda goal, device: offered)

    def times(calls: Mapping[str, Call], where: torch.device, copies: int) -> dict[str, Timing | Exception]:
        return {name: Timing(float(99 - 9 * i), 1, 1, 1) for i, name in enumerate(calls)}

    rows = Tuner(device, CPU, times).tune(of)
    assert [r.left_out for r in rows] == [0] * len(of.forms)
    assert [r.entry for r in rows] == list(offered[-1])
    wanted = {(e.form == "pages", e.rows, e.keys, e.warps, e.stages, e.resident) for c in offered for e in c}
    own = {(p.paged, p.block_m, p.block_n, p.num_warps, p.num_stages, p.resident) for p in ran if p.own_tile}
    assert own == wanted
    assert not any(form in ALIKE for form in of.forms) or {p.paged for p in ran} == {False, True}


def test_the_file_is_plain_json(machine: Machine) -> None:
    """A reader without headfold finds the device, the versions and both times of every tile."""
    machine.run([WAVE])
    data = json.loads(machine.path.read_text())
    assert (data["device"], data["arch"], data["triton"]) == (MACHINE.device, [9, 0], MACHINE.triton)
    (tile,) = data["tiles"]
    assert (tile["form"], tile["rows"], tile["width"], tile["keys"], tile["warps"]) == (
        "wave",
        16,
        256,
        64,
        8,
    )
    assert tile["us"] < tile["builtin_us"]
