"""The file of a machine's own tiles: where it lies, when it is in force, and that nothing else is believed."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headfold.planner import device, running_device, tuned_file
from headfold.planner.tuned import Machine, Table, serialise
from headfold.planner.tuned_file import (
    cache_dir,
    entries_in_force,
    machine_of,
    path_of,
    read,
    save,
    table_in_force,
)
from tests.planner.tables import entry, pair, row

H200 = ("NVIDIA H200", (9, 0))


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The cache directory, an empty one, with tables in force."""
    monkeypatch.delenv("HEADFOLD_TUNED", raising=False)
    monkeypatch.setenv("HEADFOLD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def written(**other: Any) -> Path:
    """A table of an H200 of this machine, where it is looked for; `other` changes what it says of the machine."""
    here = machine_of(*H200)
    path = path_of(here)
    assert path is not None
    save(Table(replace(here, **other), tuple(map(row, (entry(), *pair())))), path)
    return path


def quiet() -> tuple[Any, ...]:
    """The entries in force, where nothing is to be said."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return entries_in_force(*H200)


def test_cache_directory_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("HEADFOLD_CACHE_DIR", "/own")
    assert cache_dir() == Path("/own")
    for unset in ("", None):
        monkeypatch.setenv("HEADFOLD_CACHE_DIR", "") if unset == "" else monkeypatch.delenv(
            "HEADFOLD_CACHE_DIR"
        )
        assert cache_dir() == Path("/xdg/headfold")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/home/me/.cache/headfold")


def test_without_a_home_there_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HEADFOLD_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert path_of(machine_of(*H200)) is None
    assert quiet() == ()


def test_each_gpu_and_triton_has_its_file() -> None:
    machine = Machine("NVIDIA H200 MIG 1g.18gb", (9, 0), "0", "1", "3.7.1")
    names = {
        path_of(m).name  # type: ignore[union-attr]
        for m in (
            machine,
            replace(machine, device="L4"),
            replace(machine, triton="3.6.0"),
            replace(machine, arch=(8, 9)),
        )
    }
    assert len(names) == 4
    assert "tiles-nvidia-h200-mig-1g-18gb-sm90-triton3.7.1.json" in names


def test_without_a_file_nothing_is_in_force() -> None:
    assert quiet() == ()
    assert table_in_force(machine_of(*H200)) is None


def test_a_written_table_is_in_force(folder: Path) -> None:
    path = written()
    assert path.parent == folder
    assert sorted(quiet(), key=str) == sorted((entry(), *pair()), key=str)


@pytest.mark.parametrize("value", ["1", "", "yes"])
def test_headfold_tuned_0_alone_ignores_tables(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    written()
    monkeypatch.setenv("HEADFOLD_TUNED", value)
    assert len(quiet()) == 3
    monkeypatch.setenv("HEADFOLD_TUNED", "0")
    assert quiet() == ()
    written().write_text("no table")
    assert quiet() == ()


@pytest.mark.parametrize(
    "other",
    [{"device": "NVIDIA H100"}, {"arch": (10, 0)}, {"triton": "3.5.0"}],
    ids=["device", "arch", "triton"],
)
def test_a_table_of_another_machine_is_not_in_force(other: dict[str, Any]) -> None:
    """A file that was copied or renamed: what it says counts, not what it is called. Nothing is wrong with it."""
    written(**other)
    assert quiet() == ()


def test_a_table_of_another_headfold_or_torch_is_in_force() -> None:
    written(headfold="0.0.1", torch="2.11.0")
    assert len(quiet()) == 3


@pytest.mark.parametrize(
    "content", [b"", b"\xff\x00", b"{}", b"[" * 100_000, b'{"schema": 1}', None], ids=str
)
def test_what_is_no_table_is_not_used_and_said_once(content: bytes | None) -> None:
    """The warning names the file and the mend. None cuts the file short."""
    path = written()
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.warns(UserWarning, match="built-in") as caught:
        assert entries_in_force(*H200) == ()
    assert len(caught) == 1
    text = str(caught[0].message)
    assert str(path) in text
    assert "headfold tune --again" in text


def test_a_file_that_cannot_be_read_is_not_used_and_said_once() -> None:
    path = written()
    path.unlink()
    path.mkdir()  # root, too, cannot read a directory
    with pytest.warns(UserWarning, match="built-in") as caught:
        assert entries_in_force(*H200) == ()
    assert str(path) in str(caught[0].message)


def test_a_cache_directory_that_is_a_file_is_no_table(folder: Path) -> None:
    folder.write_text("")
    assert quiet() == ()


def test_the_gpu_at_hand_has_its_table_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the driver's figures, once a process; another GPU has none."""
    names = {0: "NVIDIA H200", 1: "NVIDIA L4"}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda i: SimpleNamespace(
            name=names[i], major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
        ),
    )
    monkeypatch.setattr(device, "_running", {})
    path = written()
    assert len(running_device(torch.device("cuda", 0)).tiles) == 3
    assert running_device(torch.device("cuda", 1)).tiles == ()
    path.write_text("no table")
    assert len(running_device(torch.device("cuda", 0)).tiles) == 3


def test_machine_has_this_processs_versions() -> None:
    import headfold

    machine = machine_of(*H200)
    assert (machine.device, machine.arch) == H200
    assert (machine.headfold, machine.torch) == (headfold.__version__, torch.__version__)
    assert machine.triton == pytest.importorskip("triton").__version__


def test_a_write_that_fails_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the text or when the file is put in place; and no other file is left behind."""
    path = written()
    before = path.read_bytes()
    table = Table(machine_of(*H200))

    def half(self: Path, text: str) -> int:
        with open(self, "w") as f:
            f.write(text[: len(text) // 2])
        raise OSError("disk full")

    def refused(source: Path, target: Path) -> None:
        raise OSError("read-only")

    for where, name, fake in ((Path, "write_text", half), (os, "replace", refused)):
        with monkeypatch.context() as m:
            m.setattr(where, name, fake)
            with pytest.raises(OSError, match=r"disk full|read-only"):
                save(table, path)
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]
    save(table, path)
    assert path.read_text() == serialise(table)
    assert read(path) == table
    assert os.listdir(path.parent) == [path.name]


def test_tables_are_off_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not tuned_file.tables_are_off()
    monkeypatch.setenv("HEADFOLD_TUNED", "0")
    assert tuned_file.tables_are_off()
