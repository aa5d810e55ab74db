"""The command line from end to end, on tiny cases."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

import headfold
from headfold import cli
from headfold.bench import selfcheck, shapes, tune
from headfold.bench.commands import app
from headfold.bench.results import Result
from headfold.bench.runner import DeviceLost
from headfold.bench.tune_goals import goals
from headfold.planner import DEVICES, tuned_file
from headfold.planner.tuned import Row, Table
from tests.bench.tiny import TINY, tiny
from tests.planner.tables import pair, row

__all__ = ["tiny"]
H200 = Path(__file__).parents[1] / "benchmarks" / "results" / "h200.json"


def call(*args: str, code: int = 0) -> str:
    """Run a command, check its exit code, and return what it printed."""
    done = CliRunner().invoke(app, list(args))
    assert done.exit_code == code, done.output
    return done.output


def refusal(*args: str) -> str:
    """Run a command that must end in one line and exit code 2."""
    text = call(*args, code=2).strip()
    assert text.startswith("headfold: ")
    assert "\n" not in text
    return text


def test_help_names_every_command() -> None:
    text = call("--help")
    assert all(name in text for name in ("bench", "plan", "check", "tune", "--version"))
    assert call() == text
    for command in ("bench", "plan", "check", "tune"):
        assert "Usage" in call(command, "--help")


def test_version() -> None:
    assert call("--version").strip() == f"headfold {headfold.__version__}"


@pytest.mark.usefixtures("tiny")
def test_bench_from_measuring_to_a_picture(tmp_path: Path) -> None:
    file, picture = tmp_path / "r.json", tmp_path / "p.svg"
    text = call(
        "bench", "--device", "cpu", "--rounds", "2", "--json", str(file), "--against", "sdpa-folded,fa3"
    )
    result = Result.load(file)
    assert len(result.cases) == len(TINY)
    for name in result.cases:
        own = result.own(name)
        assert own is not None, result.of_case(name)
        assert own.max_error is not None
        assert result.torch_best(name) is not None
        assert f"--case {name} --device cpu" in text
    assert result.ceilings["read_gbps"] > 0
    assert result.versions["headfold"] == headfold.__version__
    assert result.device_facts["type"] == "cpu"
    pytest.importorskip("matplotlib")
    call("bench", "--from", str(file), "--picture", str(picture))
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.usefixtures("tiny")
def test_bench_takes_globs_dtypes_and_leaves_torch_out(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    args = ("--case", "tiny-d*", "--case", "tiny-mha", "--dtype", "fp32", "--no-torch", "--rounds", "1")
    call("bench", "--device", "cpu", "--json", str(file), *args)
    result = Result.load(file)
    assert list(result.cases) == ["tiny-decode", "tiny-mha"]
    assert {r.implementation for r in result.rows} == {"headfold"}
    assert {shape["dtype"] for shape in result.cases.values()} == {"fp32"}


@pytest.mark.parametrize(
    ("suite", "peers"), [("decode", "cudnn,flash,fa3"), ("prefill", "cudnn,flash,fa3,fa4")]
)
@pytest.mark.usefixtures("tiny")
def test_bench_takes_the_names_of_peers_in_one_list(tmp_path: Path, suite: str, peers: str) -> None:
    file, library = tmp_path / "r.json", tmp_path / "fa3.so"
    library.touch()
    args = ("--suite", suite, "--against", peers, "--fa3-library", str(library), "--against", "sdpa-folded")
    text = call("bench", "--device", "cpu", "--rounds", "1", "--json", str(file), *args)
    result = Result.load(file)
    asked = {"fa3", "fa4", "sdpa-folded"} if "fa4" in peers else {"fa3", "sdpa-folded"}
    assert asked <= {r.implementation for r in result.rows}
    assert {"torch-cudnn", "torch-flash"} <= {r.implementation for r in result.rows}
    assert result.options["against"] == [*peers.split(","), "sdpa-folded"]
    assert f"--against fa3 {'--against fa4 ' if 'fa4' in peers else ''}" in text
    assert f"--fa3-library {library}" in text


@pytest.mark.usefixtures("tiny")
def test_bench_fails_when_headfold_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a broken kernel")

    monkeypatch.setattr(headfold, "flash_attn_func", broken)
    file = tmp_path / "r.json"
    text = call(
        "bench", "--device", "cpu", "--case", "tiny-mha", "--json", str(file), "--rounds", "1", code=1
    )
    assert "headfold: RuntimeError: a broken kernel (tiny-mha)" in text
    assert Result.load(file).torch_best("tiny-mha") is not None


def test_bench_lists_cases_and_peers() -> None:
    text = call("bench", "--list", "--device", "cuda")
    assert "glm4.7-decode-b4-s65536" in text
    assert "flashinfer" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--suite", "everything"], "--suite is 'everything'"),
        (["--device", "tpu"], "--device is 'tpu'"),
        (["--case", "no-such-*"], "--case is 'no-such-*'"),
        (["--dtype", "int8"], "--dtype is 'int8'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--device", "cpu", "--against", "fa9"], "--against is 'fa9'"),
        (["--device", "cpu", "--against", "fa3", "--fa3-library", "x.so"], "--fa3-library is 'x.so'"),
        (["--picture", "x.gif"], "--picture is 'x.gif'"),
        (["--from", "/no/such.json"], "/no/such.json: No such file"),
    ],
)
def test_bench_refuses_in_one_line(args: list[str], message: str) -> None:
    assert message in refusal("bench", *args)


@pytest.mark.parametrize("device", [*DEVICES, "cpu"])
def test_plan_for_every_device(device: str) -> None:
    shape = ("--heads", "96:8", "--batch", "4", "--keys", "65536", "--device", device)
    assert "96:8 heads (group of 12)" in call("plan", *shape)
    data = json.loads(call("plan", *shape, "--json"))
    assert data["problem"]["num_heads"] == 96
    assert data["problem"]["device_type"] == ("cpu" if device == "cpu" else "cuda")
    assert data["plan"]["kernel"] == "decode"


def test_plan_shows_the_predicted_time_or_why_there_is_none() -> None:
    shape = ("--heads", "32:8", "--batch", "16", "--keys", "8192")
    us = json.loads(call("plan", *shape, "--device", "h200", "--json"))["predicted_us"]
    assert f"predicted: {us:.1f} us" in call("plan", *shape, "--device", "h200")
    assert json.loads(call("plan", *shape, "--device", "cpu", "--json"))["predicted_us"] is None
    assert "no predicted time: a CPU's rates" in call("plan", *shape, "--device", "cpu")


def test_bench_shows_predictions_of_an_earlier_result() -> None:
    text = call("bench", "--from", str(H200), "--case", "llama3-8b-decode-*", "--predict")
    assert "within 20 % of the measured time: " in text
    assert "a CPU's rates" in refusal("bench", "--device", "cpu", "--predict")


def test_plan_takes_every_option() -> None:
    options = "--heads 32:8 --dim 96 --dim-v 64 --batch 2 --keys 1000 --queries 5 --causal --window 100,-1"
    options += " --page-size 16 --dtype fp16 --num-splits 3 --no-pack --device a100 --json"
    problem = json.loads(call("plan", *options.split()))["problem"]
    want: dict[str, object] = {
        "head_dim": 96,
        "head_dim_v": 64,
        "batch": 2,
        "max_seqlen_k": 1000,
        "max_seqlen_q": 5,
    }
    want |= {"window_left": 100, "window_right": 0, "page_size": 16, "kv_layout": "paged"}
    want |= {"dtype": "float16", "num_splits": 3, "pack_gqa": False}
    assert {name: problem[name] for name in want} == want


def test_plan_of_a_case() -> None:
    assert "pages of 16" in call("plan", "--case", "glm4.7-paged16-b4-s65536", "--device", "h200")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--heads is missing"),
        (["--heads", "97:8"], "97 heads; that must be a multiple of the 8 KV heads"),
        (["--heads", "8x2"], "--heads is '8x2'"),
        (["--heads", "8", "--window", "3"], "--window is '3'"),
        (["--heads", "8", "--dim", "0"], "--dim is 0"),
        (["--heads", "8", "--dim", "512"], "head dimension 512"),
        (["--heads", "8", "--keys", "-1"], "--keys is -1"),
        (["--heads", "8", "--dtype", "fp8"], "--dtype is 'fp8'"),
        (["--heads", "8", "--device", "abacus"], "--device is 'abacus'"),
        (["--case", "nothing"], "--case is 'nothing'"),
        (
            ["--case", "llama3-8b-prefix8192-paged16-b64-s8704"],
            "which shares a prefix: its call has two plans",
        ),
    ],
)
def test_plan_refuses_in_one_line(args: list[str], message: str) -> None:
    assert message in refusal("plan", *args)


def test_check_runs_what_can_run_here() -> None:
    text = call("check")
    for part in ("Python", "PyTorch", "Triton", "decode on CPU", "prefill on CPU", "works"):
        assert part in text


def test_check_fails_with_a_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck.torch, "__version__", "2.4.0")
    text = call("check", code=1)
    assert "pip install 'torch>=2.11'" in text
    assert "1 problem: PyTorch" in text


H200_TABLE = ("NVIDIA H200", (9, 0))


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A table of an H200, two tiles of which are its own, where a process on one looks for it."""
    monkeypatch.setenv("HEADFOLD_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("HEADFOLD_TUNED", raising=False)
    machine = tuned_file.machine_of(*H200_TABLE)
    path = tuned_file.path_of(machine)
    assert path is not None
    tuned_file.save(Table(machine, (*map(row, pair()), row())), path)
    return path


def test_check_says_whether_a_table_of_tiles_is_in_force(
    table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And how many entries it has; a file that cannot be used comes with a mend and fails nothing."""
    found = selfcheck.decode_tiles("tiles", *H200_TABLE)
    assert (found.state, found.found) == ("ok", f"2 of this machine's own, of 3 measured, from {table}")
    other = selfcheck.decode_tiles("tiles", "NVIDIA L4", (8, 9))
    assert (other.state, other.found, other.mend) == (
        "note",
        "built in",
        "headfold tune measures this machine's own",
    )
    table.write_text("{")
    broken = selfcheck.decode_tiles("tiles", *H200_TABLE)
    assert (broken.state, broken.is_bad) == ("missing", False)
    assert str(table) in broken.found
    assert "headfold tune --again" in broken.mend
    monkeypatch.setenv("HEADFOLD_TUNED", "0")
    assert "HEADFOLD_TUNED=0" in selfcheck.decode_tiles("tiles", *H200_TABLE).found


def test_plans_for_named_devices_know_no_table(table: Path) -> None:
    shape = ("--heads", "32:8", "--batch", "16", "--keys", "8192", "--device", "h200")
    text = call("plan", *shape)
    assert "own table" not in text
    assert json.loads(call("plan", *shape, "--json"))["device"]["tiles"] == []
    table.unlink()
    assert call("plan", *shape) == text


def test_plan_for_the_gpu_at_hand_says_that_its_tile_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tuple(r.entry for r in map(row, pair()) if r.entry is not None)
    monkeypatch.setattr(shapes, "device_from", lambda name: replace(DEVICES["a100"], tiles=tiles))
    text = call("plan", "--heads", "32:8", "--batch", "16", "--keys", "8192", "--page-size", "16")
    assert "the tile comes from this machine's own table" in text
    assert "block of 32 keys, 2 warps, 6 stages" in text


def test_tune_without_a_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for args in ((), ("--again",), ("--show",), ("--only", "wave")):
        assert "tune needs an NVIDIA GPU, and PyTorch sees none" in refusal("tune", *args)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--only", "prefill"], "--only is 'prefill'; it must be one of wave, waves, few, stream, pages"),
        (["--show", "--output", "/no/such.json"], "--output is '/no/such.json'"),
        (["--show", "--output", str(H200)], "h200.json: arch is missing"),
    ],
)
def test_tune_refuses_in_one_line(args: list[str], message: str) -> None:
    assert message in refusal("tune", *args)


def test_tune_shows_a_table_and_measures_nothing(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = table.read_bytes()
    text = call("tune", "--show", "--output", str(table))
    assert "2 of 3 tiles are not the built-in ones" in text
    assert [line.split()[0] for line in text.splitlines() if "0.900" in line] == ["stream", "pages", "wave"]
    assert "built in" in text
    assert table.read_bytes() == before
    monkeypatch.setattr(tune, "table_to_show", lambda output: None)
    assert "no table is in force" in call("tune", "--show")


class FakeGpu:
    """What `headfold tune` finds to do on a GPU that is not there, and which goals it then measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.asked: list[tuple[Any, ...]] = []
        self.measured: list[str] = []
        self.problem: Exception | None = None

    def work_here(self, only: tuple[str, ...], again: bool, output: Path | None) -> tune.Work:
        """The goals of `only`, into a file of this fake."""
        self.asked.append((only, again, output))
        machine = tuned_file.machine_of(*H200_TABLE)
        path = output or self.path
        found = goals(DEVICES["h200"], only)
        table = tune.begin(path, machine, found, again)
        left = tuple(g for g in found if not table.has(g.keys))
        return tune.Work(DEVICES["h200"], torch.device("cpu"), left, table, path)

    def tune(self, tuner: Any, goal: Any) -> list[Row]:
        """Rows without a measurement; the goal named "few" has none where there is a problem."""
        tuner.say("timing 3 tiles in turn")
        if self.problem is not None and goal.forms == ("few",):
            raise self.problem
        self.measured.append(goal.name)
        return [Row(*key, None, 100.0, 100.0, 3, 1) for key in goal.keys]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """A fake GPU that `headfold tune` runs on."""
    fake = FakeGpu(tmp_path / "t.json")
    monkeypatch.setattr(tune, "work_here", fake.work_here)
    monkeypatch.setattr(tune.Tuner, "tune", lambda self, goal: fake.tune(self, goal))
    return fake


def test_tune_measures_shows_and_goes_on(gpu: FakeGpu) -> None:
    text = call("tune", "--only", "few", "--only", "waves")
    assert gpu.asked == [(("few", "waves"), False, None)]
    assert len(gpu.measured) == 6  # both at three head dimensions
    assert "[2/6] few, 16 rows, d64" in text
    assert f"table: {gpu.path}" in text
    found = tuned_file.read(gpu.path)
    assert found is not None
    assert len(found.rows) == 6
    call("tune", "--only", "few")
    assert len(gpu.measured) == 6
    call("tune", "--only", "few", "--again")
    assert len(gpu.measured) == 9
    call("tune", "--output", str(gpu.path.with_name("other.json")))
    assert len(gpu.measured) == 9 + len(goals(DEVICES["h200"]))


def test_tune_fails_where_something_could_not_be_measured(gpu: FakeGpu) -> None:
    """In words, with exit code 1; the rest is measured."""
    gpu.problem = tune.NotMeasured("it needs 9.0 GB, 1.0 GB are free")
    text = call("tune", "--only", "few", "--only", "waves", code=1)
    assert "not measured: few, 16 rows, d64: it needs 9.0 GB" in text
    assert len(gpu.measured) == 3


def test_tune_ends_in_one_line_when_the_gpu_is_lost_or_the_disk_full(gpu: FakeGpu) -> None:
    for problem, words in (
        (DeviceLost("few: an illegal memory access"), "the GPU was lost in few: an illegal memory access"),
        (OSError(28, "No space left on device", "t.json"), "t.json: No space left on device"),
    ):
        gpu.problem = problem
        text = call("tune", "--only", "few", code=2)
        assert f"headfold: {words}" in text.splitlines()[-1]


def test_tune_does_not_write_over_a_file_that_is_no_table(gpu: FakeGpu) -> None:
    gpu.path.write_text("my notes")
    assert "--again starts over" in refusal("tune", "--only", "few")
    assert gpu.path.read_text() == "my notes"


def test_usage_errors_of_the_parser_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in (["bench", "--rounds", "many"], ["bench", "--no-such-option"], ["no-such-command"]):
        monkeypatch.setattr(sys, "argv", ["headfold", *argv])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert e.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_missing_extra_is_one_sentence() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'typer' else real(name, *a)\n"
        "from headfold.cli import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "headfold: the command line needs typer, which is not installed: pip install 'headfold[cli]'\n"
    )
