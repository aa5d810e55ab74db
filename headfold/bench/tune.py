"""`headfold tune`: which decode tile is the fastest on this machine, for each that the built-in table holds.

Tiles that the planner could run are timed in turn with the built-in one, each as the planner would run it. A tile that
does not compile, launch or compute correctly is left out. Nothing is wrong or missing without a table.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from headfold import backends
from headfold.bench.calls import HEADFOLD
from headfold.bench.cases import Case
from headfold.bench.errors import error_of
from headfold.bench.inputs import make_inputs, memory_shortage
from headfold.bench.measure import Call, Timing, first_line, measure
from headfold.bench.peers import Unsupported
from headfold.bench.runner import Progress, require_device
from headfold.bench.tune_goals import Goal, candidates, goals
from headfold.planner import Device, running_device
from headfold.planner.tuned import ROWS, Entry, Form, Machine, Row, Table
from headfold.planner.tuned_file import machine_of, path_of, read, save, table_in_force

# How much faster than the built-in tile another must be: smaller differences are noise on a card whose clock follows
# its power.
MARGIN = 0.02
BUILT_IN = "the built-in tile"

Measure = Callable[[Mapping[str, Call], torch.device, int], Mapping[str, Timing | Exception]]
"""Times calls by name on a device, over so many copies of K and V: `measure`, or what a test has in its place."""


class NotMeasured(Exception):
    """A goal of which this machine can say nothing, with the reason."""


@dataclass(frozen=True, slots=True)
class Tuner:
    """Chooses tiles for `device` by calls on `where`."""

    device: Device
    where: torch.device
    measure: Measure = measure
    say: Progress = lambda text: None

    def tune(self, goal: Goal) -> list[Row]:
        """Measure a goal's candidates beside the built-in tile, and return its rows of the table.

        Raises:
            NotMeasured: memory is short, or the built-in tile has no time.
            DeviceLost: the GPU does not answer any more.
        """
        tiles = {BUILT_IN: (), **{_label(entries): entries for entries in candidates(goal, self.device)}}
        times: dict[str, list[float]] = {name: [] for name in tiles}
        for _, case in goal.cases:
            try:
                with torch.no_grad():
                    found = self._time(case, {name: tiles[name] for name in times})
            finally:
                self._tidy()
            times = {name: [*us, found[name]] for name, us in times.items() if name in found}
        best = min(times, key=lambda name: _mean(times[name]))
        if _mean(times[best]) >= (1 - MARGIN) * _mean(times[BUILT_IN]):
            best = BUILT_IN
        chosen = {e.form: e for e in tiles[best]}

        def us_of(form: Form, name: str) -> float:
            return _mean(us for (f, _), us in zip(goal.cases, times[name], strict=True) if f == form)

        tried, left_out = len(tiles) - 1, len(tiles) - len(times)
        return [
            Row(*key, chosen.get(key[0]), us_of(key[0], best), us_of(key[0], BUILT_IN), tried, left_out)
            for key in goal.keys
        ]

    def _time(self, case: Case, tiles: Mapping[str, tuple[Entry, ...]]) -> dict[str, float]:
        """Microseconds of a case in each tile, but for those that fail."""
        short = memory_shortage(case, self.where)
        if short is not None:
            raise NotMeasured(f"{case.name}: {short}")
        self.say("drawing inputs")
        try:
            inputs = make_inputs(case, self.where)
        except torch.OutOfMemoryError as e:
            raise NotMeasured(f"{case.name}: {first_line(e)}") from e
        call = HEADFOLD.prepare(case, inputs)
        assert not isinstance(call, Unsupported), "headfold runs every case"
        calls: dict[str, Call] = {}
        failed: dict[str, str] = {}
        for name, entries in tiles.items():
            self.say(f"checking {name}")
            planned = _planned_for(replace(self.device, tiles=entries), call)
            try:
                error_of(planned, inputs)
            except Exception as e:
                failed[name] = first_line(e)
                require_device(self.where, f"{case.name} in {name}")
            else:
                calls[name] = planned
        self.say(f"timing {len(calls)} tiles in turn")
        times: dict[str, float] = {}
        for name, timing in self.measure(calls, self.where, inputs.copies).items():
            if isinstance(timing, Exception):
                failed[name] = first_line(timing)
            elif timing.note is not None:  # the host's time says nothing of a tile
                failed[name] = timing.note
            else:
                times[name] = timing.median_us
        require_device(self.where, case.name)
        if BUILT_IN in failed:
            raise NotMeasured(f"{case.name} in {BUILT_IN}: {failed[BUILT_IN]}")
        return times

    def _tidy(self) -> None:
        gc.collect()
        if self.where.type == "cuda":
            torch.cuda.empty_cache()


def _label(entries: tuple[Entry, ...]) -> str:
    e = entries[0]
    return f"{e.keys} keys, {e.warps} warps, {e.stages} stages, {e.resident} a multiprocessor"


def _planned_for(device: Device, call: Call) -> Call:
    def run(copy: int) -> torch.Tensor:
        with backends.force(device):
            return call(copy)

    return run


def _mean(times: Iterable[float]) -> float:
    """The geometric mean."""
    return math.exp(statistics.fmean(map(math.log, times)))


# ---- the table


@dataclass(frozen=True, slots=True)
class Work:
    """What a run of `headfold tune` has to do on `where`: the goals that `table`, from `path`, does not hold."""

    device: Device
    where: torch.device
    goals: tuple[Goal, ...]
    table: Table
    path: Path


def work_here(only: Sequence[str] = (), again: bool = False, output: Path | None = None) -> Work:
    """What there is to do on this machine's GPU.

    Args:
        only: forms to measure, all where there is none.
        again: measure what is measured already, too.
        output: the table's file, None for the one that is read.

    Raises:
        ValueError: an option that names nothing, no GPU, no place for the file, or a file that cannot be gone on with.
        OSError: the file cannot be read.
    """
    for form in only:
        if form not in ROWS:
            raise ValueError(f"--only is {form!r}; it must be one of {', '.join(ROWS)}")
    where = _gpu()
    device = replace(running_device(where), tiles=())
    machine = machine_of(device.name, device.arch)
    path = output or path_of(machine)
    if path is None:
        raise ValueError(
            "there is no home directory to keep the table in; set HEADFOLD_CACHE_DIR or give --output"
        )
    chosen = goals(device, only)
    for form in only:
        if not any(form in goal.forms for goal in chosen):
            raise ValueError(
                f"--only is {form!r}; nothing on {device.name} runs in tiles of that form: leave it out"
            )
    table = begin(path, machine, chosen, again)
    return Work(device, where, tuple(g for g in chosen if not table.has(g.keys)), table, path)


def table_to_show(output: Path | None = None) -> Table | None:
    """The table in a file, or without one the table in force here, None where none is.

    Raises:
        ValueError: no GPU, no such file, or a file that holds no table.
        OSError: the file cannot be read.
    """
    if output is not None:
        table = read(output)
        if table is None:
            raise ValueError(f"--output is {str(output)!r}, and there is no such file to show")
        return table
    where = _gpu()
    return table_in_force(
        machine_of(torch.cuda.get_device_name(where), torch.cuda.get_device_capability(where))
    )


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise ValueError(
            "tune needs an NVIDIA GPU, and PyTorch sees none; decode runs in the built-in tiles everywhere"
        )
    return torch.device("cuda", torch.cuda.current_device())


def begin(path: Path, machine: Machine, chosen: Sequence[Goal], again: bool) -> Table:
    """The table to go on with: what `path` holds, without the chosen goals where they are measured `again`.

    Raises:
        ValueError: `path` holds no table, or one of another machine or other versions, and not `again`.
        OSError: it cannot be read.
    """
    try:
        table = read(path)
    except ValueError as e:
        if again:
            return Table(machine)
        raise ValueError(f"{e}; --again starts over") from e
    if table is None or (again and table.machine != machine):
        return Table(machine)
    for name in (f.name for f in fields(Machine)):
        was, now = getattr(table.machine, name), getattr(machine, name)
        if was != now:
            raise ValueError(f"{path} was measured with {name} {was}, and this is {now}; --again starts over")
    return table.without(key for g in chosen for key in g.keys) if again else table


def run(
    work: Work,
    say: Progress = lambda text: None,
    advance: Progress = lambda goal: None,
    measure: Measure = measure,
) -> tuple[Table, list[str]]:
    """Measure goals, and write the table after each.

    Args:
        work: what there is to do.
        say: told what is being done.
        advance: told the name of each goal before it is measured.
        measure: what times calls.

    Returns:
        The table, and in words what could not be measured.

    Raises:
        DeviceLost: the GPU does not answer any more. What was measured before is written.
        OSError: the table cannot be written.
    """
    tuner, table, problems = Tuner(work.device, work.where, measure, say), work.table, []
    for goal in work.goals:
        advance(goal.name)
        try:
            rows = tuner.tune(goal)
        except NotMeasured as e:
            problems.append(f"{goal.name}: {e}")
            continue
        table = table.with_rows(rows)
        save(table, work.path)
    return table, problems
