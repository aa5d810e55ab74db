"""A machine's own tiles: what a table may hold, that it survives being written, and what plans make of it."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headfold.planner import DEVICES, make_plan
from headfold.planner.tiles import MEASURED, decode_tile, padded, shared_memory
from headfold.planner.tuned import ALIKE, ROWS, Entry, Form, Row, Table, entries_for, parse, serialise
from tests.planner.problems import GPUS, problem, problems
from tests.planner.tables import MACHINE, entry, entry_sets, pair, row, tables

H200 = DEVICES["h200"]
devices = pytest.mark.parametrize("device", GPUS, ids=DEVICES)
TABLE = Table(MACHINE, (row(entry()), row(entry("few")), *map(row, pair())))


def own(*entries: Entry, device: str = "h200") -> Any:
    """A device that has measured tiles of its own."""
    return replace(DEVICES[device], tiles=entries)


# ---- what a table may hold


def test_forms_and_rows_are_those_of_the_built_in_table() -> None:
    assert {(form, n) for form, rows in ROWS.items() for n in rows} == set(MEASURED)


def test_entries_and_devices_with_them_are_frozen_keys() -> None:
    """Plans are cached by them."""
    with pytest.raises(FrozenInstanceError):
        entry().keys = 64  # type: ignore[misc]
    assert len({own(entry()), own(entry()), own(), H200}) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "waving"}, "form is 'waving'; it must be one of wave, waves, few, stream, pages"),
        ({"form": "few", "rows": 32}, "rows is 32; it must be one of 16"),
        ({"rows": 48}, "rows is 48"),
        ({"width": 16}, "width is 16"),
        ({"width": 528}, "width is 528"),
        ({"width": 200}, "width is 200"),
        ({"keys": 48}, "keys is 48"),
        ({"keys": 8}, "keys is 8"),
        ({"keys": 512}, "keys is 512"),
        ({"warps": 3}, "warps is 3"),
        ({"warps": 32}, "warps is 32"),
        ({"stages": 1}, "stages is 1"),
        ({"stages": 9}, "stages is 9"),
        ({"resident": 0}, "resident is 0"),
    ],
    ids=str,
)
def test_a_tile_that_there_is_none_of_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry(**change)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((entry(), entry(keys=64)), "two (entries|rows) for wave of 16 rows, width 256"),
        (pair()[:1], r"stream and pages of 16 rows, width 256, .* \(32, 2, 3\) and None"),
        (pair()[1:], r"stream and pages of 16 rows, width 256, .* None and \(32, 2, 3\)"),
        (pair(width=128)[:1] + pair(width=256)[1:], "stream and pages of 16 rows, width 128"),
        ((pair()[0], replace(pair()[1], keys=64)), r"\(32, 2, 3\) and \(64, 2, 3\); they must be the same"),
        ((pair()[0], replace(pair()[1], warps=4)), r"\(32, 2, 3\) and \(32, 4, 3\); they must be the same"),
        (
            (pair()[0], replace(pair()[1], resident=1)),
            r"\(32, 2, 3\) and \(32, 2, 1\); they must be the same",
        ),
    ],
)
def test_a_device_refuses_entries_that_break_equal_bits(entries: tuple[Entry, ...], message: str) -> None:
    """Programs on a multiprocessor count too: the cuts of a stream, and so its bits, depend on them."""
    with pytest.raises(ValueError, match=message):
        own(*entries)
    with pytest.raises(ValueError, match=message):
        Table(MACHINE, tuple(map(row, entries)))


def test_stages_of_rows_and_pages_may_differ() -> None:
    one, other = pair()
    assert own(one, replace(other, stages=7)).tiles[0].stages == 4


def test_a_pair_of_which_one_keeps_the_built_in_tile_is_refused() -> None:
    one, other = pair()
    with pytest.raises(ValueError, match="stream and pages of 16 rows"):
        Table(MACHINE, (row(one), replace(row(other), entry=None)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"us": 0.0}, "us is 0.0; it must be a positive number"),
        ({"us": float("nan")}, "us is nan"),
        ({"builtin_us": float("inf")}, "builtin_us is inf"),
        ({"left_out": 41}, "left_out is 41"),
        ({"left_out": -1}, "left_out is -1"),
    ],
    ids=str,
)
def test_a_row_of_impossible_figures_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row(entry(), **change)


def test_rows_replace_those_of_the_same_tile() -> None:
    table = Table(MACHINE).with_rows([row(entry()), row(entry("few"))])
    assert table.has([("wave", 16, 256), ("few", 16, 256)])
    assert not table.has([("wave", 16, 256), ("waves", 16, 256)])
    again = table.with_rows([row(None, us=100.0)])
    assert again.entries == (entry("few"),)
    assert len(again.rows) == 2
    assert again.without([("wave", 16, 256)]).rows == table.without([("wave", 16, 256)]).rows
    with pytest.raises(ValueError, match="two rows for wave of 16 rows, width 256"):
        Table(MACHINE, (row(entry()), row()))


# ---- JSON


@given(tables())
def test_a_table_survives_being_written(table: Table) -> None:
    assert parse(serialise(table), "x") == table
    assert parse(serialise(table).encode(), "x") == table


def edited(**changes: Any) -> str:
    """The JSON of TABLE with fields changed, or dropped where the value is `...`."""
    data = {**json.loads(serialise(TABLE)), **changes}
    return json.dumps({k: v for k, v in data.items() if v is not ...})


def edited_tile(**changes: Any) -> str:
    """The same for its first tile."""
    tiles = json.loads(serialise(TABLE))["tiles"]
    tiles[0] = {k: v for k, v in {**tiles[0], **changes}.items() if v is not ...}
    return edited(tiles=tiles)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.json is not JSON"),
        ("{", "t.json is not JSON"),
        (b"\xff\xfe{}", "t.json is not JSON"),
        ("[" * 100_000, "t.json is not JSON"),
        (edited()[:-20], "t.json is not JSON"),
        ("[]", "t.json is a list; it must be an object"),
        (edited(schema=2), "schema is 2; this version reads 1"),
        (edited(schema=True), "schema is True; it must be int"),
        (edited(triton=...), "triton is missing"),
        (edited(colour="red"), "colour is unknown"),
        (edited(device=7), "device is 7; it must be str"),
        (edited(arch=[9]), r"arch is \[9\]; it must be two numbers"),
        (edited(arch=["9", 0]), r"arch is \['9', 0\]"),
        (edited(tiles={}), r"tiles is {}; it must be list"),
        (edited(tiles=[3]), r"tiles\[0\] is a int; it must be an object"),
        (edited_tile(keys=...), r"tiles\[0\]: keys is missing"),
        (edited_tile(speed=1), r"tiles\[0\]: speed is unknown"),
        (edited_tile(keys="64"), r"tiles\[0\]: keys is '64'; it must be int or null"),
        (edited_tile(warps=True), r"tiles\[0\]: warps is True"),
        (edited_tile(warps=4.0), r"tiles\[0\]: warps is 4.0"),
        (edited_tile(keys=None), r"tiles\[0\]: keys is null; all of keys, warps, stages, resident must be"),
        (edited_tile(keys=48), r"tiles\[0\]: keys is 48"),
        (edited_tile(form="x"), r"tiles\[0\]: form is 'x'"),
        (edited_tile(us=float("nan")), r"tiles\[0\]: us is nan"),
        (edited_tile(us=10**400), r"tiles\[0\]: "),
        (edited_tile(left_out=99), r"tiles\[0\]: left_out is 99"),
        (
            edited_tile(form="x", **dict.fromkeys(("keys", "warps", "stages", "resident"))),
            r"tiles\[0\]: form is 'x'",
        ),
        (edited(tiles=json.loads(serialise(TABLE))["tiles"] * 2), "two rows for wave"),
        (edited(tiles=json.loads(serialise(TABLE))["tiles"][:-1]), "stream and pages of 16 rows"),
    ],
)
def test_what_is_no_table_is_refused_with_where_and_why(text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        parse(text, "t.json")
    assert str(raised.value).startswith("t.json")


@pytest.mark.parametrize("name", ["device", "arch", "triton"])
def test_another_machine_says_what_is_different(name: str) -> None:
    value = (8, 9) if name == "arch" else "another"
    assert name in replace(MACHINE, **{name: value}).unlike(MACHINE)


def test_other_versions_of_headfold_and_torch_are_the_same_machine() -> None:
    """Their kernels are compiled by the same Triton; `headfold tune` itself goes on with equal versions only."""
    assert replace(MACHINE, headfold="9", torch="9").unlike(MACHINE) == ""


# ---- what plans make of it


@pytest.mark.parametrize(("form", "rows"), MEASURED)
def test_an_own_tile_comes_before_the_built_in_one(form: Form, rows: int) -> None:
    entries = pair(rows) if form in ALIKE else (entry(form, rows),)
    tile = decode_tile(rows, 128, 128, torch.bfloat16, form, own(*entries))
    stages = 6 if form == "pages" else 4
    assert (tile.rows, tile.keys, tile.warps, tile.stages) == (rows, 32, 2, stages)
    assert tile.own
    # Other forms, rows and widths keep theirs.
    for other, n in MEASURED:
        for d in (64, 128, 256):
            if (other, n, d) != (form, rows, 128) and not {other, form} <= set(ALIKE):
                args = (n, d, d, torch.bfloat16, other)
                assert decode_tile(*args, own(*entries)) == decode_tile(*args, H200)


@pytest.mark.parametrize(
    ("rows", "d", "dv", "change"),
    [
        (4, 128, 128, {"dtype": torch.float32}),
        (4, 128, 128, {"aligned": False}),
        (4, 128, 128, {"tensor_mask": True}),
        (4, 128, 128, {"rotary": True}),
        (4, 160, 96, {}),  # 128 + 32 and 64 + 32 columns: heads in two parts
        (64, 192, 64, {}),
        (64, 256, 256, {}),  # more columns than the built-in table is about
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ROWS)
def test_what_was_not_measured_keeps_the_built_in_tile(
    form: Form, rows: int, d: int, dv: int, change: dict[str, Any]
) -> None:
    """float32, unaligned rows, masks, rotation, heads in two parts."""
    width = padded(d) + padded(dv)
    entries = [e for n in (16, 64) for e in pair(n, width)]
    entries += [entry(f, n, width) for f in ("wave", "waves", "few") for n in ROWS[f]]
    args: dict[str, Any] = {"dtype": torch.float16, "form": form, **change}
    tiles = [decode_tile(rows, d, dv, device=device, **args) for device in (H200, own(*entries))]
    assert tiles[0] == tiles[1]
    assert not tiles[1].own


def test_features_without_tensors_run_in_own_tiles() -> None:
    """As they run in the built-in ones, which were measured without features too."""
    assert decode_tile(4, 128, 128, torch.bfloat16, "wave", own(entry()), featured=True).own


@devices
@given(entry_sets(), st.sampled_from((32, 64, 128, 256)), st.sampled_from(list(MEASURED)))
def test_own_tiles_fit_shared_memory_and_pages_stay_as_rows(
    device: Any, entries: tuple[Entry, ...], d: int, at: tuple[Form, int]
) -> None:
    """An entry that asks for too much gives way to the built-in tile, for rows of a cache and pages alike."""
    form, rows = at
    mine = replace(device, tiles=entries)
    tile = decode_tile(rows, d, d, torch.bfloat16, form, mine)
    assert tile.rows == decode_tile(rows, d, d, torch.bfloat16, form, device).rows
    assert tile.resident * shared_memory(tile, d, d, torch.bfloat16, paged=form == "pages") <= device.smem
    wanted = entries_for(entries, (form,), rows, 2 * d).get(form)
    if tile.own:
        assert wanted is not None
        assert (tile.keys, tile.warps, tile.stages) == (wanted.keys, wanted.warps, wanted.stages)
        assert tile.resident <= wanted.resident
    else:
        assert tile == decode_tile(rows, d, d, torch.bfloat16, form, device)
    if form in ALIKE:
        twins = [decode_tile(rows, d, d, torch.bfloat16, f, mine) for f in ALIKE]
        assert replace(twins[0], stages=0) == replace(twins[1], stages=0)


def test_an_entry_that_does_not_fit_gives_way_to_the_built_in_tile() -> None:
    """Too many keys, or too many stages even for 16 keys; too many programs become as many as fit."""
    for tile in ({"keys": 256, "stages": 3}, {"keys": 16, "stages": 8, "width": 512}):
        e = entry(**tile)
        args = (4, e.width // 2, e.width // 2, torch.bfloat16, "wave")
        assert decode_tile(*args, own(e, device="l4")) == decode_tile(*args, DEVICES["l4"])  # type: ignore[arg-type]
    tile = decode_tile(
        4, 128, 128, torch.bfloat16, "wave", own(entry(keys=64, stages=3, resident=2), device="l4")
    )
    assert (tile.own, tile.keys, tile.resident) == (True, 64, 1)


def test_pages_that_do_not_fit_take_the_rows_with_them() -> None:
    """Stages of the one alone ask for too much: both run in the built-in tile, and give the same bits."""
    rows, pages = pair(keys=64, stages=3, resident=1)
    mine = own(rows, replace(pages, stages=8), device="l4")
    for form in ALIKE:
        args = (4, 128, 128, torch.bfloat16, form)
        assert decode_tile(*args, mine) == decode_tile(*args, DEVICES["l4"])
        assert decode_tile(*args, own(rows, pages, device="l4")).own


@given(problems(), entry_sets(), st.sampled_from(GPUS))
def test_plans_with_a_table_are_pure_and_cached(p: Any, entries: tuple[Entry, ...], device: Any) -> None:
    mine = replace(device, tiles=entries)
    plan = make_plan(p, mine)
    assert make_plan(replace(p), replace(device, tiles=tuple(replace(e) for e in entries))) is plan
    assert make_plan.__wrapped__(p, mine) == plan


@given(problems(), entry_sets(), st.sampled_from(GPUS))
def test_a_table_changes_tiles_and_splits_alone(p: Any, entries: tuple[Entry, ...], device: Any) -> None:
    """Never the kernel, the fold, the rows or the form: what was measured for a form is then what runs in it."""
    mine, built_in = make_plan(p, replace(device, tiles=entries)), make_plan(p, device)
    for name in ("backend", "kernel", "fold", "block_m", "tiles", "stream", "extent", "early", "featured"):
        assert getattr(mine, name) == getattr(built_in, name), name
    assert (mine.ranges > 0) == (built_in.ranges > 0)
    if not mine.own_tile:
        assert mine == built_in


@given(problems(), entry_sets(), st.sampled_from(GPUS))
def test_pages_are_cut_as_rows_with_a_table_too(p: Any, entries: tuple[Entry, ...], device: Any) -> None:
    """The same keys, warps, splits and ranges: the same bits."""
    mine = replace(device, tiles=entries)
    p = replace(p, kv_layout="dense", page_size=0, lengths_on_device=True)
    plans = [make_plan(q, mine) for q in (p, replace(p, kv_layout="paged", page_size=16))]
    if plans[0].kernel == plans[1].kernel == "decode":
        for name in (
            "block_m",
            "block_n",
            "num_warps",
            "num_splits",
            "ranges",
            "even_ranges",
            "gap",
            "own_tile",
        ):
            assert len({getattr(plan, name) for plan in plans}) == 1, name


def test_explain_says_where_the_tile_comes_from() -> None:
    p = problem()
    words = "the tile comes from this machine's own table"
    assert words in make_plan(p, own(entry())).explain(p, own(entry()))
    assert words not in make_plan(p, own(entry("few"))).explain(p, own(entry("few")))
    assert words not in make_plan(p, H200).explain(p, H200)


def test_named_devices_have_no_table() -> None:
    """`headfold plan --device h200` says the same everywhere."""
    assert [d.tiles for d in DEVICES.values()] == [()] * len(DEVICES)


def test_a_row_names_its_tile() -> None:
    assert isinstance(row(entry("few")), Row)
    assert row(entry("few")).key == ("few", 16, 256)
