"""Where a machine's own table of tiles lies, reading the one in force, and writing it."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path

from headfold.planner.tuned import Entry, Machine, Table, parse, serialise


def cache_dir() -> Path | None:
    """$HEADFOLD_CACHE_DIR, else $XDG_CACHE_HOME/headfold, else ~/.cache/headfold; None for a user without a home."""
    if own := os.environ.get("HEADFOLD_CACHE_DIR"):
        return Path(own)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "headfold"
    try:
        return Path.home() / ".cache" / "headfold"
    except RuntimeError:
        return None


def machine_of(device: str, arch: tuple[int, int]) -> Machine:
    """A GPU of this machine, by its name and compute capability, with the versions that run here."""
    import torch

    import headfold

    try:
        import triton
    except ImportError:
        version = ""
    else:
        version = triton.__version__
    return Machine(device, arch, headfold.__version__, torch.__version__, version)


def path_of(machine: Machine) -> Path | None:
    """The file that a machine's table is read from: one for each GPU, architecture and Triton version."""
    folder = cache_dir()
    device = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")
    arch = "sm{}{}".format(*machine.arch)
    return None if folder is None else folder / f"tiles-{device}-{arch}-triton{machine.triton}.json"


def tables_are_off() -> bool:
    """True when HEADFOLD_TUNED=0 asks for the built-in tiles."""
    return os.environ.get("HEADFOLD_TUNED") == "0"


def read(path: Path) -> Table | None:
    """The table in a file, None where there is no file.

    Raises:
        ValueError: the file holds no table.
        OSError: the file cannot be read.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def table_in_force(machine: Machine) -> Table | None:
    """The table that plans for this GPU use, if any: none under HEADFOLD_TUNED=0, and none of another machine.

    Raises:
        ValueError, OSError: as `read` does.
    """
    path = path_of(machine)
    table = None if path is None or tables_are_off() else read(path)
    return None if table is None or table.machine.unlike(machine) else table


def entries_in_force(device: str, arch: tuple[int, int]) -> tuple[Entry, ...]:
    """The entries of the table in force. A file that cannot be used is not, and one warning says so."""
    try:
        table = table_in_force(machine_of(device, arch))
    except (OSError, ValueError) as e:
        warnings.warn(
            f"headfold uses its built-in decode tiles: {e}. Delete that file, or measure it anew with "
            "`headfold tune --again`",
            stacklevel=2,
        )
        return ()
    return () if table is None else table.entries


def save(table: Table, path: Path) -> None:
    """Write a table. A reader never sees half a file, and a write that fails leaves the old one."""
    text = serialise(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
