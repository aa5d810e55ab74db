"""Showing a result in the terminal: a table, the failures in words, the command that repeats each case."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box, progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from headfold.bench.names import OWN, PREFILLS, TORCH_PREFIX
from headfold.bench.results import Result, Row, is_skipped

if TYPE_CHECKING:
    from headfold.bench.cases import Case
    from headfold.bench.peers import Implementation
    from headfold.bench.predict import Prediction
    from headfold.planner.tuned import Table as TileTable

WIDE = 190  # columns where no terminal says how many there are, so that a log stays in one line a row


def console(stderr: bool = False) -> Console:
    """A console that does not fold the table when output goes to a file."""
    c = Console(stderr=stderr, highlight=False)
    return c if c.is_terminal else Console(stderr=stderr, highlight=False, width=WIDE)


class Progress:
    """What is being done: a bar in a terminal, a line for each case in a log."""

    def __init__(self, total: int) -> None:
        self._console = console(stderr=True)
        self._total, self._done = total, 0
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            console=self._console,
            transient=True,
            auto_refresh=False,  # a thread that draws would disturb what is measured
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total)
        self._case = ""

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Show what is being done for the case at hand."""
        description = escape(f"{self._case}: {text}" if self._case else text)
        self._bar.update(self._task, description=description, refresh=True)

    def advance(self, case: str) -> None:
        """Go on to a case."""
        self._bar.update(self._task, completed=self._done)
        self._done += 1
        self._case = case
        if not self._console.is_terminal:
            self._console.print(Text(f"[{self._done}/{self._total}] {case}"))


def show_cases(cases: Sequence[Case], peers: Sequence[Implementation], out: Console) -> None:
    """Print the cases and the implementations that can be named."""
    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in (
        "Case",
        "Kind",
        "Heads",
        "Dim",
        "Batch",
        "Queries",
        "Keys",
        "Page",
        "Mask",
        "dtype",
        "Features",
    ):
        t.add_column(name, no_wrap=True)
    for c in cases:
        dim = str(c.d) if c.d == c.dv else f"{c.d}/{c.dv}"
        keys = str(c.sk) if c.lengths is None else f"{min(c.lengths)} to {c.sk}"
        keys += f", {c.shared} shared" if c.shared else ""
        mask, page = "causal" if c.causal else "", str(c.page_size or "")
        features = ", ".join(sorted(c.features.names))
        t.add_row(
            *(
                c.name,
                c.kind,
                f"{c.heads}:{c.kv_heads}",
                dim,
                str(c.batch),
                str(c.sq),
                keys,
                page,
                mask,
                c.dtype,
            ),
            features,
        )
    out.print(t)
    out.print(Text("Implementations", style="bold"))
    for peer in peers:
        missing = peer.available()
        out.print(Text(f"  {peer.name:18} {peer.about}" + (f" (not here: {missing})" if missing else "")))


def show(result: Result, out: Console) -> None:
    """Print a whole result."""
    out.print(Text(_machine_line(result)))
    out.print(Text(_ceiling_line(result)))
    out.print(table(result))
    costs = feature_table(result)
    if costs.row_count:
        out.print(Text("What features cost: headfold beside the plain case of the same run", style="bold"))
        out.print(costs)
    _show_lead(result, out)
    _show_notes(result, out)
    out.print(Text("Repeat one case alone", style="bold"))
    for name in result.cases:
        out.print(Text(f"  {repeat_command(result, name)}"), soft_wrap=True)


def feature_table(result: Result) -> Table:
    """One line for each case that has features and whose plain case was measured too."""
    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("Case", no_wrap=True)
    t.add_column("Time", justify="right", no_wrap=True)
    t.add_column("Plain case", no_wrap=True)
    for name in ("Its time", "Ratio", "Difference"):
        t.add_column(name, justify="right", no_wrap=True)
    for case in result.cases:
        pair = result.beside_base(case)
        if pair is None or not pair[0].median_us or not pair[1].median_us:
            continue
        us, base_us = pair[0].median_us, pair[1].median_us
        sign = "-" if us < base_us else "+"
        t.add_row(
            *(case, _time(us), _plain_name(case, pair[1]), _time(base_us), f"{us / base_us:.3f}"),
            f"{sign}{_time(abs(us - base_us))}",
        )
    return t


def _plain_name(case: str, plain: Row) -> str:
    return plain.case if plain.case != case else f"itself, {plain.implementation}"


def show_predictions(found: Sequence[Prediction], out: Console) -> None:
    """Print predicted beside measured times, and how many are near."""
    if not found:
        out.print(Text("No case here has a predicted time: only decode on a GPU has"))
        return
    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("Case", no_wrap=True)
    for name in ("Predicted", "Measured", "Error"):
        t.add_column(name, justify="right", no_wrap=True)
    for p in found:
        error = Text(f"{p.error:+.1%}", style="green" if p.is_near else "red")
        t.add_row(p.case, _time(p.predicted_us), _time(p.measured_us), error)
    out.print(Text("The planner's predictions", style="bold"))
    out.print(t)
    near = sum(p.is_near for p in found)
    out.print(
        Text(f"within 20 % of the measured time: {near} of {len(found)} rows ({near / len(found):.0%})")
    )


