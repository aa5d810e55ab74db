"""The command line from end to end, on tiny cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from typer.testing import CliRunner

import headfold
from headfold import cli
from headfold.bench import selfcheck
from headfold.bench.commands import app
from headfold.bench.results import Result
from headfold.planner import DEVICES
from tests.bench.tiny import tiny

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
    assert all(name in text for name in ("bench", "plan", "check", "--version"))
    assert call() == text
    for command in ("bench", "plan", "check"):
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
    assert len(result.cases) == 8
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
