"""A machine's own decode tiles: the table that `headfold tune` measures, as values and as JSON.

A table replaces tiles of `tiles.MEASURED`. It changes how fast a call is, never which kernel runs it or what it means.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

# How a decode shares its keys out, as far as the tile depends on it: equal shares of contiguous keys in one wave of
# programs, in many, or of few blocks; the stream of contiguous keys; pages.
Form = Literal["wave", "waves", "few", "stream", "pages"]
# The rows of the tiles that each form has.
ROWS: dict[Form, tuple[int, ...]] = {
    "wave": (16, 32, 64),
    "waves": (16,),
    "few": (16,),
    "stream": (16, 64),
    "pages": (16, 64),
}
# Rows of a cache and pages give the same bits: the same keys a block, the same warps, the same cuts.
ALIKE: tuple[Form, Form] = ("stream", "pages")
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One tile of a machine's own table: what the tiles of `form` and `rows` are for heads of `width` columns.

    `width` is padded(d) + padded(dv); the rest is as in `tiles.Tile`.

    Raises:
        ValueError: a number that no tile has.
    """

    form: Form
    rows: int
    width: int
    keys: int
    warps: int
    stages: int
    resident: int

    def __post_init__(self) -> None:
        if self.form not in ROWS:
            raise ValueError(f"form is {self.form!r}; it must be one of {', '.join(ROWS)}")
        _in("rows", self.rows, ROWS[self.form])
        if not 32 <= self.width <= 512 or self.width % 16:
            raise ValueError(f"width is {self.width}; it must be a multiple of 16 from 32 to 512")
        _in("keys", self.keys, (16, 32, 64, 128, 256))
        _in("warps", self.warps, (1, 2, 4, 8, 16))
        _in("stages", self.stages, range(2, 9))
        _in("resident", self.resident, range(1, 9))


def _in(name: str, got: int, allowed: Iterable[int]) -> None:
    if got not in allowed:
        raise ValueError(f"{name} is {got!r}; it must be one of {', '.join(map(str, allowed))}")


def check_entries(entries: Iterable[Entry]) -> None:
    """Refuse entries that no device may have together.

    Raises:
        ValueError: two for the same tile, or rows of a cache and pages that would not give the same bits.
    """
    entries = tuple(entries)
    twice = [k for k, n in Counter((e.form, e.rows, e.width) for e in entries).items() if n > 1]
    if twice:
        raise ValueError("there are two entries for {} of {} rows, width {}".format(*twice[0]))
    rows, pages = (
        {(e.rows, e.width): (e.keys, e.warps, e.resident) for e in entries if e.form == form}
        for form in ALIKE
    )
    for key in sorted(rows.keys() | pages.keys()):
        if rows.get(key) != pages.get(key):
            raise ValueError(
                f"stream and pages of {key[0]} rows, width {key[1]}, have (keys, warps, resident) {rows.get(key)} and "
                f"{pages.get(key)}; they must be the same, for both give the same bits"
            )


def entries_for(
    entries: tuple[Entry, ...], forms: tuple[Form, ...], rows: int, width: int
) -> dict[Form, Entry]:
    """The entries of these forms, by form; none where the built-in tiles are to be used."""
    return {e.form: e for e in entries if e.rows == rows and e.width == width and e.form in forms}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a table was measured with. `arch` is the compute capability; the rest are names and versions."""

    device: str
    arch: tuple[int, int]
    headfold: str
    torch: str
    triton: str

    def unlike(self, here: Machine) -> str:
        """Why this machine's times say nothing of another's tiles; empty where they do."""
        for name in ("device", "arch", "triton"):
            measured, wanted = getattr(self, name), getattr(here, name)
            if measured != wanted:
                return f"it was measured with {name} {measured}, not {wanted}"
        return ""


@dataclass(frozen=True, slots=True)
class Row:
    """What was found for one (form, rows, width). `entry` is None where the built-in tile stays.

    `us` and `builtin_us` are the microseconds of a call in the chosen tile and in the built-in one, the geometric mean
    over the cases. Of `candidates` tiles that were tried, `left_out` did not compile, launch or compute correctly.
    """

    form: Form
    rows: int
    width: int
    entry: Entry | None
    us: float
    builtin_us: float
    candidates: int
    left_out: int

    def __post_init__(self) -> None:
        for name in ("us", "builtin_us"):
            got = getattr(self, name)
            if not (math.isfinite(got) and got > 0):
                raise ValueError(f"{name} is {got}; it must be a positive number of microseconds")
        if not 0 <= self.left_out <= self.candidates:
            raise ValueError(
                f"left_out is {self.left_out}; it must be from 0 to the {self.candidates} candidates"
            )

    @property
    def key(self) -> tuple[Form, int, int]:
        """The tile that this is about."""
        return self.form, self.rows, self.width


@dataclass(frozen=True, slots=True)
class Table:
    """All that was measured on one machine.

    Raises:
        ValueError: rows that no table may have together.
    """

    machine: Machine
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        twice = [key for key, n in Counter(r.key for r in self.rows).items() if n > 1]
        if twice:
            raise ValueError("there are two rows for {} of {} rows, width {}".format(*twice[0]))
        check_entries(self.entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The tiles that are not the built-in ones."""
        return tuple(r.entry for r in self.rows if r.entry is not None)

    def has(self, keys: Iterable[tuple[Form, int, int]]) -> bool:
        """True when every one of these tiles was measured."""
        return {r.key for r in self.rows}.issuperset(keys)

    def without(self, keys: Iterable[tuple[Form, int, int]]) -> Table:
        """This table with these tiles not measured."""
        dropped = set(keys)
        return replace(self, rows=tuple(r for r in self.rows if r.key not in dropped))

    def with_rows(self, rows: Iterable[Row]) -> Table:
        """This table with these rows, in place of those for the same tiles."""
        rows = tuple(rows)
        kept = self.without(r.key for r in rows).rows
        return replace(self, rows=tuple(sorted((*kept, *rows), key=lambda r: (r.width, r.rows, r.form))))


