"""Results survive their file, and a file that is not one is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headfold.bench.pictures import draw
from headfold.bench.report import console, repeat_command, show, table
from headfold.bench.results import Result, Row


@pytest.fixture
def result() -> Result:
    shape = {"heads": 8}
    return Result(
        device="A Device",
        device_facts={"type": "cpu", "name": "A Device"},
        versions={"python": "3.12", "torch": "2.11", "triton": None, "cuda": None, "headfold": "0.1.0"},
        commit="0123abc",
        command="headfold bench",
        date="2026-01-01T00:00:00+00:00",
        ceilings={"read_gbps": 30.0, "read_bytes": 2e9, "matmul_tflops": 2.0, "matmul_dtype": "bf16"},
        options={"against": ["fa3", "fa4"], "dtype": "fp16", "no-torch": True},
        cases={"one": shape, "two": shape},
        rows=[
            Row("one", "decode", "headfold", 100.0, 90.0, 110.0, 20.0, 0.1, 0.8, 1e-4),
            Row("one", "decode", "fa3", note="not installed"),
            Row("one", "decode", "torch-sdpa", 300.0, 290.0, 310.0, 7.0, 0.03, 0.2, 1e-4),
            Row("one", "decode", "torch-expand", 250.0, 240.0, 260.0, 8.0, 0.04, 0.3, 1e-4),
            Row("one", "decode", "torch-math", note="RuntimeError: no"),
            Row("two", "prefill", "headfold", note="skipped: it needs 9.0 GB, 1.0 GB are free"),
        ],
    )


def test_round_trip(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.json"
    result.save(path)
    assert Result.load(path) == result
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]


def test_rows_have_the_promised_fields(result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "r.json")
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    figures = {"median_us", "p10_us", "p90_us", "gbps", "tflops", "ceiling_fraction", "max_error"}
    assert set(row) == {"case", "kind", "implementation", "note"} | figures


def _set(data: dict[str, Any], path: tuple[str | int, ...], value: object) -> None:
    *way, last = path
    at: Any = data
    for step in way:
        at = at[step]
    at[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("rows", 0, "median_us"), "fast", "rows[0]: median_us is 'fast'; it must be float or int or null"),
        (("rows", 1, "note"), 3, "rows[1]: note is 3; it must be str or null"),
        (("rows", 0, "speed"), 3, "rows[0]: speed is unknown"),
        (("rows", 0, "case"), "three", "rows[0].case is 'three'"),
        (("rows",), {}, "rows is {}; it must be list"),
        (("commit",), 5, "commit is 5; it must be str or null"),
        (("schema",), 99, "schema is 99; this version reads 1"),
        (("surprise",), 1, "surprise is unknown"),
    ],
)
def test_broken_files_are_refused(
    result: Result, tmp_path: Path, path: tuple[str | int, ...], value: object, message: str
) -> None:
    file = tmp_path / "r.json"
    result.save(file)
    data = json.loads(file.read_text())
    _set(data, path, value)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"r\.json") as e:
        Result.load(file)
    assert message in str(e.value)


def test_missing_fields_and_other_files_are_refused(result: Result, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    result.save(file)
    data = json.loads(file.read_text())
    del data["versions"]
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="versions is missing"):
        Result.load(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is a list; it must be an object"):
        Result.load(file)
    file.write_text("hello")
    with pytest.raises(ValueError, match="is not JSON"):
        Result.load(file)


def test_best_speedup_and_failures(result: Result) -> None:
    own = result.own("one")
    best = result.torch_best("one")
    assert own is not None
    assert best is not None
    assert best.implementation == "torch-expand"
    assert result.speedup(own) == 2.5
    assert result.own("two") is None
    assert result.torch_best("two") is None
    assert result.own_failures() == []  # a case that memory cannot hold is no failure
    result.rows.append(Row("two", "prefill", "headfold", note="RuntimeError: no"))
    assert len(result.own_failures()) == 1


def test_report_says_when_the_tiles_are_the_machines_own(result: Result) -> None:
    """A time in other tiles is not that of headfold as it comes."""
    words = "decode tiles of the machine's own table"
    for facts, said in (({}, False), ({"own_tiles": 0}, False), ({"own_tiles": 3}, True)):
        out = console()
        with out.capture() as captured:
            show(replace(result, device_facts={**result.device_facts, **facts}), out)
        assert (f"; 3 {words}" in captured.get()) == said
        assert (words in captured.get()) == said


def test_report_shows_times_reasons_and_commands(result: Result) -> None:
    out = console()
    with out.capture() as capture:
        show(result, out)
    text = capture.get()
    for part in ("100.0 us (90.0 us - 110.0 us)", "20.0 GB/s", "80%", "expand 250.0 us", "2.50x", "1.0e-04"):
        assert part in text
    assert "fa3: not installed (one)" in text
    assert table(result).row_count == 3
    assert (
        repeat_command(result, "one")
        == "headfold bench --case one --device cpu --against fa3 --against fa4 --dtype fp16 --no-torch"
    )


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_picture(result: Result, tmp_path: Path, suffix: str, start: bytes) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"p.{suffix}"
    draw(result, path)
    assert path.read_bytes().startswith(start)


def test_the_same_result_gives_the_same_picture(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(result, tmp_path / "a.svg")
    draw(result, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_picture_needs_a_time_and_a_known_format(result: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.svg or \.png"):
        draw(result, tmp_path / "p.pdf")
    result.rows = []
    with pytest.raises(ValueError, match="no time of headfold's"):
        draw(result, tmp_path / "p.svg")


def test_a_glob_keeps_its_cases_alone(result: Result) -> None:
    """`--from` with `--case` shows and draws a part; a glob that matches nothing is a mistake."""
    name = result.rows[0].case
    part = result.only([name])
    assert {r.case for r in part.rows} == {name}
    assert result.only([]).rows == result.rows
    with pytest.raises(ValueError, match="matches no case"):
        result.only(["no-such-case*"])