def show_tiles(table: TileTable, out: Console) -> None:
    """Print a machine's own decode tiles, a line for each tile that was measured."""
    m = table.machine
    out.print(
        Text(
            f"{m.device}, sm_{m.arch[0]}{m.arch[1]}, headfold {m.headfold}, torch {m.torch}, Triton {m.triton}: "
            f"{len(table.entries)} of {len(table.rows)} tiles are not the built-in ones"
        )
    )
    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("Form", no_wrap=True)
    for name in ("Rows", "Width", "Keys", "Warps", "Stages", "On a multiprocessor"):
        t.add_column(name, justify="right", no_wrap=True)
    for name in ("Time", "Built-in tile's", "Ratio", "Tried", "Left out"):
        t.add_column(name, justify="right", no_wrap=True)
    for r in table.rows:
        e = r.entry
        tile = ("built in", "", "", "") if e is None else map(str, (e.keys, e.warps, e.stages, e.resident))
        times = (_time(r.us), _time(r.builtin_us), f"{r.us / r.builtin_us:.3f}")
        t.add_row(r.form, str(r.rows), str(r.width), *tile, *times, str(r.candidates), str(r.left_out))
    out.print(t)


def _show_lead(result: Result, out: Console) -> None:
    for name, kind in (("Decode", None), ("Prefill", "prefill")):
        lead = result.lead(kind)
        if lead is not None:
            mean, first, cases = lead
            out.print(
                Text(
                    f"{name}: the best other implementation takes {mean:.2f}x headfold's time, geometric mean of "
                    f"{cases} case{'s' if cases > 1 else ''}; headfold is first in {first}"
                )
            )


def _show_notes(result: Result, out: Console) -> None:
    """Print every note once, with the cases that it is about."""
    about: dict[tuple[str, str], list[Row]] = {}
    for row in result.rows:
        if row.note is not None:
            about.setdefault((row.implementation, row.note), []).append(row)
    if about:
        out.print(Text("Notes", style="bold"))
    for (implementation, note), rows in about.items():
        where = ", ".join(r.case for r in rows) if len(rows) <= 3 else f"{len(rows)} cases"
        out.print(Text(f"  {implementation}: {note} ({where})", style=_note_style(rows[0])), soft_wrap=True)


def table(result: Result) -> Table:
    """One line for each implementation that is not PyTorch's; the best of PyTorch's stands beside it."""
    t = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    t.add_column("Case", no_wrap=True)
    t.add_column("Kind", no_wrap=True)
    t.add_column("Implementation", no_wrap=True)
    for name in ("Time (p10 - p90)", "Rate", "Ceiling", "PyTorch's best", "Speedup", "Max error"):
        t.add_column(name, justify="right", no_wrap=True)
    for case in result.cases:
        rows = [r for r in result.of_case(case) if not r.implementation.startswith(TORCH_PREFIX)]
        for i, row in enumerate(rows):
            t.add_row(*_cells(result, row, first=i == 0), style=None if row.implementation == OWN else "dim")
    return t


def _cells(result: Result, row: Row, first: bool) -> list[Text | str]:
    case, kind = (row.case, row.kind) if first else ("", "")
    if row.median_us is None:
        return [case, kind, row.implementation, Text("see notes", style=_note_style(row)), *[""] * 5]
    best, speedup = result.torch_best(row.case), result.speedup(row)
    rate = f"{_number(row.tflops)} TFLOP/s" if row.kind in PREFILLS else f"{_number(row.gbps)} GB/s"
    return [
        case,
        kind,
        row.implementation,
        f"{_time(row.median_us)} ({_time(row.p10_us)} - {_time(row.p90_us)})",
        rate,
        "" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}",
        f"{best.implementation.removeprefix(TORCH_PREFIX)} {_time(best.median_us)}" if best and first else "",
        "" if speedup is None else Text(f"{speedup:.2f}x", style="green" if speedup >= 1 else "red"),
        "" if row.max_error is None else f"{row.max_error:.1e}",
    ]


def _time(us: float | None) -> str:
    if us is None:
        return ""
    if us >= 10_000:
        return f"{us / 1e3:.1f} ms"
    return f"{us:.0f} us" if us >= 1000 else f"{us:.1f} us"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _note_style(row: Row) -> str:
    failed = row.implementation == OWN and row.median_us is None and not is_skipped(row)
    return "red" if failed else "dim"


def _machine_line(result: Result) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items() if version)
    own = result.device_facts.get("own_tiles")
    tiles = f"; {own} decode tiles of the machine's own table" if own else ""
    return f"{result.device}; {versions}; commit {result.commit or 'unknown'}{tiles}"


def _ceiling_line(result: Result) -> str:
    c = result.ceilings
    if "note" in c:
        return f"Ceilings {c['note']}"
    return (
        f"Ceilings measured in this run: read {c['read_gbps']:,.0f} GB/s ({c['read_bytes'] / 1e9:.1f} GB), "
        f"{c['matmul_dtype']} matmul {c['matmul_tflops']:.3g} TFLOP/s"
    )


def repeat_command(result: Result, case: str) -> str:
    """The command that measures one case of a result again, with the same peers."""
    words = ["headfold", "bench", "--case", case, "--device", str(result.device_facts["type"])]
    for option, value in result.options.items():
        for one in value if isinstance(value, list) else [value]:
            words += [f"--{option}"] if one is True else [f"--{option}", str(one)]
    return shlex.join(words)