_TILE = ("keys", "warps", "stages", "resident")


def serialise(table: Table) -> str:
    """The JSON form. Where the built-in tile stays, the tile's numbers are null."""
    machine = {f.name: getattr(table.machine, f.name) for f in fields(Machine)}
    tiles = [
        {
            **{name: getattr(r, name) for name in ("form", "rows", "width")},
            **{name: None if r.entry is None else getattr(r.entry, name) for name in _TILE},
            **{name: getattr(r, name) for name in ("us", "builtin_us", "candidates", "left_out")},
        }
        for r in table.rows
    ]
    return json.dumps({"schema": SCHEMA, **machine, "tiles": tiles}, indent=1, allow_nan=False) + "\n"


def parse(text: str | bytes, where: str) -> Table:
    """The table that `serialise` made `text` of.

    Args:
        text: JSON.
        where: what messages call it.

    Raises:
        ValueError: anything else than such a table; the message says what and where.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e})") from e
    kinds: dict[str, tuple[type, ...]] = {
        "schema": (int,),
        **{f.name: (list if f.name == "arch" else str,) for f in fields(Machine)},
        "tiles": (list,),
    }
    top = _checked(data, kinds, where)
    if top["schema"] != SCHEMA:
        raise ValueError(f"{where}: schema is {top['schema']}; this version reads {SCHEMA}")
    arch = top["arch"]
    if len(arch) != 2 or not all(type(n) is int for n in arch):
        raise ValueError(f"{where}: arch is {arch!r}; it must be two numbers, such as [9, 0]")
    machine = Machine(top["device"], (arch[0], arch[1]), top["headfold"], top["torch"], top["triton"])
    rows = tuple(_row(r, f"{where}: tiles[{i}]") for i, r in enumerate(top["tiles"]))
    try:
        return Table(machine, rows)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e


def _row(data: object, where: str) -> Row:
    kinds: dict[str, tuple[type, ...]] = {
        "form": (str,),
        **dict.fromkeys(("rows", "width", "candidates", "left_out"), (int,)),
        **{name: (int, type(None)) for name in _TILE},
        **dict.fromkeys(("us", "builtin_us"), (float, int)),
    }
    row = _checked(data, kinds, where)
    none = [name for name in _TILE if row[name] is None]
    if none and len(none) < len(_TILE):
        raise ValueError(f"{where}: {none[0]} is null; all of {', '.join(_TILE)} must be, or none")
    tile = {name: row.pop(name) for name in _TILE}
    try:
        # A row that keeps the built-in tile names one that there is, too.
        entry = Entry(
            row["form"],
            row["rows"],
            row["width"],
            **({"keys": 16, "warps": 4, "stages": 3, "resident": 1} if none else tile),
        )
        return Row(entry=None if none else entry, **row)
    except (ValueError, OverflowError) as e:  # an integer of hundreds of digits is no float
        raise ValueError(f"{where}: {e}") from e


def _checked(data: object, kinds: Mapping[str, tuple[type, ...]], where: str) -> dict[str, Any]:
    """A JSON object with exactly these fields, each of one of its kinds (true is no number)."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a {type(data).__name__}; it must be an object")
    for name in kinds:
        if name not in data:
            raise ValueError(f"{where}: {name} is missing")
    for name in data:
        if name not in kinds:
            raise ValueError(f"{where}: {name} is unknown")
    for name, allowed in kinds.items():
        if type(data[name]) not in allowed:
            need = " or ".join("null" if k is type(None) else k.__name__ for k in allowed)
            raise ValueError(f"{where}: {name} is {data[name]!r}; it must be {need}")
    return data
