"""Tables of a machine's own tiles: one entry or row with defaults, and hypothesis strategies for any table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from headfold.planner.tuned import ALIKE, ROWS, Entry, Form, Machine, Row, Table

MACHINE = Machine("NVIDIA H200", (9, 0), "0.1.0", "2.13.0", "3.7.1")


def entry(form: Form = "wave", rows: int = 16, width: int = 256, **other: Any) -> Entry:
    """A tile that no device has built in."""
    return Entry(form, rows, width, **{"keys": 32, "warps": 2, "stages": 4, "resident": 3, **other})


def pair(rows: int = 16, width: int = 256, **other: Any) -> tuple[Entry, Entry]:
    """The tiles of rows of a cache and of pages."""
    one = entry("stream", rows, width, **other)
    return one, replace(one, form="pages", stages=one.stages + 2)


def row(of: Entry | None = None, **other: Any) -> Row:
    """What was found for an entry, or for ("wave", 16, 256) where the built-in tile stays."""
    key = ("wave", 16, 256) if of is None else (of.form, of.rows, of.width)
    values: dict[str, Any] = {"us": 90.0, "builtin_us": 100.0, "candidates": 40, "left_out": 2}
    return Row(*key, entry=of, **{**values, **other})


@st.composite
def entry_sets(draw: st.DrawFn) -> tuple[Entry, ...]:
    """Any entries that a device may have, of heads that are whole."""
    found: list[Entry] = []
    tiles = {
        "keys": st.sampled_from((16, 32, 64, 128, 256)),
        "warps": st.sampled_from((1, 2, 4, 8, 16)),
        "resident": st.integers(1, 8),
    }
    for width in draw(st.sets(st.sampled_from((32, 64, 128, 192, 256, 384, 512)), min_size=1)):
        for form, rows in draw(st.sets(st.sampled_from([(f, n) for f in ROWS for n in ROWS[f]]), max_size=8)):
            if form == "pages":
                continue
            tile = {name: draw(values) for name, values in tiles.items()}
            for f in ALIKE if form in ALIKE else (form,):
                found.append(Entry(f, rows, width, stages=draw(st.integers(2, 8)), **tile))
    return tuple(found)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Any table."""
    times = st.floats(1e-3, 1e9)
    machine = Machine(draw(st.text()), draw(st.tuples(st.integers(0, 99), st.integers(0, 9))), *["1.0"] * 3)
    rows = [
        Row(
            *(e.form, e.rows, e.width, e),
            *(draw(times), draw(times)),
            candidates=(n := draw(st.integers(0, 99))),
            left_out=draw(st.integers(0, n)),
        )
        for e in draw(entry_sets())
    ]
    kept = {
        r.key[1:] for r in rows if draw(st.booleans())
    }  # where the built-in tile stays, of pairs for both
    return Table(machine, tuple(replace(r, entry=None) if r.key[1:] in kept else r for r in rows))
