"""What `headfold tune` measures: which tiles are chosen, with which cases, among which candidates."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from headfold.bench.cases import Case
from headfold.bench.catalogue import RAGGED_64
from headfold.bench.features import Features
from headfold.planner import Device, Plan, make_plan
from headfold.planner.tiles import decode_tile
from headfold.planner.tuned import Entry, Form

DIMS = (64, 128, 256)
# What is tried: blocks of 16 to 128 KB of K and V in powers of two. A page look-up takes two stages more.
KEYS = (32, 64, 128, 256)
BLOCK_BYTES = (16 << 10, 128 << 10)
WARPS = (4, 8)
STAGES = (3, 4)
RESIDENT = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Goal:
    """A tile to choose: of one form, or of rows of a cache and of pages, which are computed alike.

    `cases` are what it is measured with, each with the form that it runs in.
    """

    rows: int
    d: int
    cases: tuple[tuple[Form, Case], ...]

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that get the tile."""
        return tuple(dict.fromkeys(form for form, _ in self.cases))

    @property
    def keys(self) -> list[tuple[Form, int, int]]:
        """The rows of the table that it fills."""
        return [(form, self.rows, 2 * self.d) for form in self.forms]

    @property
    def name(self) -> str:
        """Such as "stream+pages, 16 rows, d128"."""
        return f"{'+'.join(self.forms)}, {self.rows} rows, d{self.d}"


def goals(device: Device, only: Sequence[str] = ()) -> list[Goal]:
    """Every goal whose cases run in its form on `device`, or those for the forms of `only`."""
    found = [g for d in DIMS for g in _goals(device, d) if not only or set(g.forms) & set(only)]
    return [g for g in found if _suits(g, device)]


def _goals(device: Device, d: int) -> Iterator[Goal]:
    """The shapes of the built-in table's comments at d128; with other heads as many bytes and as many programs."""
    fill = max(1, device.sms // 8)  # sequences of 8 KV heads that fill the device once
    # Small calls are told apart by the blocks of the built-in tile.
    block = decode_tile(4, d, d, torch.bfloat16, "wave", replace(device, tiles=())).keys
    few = max(1, device.sms // 16) * block

    def dense(heads: int, kv_heads: int, batch: int, sk: int) -> Case:
        return _case("decode", heads, kv_heads, d, batch, 1, sk)

    yield Goal(16, d, (("wave", dense(32, 8, fill, 8192 * 128 // d)),))
    yield Goal(
        16,
        d,
        tuple(("waves", dense(32, 8, n * fill, sk * 128 // d)) for n, sk in ((2, 4096), (8, 2048))),
    )
    yield Goal(16, d, (("few", dense(32, 8, 1, few)),))
    lengths = tuple(n * 128 // d for n in RAGGED_64)
    ragged = _case("ragged decode", 32, 8, d, len(lengths), 1, max(lengths), lengths=lengths)
    yield Goal(
        16, d, (("stream", ragged), ("pages", replace(ragged, name=f"{ragged.name}-p16", page_size=16)))
    )
    if d > 128:
        return  # tiles of more rows are none of the table's: their registers leave no choice
    for rows in (32, 64):
        yield Goal(rows, d, (("wave", dense(rows, 1, 16, 16384 * 128 // d)),))
    steps = _case("speculative", 32, 8, d, 16, 8, 8192 * 128 // d, causal=True)
    in_rows = replace(steps, name=f"{steps.name}-cache", features=Features(cache=True))
    in_pages = replace(steps, name=f"{steps.name}-p16", page_size=16)
    yield Goal(64, d, (("stream", in_rows), ("pages", in_pages)))


def _case(
    kind: str, heads: int, kv_heads: int, d: int, batch: int, sq: int, sk: int, **other: object
) -> Case:
    name = f"{heads}:{kv_heads}-d{d}-b{batch}-q{sq}-s{sk}"
    return Case(name, kind, heads, kv_heads, d, d, batch, sq, sk, **other)  # type: ignore[arg-type]


def _suits(goal: Goal, device: Device) -> bool:
    """True when every case runs in the goal's form: a device of few multiprocessors has no small calls, say, and a Hopper
    GPU has the Gluon kernel for more than 16 rows."""
    smallest = _entries(goal, 16, 4, 2, 1)  # fits any shared memory
    return all(plan.own_tile for plan in _plans(goal, device, smallest))


def _entries(goal: Goal, keys: int, warps: int, stages: int, resident: int) -> tuple[Entry, ...]:
    return tuple(
        Entry(f, goal.rows, 2 * goal.d, keys, warps, stages + 2 * (f == "pages"), resident)
        for f in goal.forms
    )


def _plans(goal: Goal, device: Device, entries: tuple[Entry, ...]) -> list[Plan]:
    own = replace(device, tiles=entries)
    return [make_plan(case.problem("cuda"), own) for _, case in goal.cases]


def candidates(goal: Goal, device: Device) -> list[tuple[Entry, ...]]:
    """Tiles that the planner would run as they are, an entry for each form, no two with the same launches.

    The built-in tile is not among them.
    """
    assert _suits(goal, device), f"{goal.name} runs in another form"
    seen = {_launches(_plans(goal, device, ()))}
    found = []
    for keys, warps, stages, resident in itertools.product(KEYS, WARPS, STAGES, RESIDENT):
        if not BLOCK_BYTES[0] <= keys * 2 * goal.d * 2 <= BLOCK_BYTES[1]:
            continue
        entries = _entries(goal, keys, warps, stages, resident)
        plans = _plans(goal, device, entries)
        stages_of = {e.form: e.stages for e in entries}
        fits = all(
            p.own_tile
            and (p.block_m, p.block_n, p.num_stages, p.resident)
            == (goal.rows, keys, stages_of[form], resident)
            for p, (form, _) in zip(plans, goal.cases, strict=True)
        )
        if fits and (launches := _launches(plans)) not in seen:
            seen.add(launches)
            found.append(entries)
    return found


def _launches(plans: Iterable[Plan]) -> tuple[Plan, ...]:
    """Plans without what no launch depends on."""
    return tuple(replace(p, resident=1, own_tile=False, reasons=()) for p in plans)
