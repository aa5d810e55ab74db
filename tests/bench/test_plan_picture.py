"""Pictures of plans: every format, a tooltip for every program, and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from headfold.bench.plan_picture import draw
from headfold.bench.schedule import schedule_of
from headfold.planner import DEVICES
from tests.bench.test_schedule import decode
from tests.test_cli import call, refusal


@pytest.mark.parametrize(
    ("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("html", b"<!doctype")]
)
def test_every_format(tmp_path: Path, suffix: str, start: bytes) -> None:
    schedule = schedule_of(*decode(), DEVICES["h200"], [4096, 100, 2000, 0])
    path = tmp_path / "deep" / f"p.{suffix}"
    draw(schedule, "a plan", path)
    assert path.read_bytes().startswith(start)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_page_tells_the_keys_of_every_program(tmp_path: Path) -> None:
    schedule = schedule_of(*decode(), DEVICES["h200"], [4096, 100, 2000, 0])
    draw(schedule, "a <plan>", tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert page.count("program ") == len(schedule.runs) == 96
    assert "program 0: sequence 0, tile 0, head unit 0, split 0, keys 0 to 1407; 2.7 to " in page
    assert "no keys" in page
    assert "a &lt;plan&gt;" in page
    draw(schedule, "a <plan>", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == page


def test_the_command_draws_a_shape_or_a_case(tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    shape = ("--heads", "32:8", "--batch", "3", "--keys", "4096", "--device", "h200", "--picture", str(page))
    text = call("plan", *shape, "--lengths", "4096, 128,77")
    assert f"picture: {page}" in text.replace("\n", "")
    assert "sequence 2, tile 0" in page.read_text()
    assert "keys 0 to 76" in page.read_text()
    call("plan", *shape)
    assert "keys 0 to 76" not in page.read_text()
    call("plan", "--case", "llama3-8b-ragged-b64-paged16", "--device", "h200", "--picture", str(page))
    assert "to 32528" in page.read_text(), "the longest sequence of the case"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--picture", "p.gif"], "--picture is 'p.gif'; its name must end in .png, .svg, .html"),
        (["--lengths", "5,6"], "--lengths is given without --picture"),
        (["--picture", "p.png", "--lengths", "5,x"], "--lengths is '5,x'"),
        (["--picture", "p.png", "--lengths", "5"], "--lengths has 1 entries up to 5; it must hold 2"),
        (
            ["--picture", "p.png", "--queries", "4096", "--causal"],
            "--picture draws plans of the decode kernels of GPUs",
        ),
        (["--picture", "p.png", "--device", "cpu"], "this one is of the cpu"),
    ],
)
def test_the_command_refuses_in_one_line(args: list[str], message: str) -> None:
    shape = ["--heads", "32:8", "--batch", "2", "--keys", "4096"]
    device = [] if "--device" in args else ["--device", "h200"]
    assert message in refusal("plan", *shape, *device, *args)
