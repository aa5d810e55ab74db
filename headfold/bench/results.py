"""Results: what a run of the benchmark found, and its JSON form, checked when it is read back."""

from __future__ import annotations

import fnmatch
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from headfold.bench.names import APPENDED, OWN, PREFILLS, TORCH_PREFIX

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation on one case. Figures are None where it failed; `note` then says why.

    `gbps` counts K and V read once, `tflops` the visible pairs. `ceiling_fraction` is the read time of the
    same bytes over the median, or for prefill TFLOP/s over a large matrix product's.
    """

    case: str
    kind: str
    implementation: str
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    gbps: float | None = None
    tflops: float | None = None
    ceiling_fraction: float | None = None
    max_error: float | None = None
    note: str | None = None


SKIPPED = "skipped: "
"""How the note of a row begins that was left out for lack of memory: no failure of the implementation."""


def is_skipped(row: Row) -> bool:
    """True for a row that was left out for lack of memory."""
    return row.note is not None and row.note.startswith(SKIPPED)


@dataclass(slots=True)
class Result:
    """A run: what ran where, from which commit and versions, under which ceilings, and the rows.

    `options` are the options that change what a case measures, by their names on the command line.
    """

    device: str
    device_facts: dict[str, Any]
    versions: dict[str, str | None]
    commit: str | None
    command: str
    date: str
    ceilings: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    cases: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    def of_case(self, case: str) -> list[Row]:
        """The rows of a case."""
        return [r for r in self.rows if r.case == case]

    def only(self, globs: Sequence[str]) -> Result:
        """This result with the cases alone whose names match any of the globs; all of them where there is none.

        Raises:
            ValueError: a glob that matches no case.
        """
        for glob in globs:
            if not fnmatch.filter([r.case for r in self.rows], glob):
                raise ValueError(f"--case is {glob!r}, which matches no case of this result")
        rows = [r for r in self.rows if not globs or any(fnmatch.fnmatch(r.case, g) for g in globs)]
        kept = {r.case for r in rows}
        return replace(self, rows=rows, cases={n: c for n, c in self.cases.items() if n in kept})

    def own(self, case: str) -> Row | None:
        """headfold's row of a case, if it has a time."""
        return self._timed(case, OWN)

    def _timed(self, case: str, implementation: str) -> Row | None:
        rows = (r for r in self.of_case(case) if r.implementation == implementation)
        return next((r for r in rows if r.median_us), None)

    def own_failures(self) -> list[Row]:
        """headfold's rows without a time, but for cases that memory could not hold."""
        return [r for r in self.rows if r.implementation == OWN and r.median_us is None and not is_skipped(r)]

    def torch_best(self, case: str) -> Row | None:
        """The fastest of PyTorch's own ways for a case, if any has a time."""
        timed = [r for r in self.of_case(case) if r.implementation.startswith(TORCH_PREFIX) and r.median_us]
        return min(timed, key=lambda r: r.median_us or 0.0, default=None)

    def best_other(self, case: str) -> Row | None:
        """The fastest implementation of a case that is not headfold, if any has a time."""
        timed = [r for r in self.of_case(case) if not r.implementation.startswith(OWN) and r.median_us]
        return min(timed, key=lambda r: r.median_us or 0.0, default=None)

    def lead(self, kind: str | None = None) -> tuple[float, int, int] | None:
        """headfold against the best other implementation of each case, features left out: the geometric mean of
        that one's time over headfold's, in how many cases headfold is first, and of how many; None of no case.

        `kind` is "prefill", which ragged ones are too, or None for all other kinds.
        """
        ratios = []
        for name, case in self.cases.items():
            own, other = self.own(name), self.best_other(name)
            if own is None or other is None or case.get("features") or case.get("base"):
                continue
            if (own.kind in PREFILLS) == (kind == "prefill"):
                ratios.append((other.median_us or 0.0) / (own.median_us or 1.0))
        if not ratios:
            return None
        return math.exp(statistics.fmean(map(math.log, ratios))), sum(r >= 1 for r in ratios), len(ratios)

    def beside_base(self, case: str) -> tuple[Row, Row] | None:
        """headfold's rows of a case with features and of the plain case it is compared with, if both have times.

        A case that appends is compared with its own attention where that was timed: in turn with it, on the same tensors.
        """
        base = self.cases[case].get("base")
        plain = self._timed(case, APPENDED) or (None if base is None else self.own(base))
        own = self.own(case)
        return None if own is None or plain is None else (own, plain)

    def speedup(self, row: Row) -> float | None:
        """PyTorch's best time over the row's, or None where one of them is missing."""
        best = self.torch_best(row.case)
        if best is None or not row.median_us or not best.median_us:
            return None
        return best.median_us / row.median_us

    def save(self, path: Path) -> None:
        """Write the JSON form. A reader never sees half a file."""
        text = json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read and check a file that `save` wrote.

        Raises:
            ValueError: not JSON, a missing or unknown field, or one of the wrong kind; the message names it.
            OSError: the file cannot be read.
        """
        try:
            data = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(
                f"{path} is not JSON ({e}); it must be a file that `headfold bench --json` wrote"
            ) from e
        return cls._checked(data, str(path))

    @classmethod
    def _checked(cls, data: object, where: str) -> Result:
        kinds: dict[str, tuple[type, ...]] = {
            "device": (str,),
            "device_facts": (dict,),
            "versions": (dict,),
            "commit": (str, type(None)),
            "command": (str,),
            "date": (str,),
            "ceilings": (dict,),
            "options": (dict,),
            "cases": (dict,),
            "rows": (list,),
            "schema": (int,),
        }
        top = _check_fields(data, kinds, where)
        if top["schema"] != SCHEMA:
            raise ValueError(f"{where}: schema is {top['schema']}; this version reads {SCHEMA}")
        number = (float, int, type(None))
        row_kinds: dict[str, tuple[type, ...]] = {f.name: number for f in fields(Row)}
        row_kinds.update(case=(str,), kind=(str,), implementation=(str,), note=(str, type(None)))
        rows = [Row(**_check_fields(r, row_kinds, f"{where}: rows[{i}]")) for i, r in enumerate(top["rows"])]
        for i, row in enumerate(rows):
            if row.case not in top["cases"]:
                raise ValueError(f"{where}: rows[{i}].case is {row.case!r}, which `cases` does not describe")
        return cls(**{**top, "rows": rows})


def _check_fields(data: object, kinds: dict[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}; it must be an object")
    _check_names(data.keys(), kinds.keys(), where)
    for name, allowed in kinds.items():
        if not isinstance(data[name], allowed) or isinstance(data[name], bool):
            need = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise ValueError(f"{where}: {name} is {data[name]!r}; it must be {need}")
    return data


def _check_names(got: Iterable[str], want: Iterable[str], where: str) -> None:
    missing, unknown = sorted(set(want) - set(got)), sorted(set(got) - set(want))
    if missing:
        raise ValueError(f"{where}: {missing[0]} is missing")
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} is unknown")
